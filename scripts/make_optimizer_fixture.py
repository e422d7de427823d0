#!/usr/bin/env python3
"""Write some steps of every optimizer, computed in float64, for a test of the engine's optimizers.

    python scripts/make_optimizer_fixture.py crates/engine/tests/fixtures/optimizers.json

`tensors` holds small tensors with their first weights; every step has a learning rate, a factor on the gradient (as from
clipping) and a gradient for each tensor. `final` holds what each optimizer leaves of them, with weight decay on matrices:

    adamw   torch.optim.AdamW
    lion    the formula of arXiv 2302.06675, algorithm 2
    muon    torch.optim.Muon with adjust_lr_fn="match_rms_adamw" for matrices that are neither embedding nor head, and
            torch.optim.AdamW for the others. torch casts to bfloat16 for the Newton-Schulz iteration, which would move
            the weights by up to some per cent of their update; the cast is made one to float64 here.

`eight_bit` holds steps of bitsandbytes' AdamW8bit on one larger tensor, whose weights and gradients both sides compute from
integers: at the end some weights, all codes (hexadecimal) and largest magnitudes. bitsandbytes runs on the CPU, where its
kernel for float32 looks codes up in a coarse table and misses the nearest one for a fifth of these second moments; its
path for other types, which takes the nearest as its CUDA kernels do, is used instead.
"""

import argparse
from pathlib import Path
from unittest import mock

import bitsandbytes
import torch

from fixture_tools import digits, write_json

SHAPES = {
    "model.embed_tokens.weight": (8, 6),
    "model.layers.0.self_attn.q_proj.weight": (6, 6),
    "model.layers.0.mlp.down_proj.weight": (5, 12),
    "model.layers.0.mlp.up_proj.weight": (12, 5),
    "model.norm.weight": (6,),
}
LEARNING_RATES = [0.02, 0.05, 0.01, 0.03, 0.02, 0.04]
SCALES = [1.0, 0.3, 1.0, 0.7, 1.0, 0.05]
WEIGHT_DECAY = 0.1
COEFFICIENTS = (3.4445, -4.7750, 2.0315)

ROWS, COLUMNS = 65, 79
EIGHT_BIT_STEPS = 6
EIGHT_BIT_LR = 0.01


def decay_of(weights: torch.Tensor) -> float:
    return WEIGHT_DECAY if weights.dim() > 1 else 0.0


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of arXiv 2302.06675."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for w in group["params"]:
                state = self.state[w]
                m = state.setdefault("m", torch.zeros_like(w))
                direction = (beta1 * m + (1 - beta1) * w.grad).sign()
                w.sub_(group["lr"] * (direction + group["weight_decay"] * w))
                m.mul_(beta2).add_(w.grad, alpha=1 - beta2)


def groups(weights: dict[str, torch.Tensor], names) -> list[dict]:
    return [{"params": [weights[name]], "weight_decay": decay_of(weights[name])} for name in names]


def adamw(weights, names):
    return torch.optim.AdamW(groups(weights, names), betas=(0.9, 0.999), eps=1e-8)


def optimizers(kind: str, weights: dict[str, torch.Tensor]) -> list[torch.optim.Optimizer]:
    if kind == "adamw":
        return [adamw(weights, weights)]
    if kind == "lion":
        return [Lion(groups(weights, weights), {"lr": 0.0, "betas": (0.9, 0.99)})]
    matrices = [name for name, w in weights.items() if w.dim() == 2 and "embed_tokens" not in name]
    muon = torch.optim.Muon(
        [weights[name] for name in matrices],
        weight_decay=WEIGHT_DECAY,
        momentum=0.95,
        nesterov=True,
        ns_coefficients=COEFFICIENTS,
        ns_steps=5,
        adjust_lr_fn="match_rms_adamw",
    )
    return [muon, adamw(weights, [name for name in weights if name not in matrices])]


def run(kind: str, start: dict, gradients: list[dict]) -> dict[str, torch.Tensor]:
    weights = {name: w.clone().requires_grad_() for name, w in start.items()}
    steppers = optimizers(kind, weights)
    for lr, scale, gradient in zip(LEARNING_RATES, SCALES, gradients, strict=True):
        for name, w in weights.items():
            w.grad = gradient[name] * scale
        for stepper in steppers:
            for group in stepper.param_groups:
                group["lr"] = lr
            stepper.step()
    return {name: w.detach() for name, w in weights.items()}


def small_tensors() -> dict:
    generator = torch.Generator().manual_seed(11)

    def random() -> dict[str, torch.Tensor]:
        return {name: torch.randn(shape, generator=generator).double() for name, shape in SHAPES.items()}

    start, gradients = random(), [random() for _ in LEARNING_RATES]
    # a row of the embedding that no token of the batches uses
    for gradient in gradients:
        gradient["model.embed_tokens.weight"][3] = 0.0

    with mock.patch.object(torch, "bfloat16", torch.float64):
        final = {kind: run(kind, start, gradients) for kind in ("adamw", "lion", "muon")}
    return {
        "weight_decay": WEIGHT_DECAY,
        "tensors": [
            {"name": name, "shape": list(shape), "weights": digits(start[name].flatten())} for name, shape in SHAPES.items()
        ],
        "steps": [
            {"learning_rate": lr, "scale": scale, "gradients": [digits(g.flatten()) for g in gradient.values()]}
            for lr, scale, gradient in zip(LEARNING_RATES, SCALES, gradients)
        ],
        "final": {kind: [digits(w.flatten(), 12) for w in weights.values()] for kind, weights in final.items()},
    }


def pseudorandom(step: int) -> torch.Tensor:
    """Numbers of both signs in float32, [ROWS, COLUMNS], with magnitudes from 2⁻⁹ to 1.5.

    No square is so small beside its neighbours' that its code would be that of 0: there the engine departs from
    bitsandbytes and takes the smallest code above.
    """
    i = torch.arange(ROWS * COLUMNS)
    k = (i * 7919 + step * 104729) % 1009
    return ((0.5 + k.float() / 1009) * (2 * (k % 2) - 1) * torch.exp2(-(i % 9).float())).view(ROWS, COLUMNS)


def nearest_codes(values, table, absmax_out, codes_out, blocksize) -> None:
    """Stands for bitsandbytes' function of the same arguments, but for float64, which it encodes exactly."""
    codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(values.double(), table, blocksize)
    codes_out.copy_(codes)
    absmax_out.copy_(absmax)


def eight_bit() -> dict:
    w = torch.nn.Parameter(pseudorandom(0))
    optimizer = bitsandbytes.optim.AdamW8bit([w], lr=EIGHT_BIT_LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=WEIGHT_DECAY)
    with mock.patch.object(bitsandbytes.backends.cpu.ops, "_quant_blockwise_fp32_direct", nearest_codes):
        for step in range(1, EIGHT_BIT_STEPS + 1):
            w.grad = pseudorandom(step)
            optimizer.step()
    state = optimizer.state[w]
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8
    moments = {
        name: {
            "codes": state[f"state{n}"].flatten().numpy().tobytes().hex(),
            "absmax": digits(state[f"absmax{n}"]),
        }
        for n, name in ((1, "first"), (2, "second"))
    }
    settings = {"shape": [ROWS, COLUMNS], "steps": EIGHT_BIT_STEPS, "learning_rate": EIGHT_BIT_LR, "weight_decay": WEIGHT_DECAY}
    return {**settings, "every_16th_weight": digits(w.detach().flatten()[::16]), **moments}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    write_json(out, {**small_tensors(), "eight_bit": eight_bit()})


if __name__ == "__main__":
    main()
