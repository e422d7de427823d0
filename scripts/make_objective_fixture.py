#!/usr/bin/env python3
"""Write losses and gradients of every objective, computed by TRL's own code, for random log-probs in float64.

    pip download --no-deps trl==0.8.6 -d WHEELS && pip download --no-deps trl==1.13.0 -d WHEELS
    python scripts/make_objective_fixture.py WHEELS crates/align/tests/fixtures/objectives.json

No loss that TRL has is typed again here. Its trainers are made without their constructors, given a model that returns
prescribed log-probs, and asked for their loss; autograd does the rest.

    TRL installed  DPOTrainer._compute_loss, one pair at a time: dpo, robust-dpo, ipo, hinge, nca, exo, sppo, apo-*, sft
                   CPOTrainer and ORPOTrainer.get_batch_loss_metrics, one pair at a time: cpo, simpo, orpo. They take
                   logits, so the vocabulary has two words and a prompt one token.
                   KTOTrainer._compute_loss: the batch, and each of its examples with the batch's mismatched pairs
    TRL 1.13.0     BCOTrainer.bco_loss and RunningMoments, the last release that has them: batches in a row, on one δ
    TRL 0.8.6      DPOTrainer.dpo_loss: dpo with label smoothing, ipo on sums of log-probs; KTOTrainer.kto_loss

The methods of the two old releases are taken out of their wheels, since these do not import beside a new transformers.
TRL casts to float32 in ORPO's loss and in BCO's running mean, which would hide differences below 1e-7: while its code
runs, Tensor.float returns the tensor as it is, and new tensors are float64. safe-dpo, modpo and tdpo are not in TRL.
Their papers' formulas are written out below and differentiated by autograd; `source` says "formula" there.

Pairs have log-probs between -0.005 and -3200 and differences of log-ratios from 0 to some hundreds. Every number has
all its digits.
"""

import argparse
import ast
import contextlib
import dataclasses
import os
import typing
import zipfile
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
import torch.nn.functional as F
import trl
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from fixture_tools import write_json

BCO_RELEASE, OLD_RELEASE = "1.13.0", "0.8.6"
ACCELERATOR = SimpleNamespace(device="cpu", use_distributed=False, gather=lambda x: x, gather_for_metrics=lambda x: x)
PROMPT, WORD = 1, 0


@contextlib.contextmanager
def float64():
    """Lets TRL calculate in float64 where it casts to float32."""
    cast = torch.Tensor.float
    torch.Tensor.float = lambda tensor: tensor.double() if tensor.dtype == torch.bool else tensor
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.Tensor.float = cast
        torch.set_default_dtype(torch.float32)


# --- random inputs


def tokens_with_sum(total: float, count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` negative log-probs whose sum is about `total`."""
    shares = torch.rand(count, dtype=torch.float64, generator=generator) + 0.1
    return total * shares / shares.sum()


def random_pairs() -> list[dict]:
    """Pairs from nearly certain to very unlikely responses, close to the reference and far from it."""
    generator = torch.Generator().manual_seed(11)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), dtype=torch.float64, generator=generator).item()

    def response(scale: float, distance: float, length: int) -> dict:
        tokens = tokens_with_sum(-scale * uniform(0.4, 1.3), length, generator)
        ref = -abs(tokens.sum().item() + distance * uniform(-1, 1))
        return {"tokens": tokens, "ref": ref, "kl": distance * uniform(0, 1)}

    pairs = []
    for number, (scale, distance) in enumerate(
        [(0.01, 0.0), (0.5, 0.1), (3, 0.5), (20, 2), (20, 20), (60, 5), (150, 0.0), (150, 60), (400, 30), (400, 300),
         (900, 3), (3000, 400)]):
        chosen, rejected = (response(scale, distance, 1 + int(uniform(0, 1.5 * scale**0.5 + 3))) for _ in range(2))
        pairs.append({
            "chosen": chosen, "rejected": rejected,
            "margin": uniform(-1, 1) * (1 + distance),
            # safe and safe, safe and unsafe, unsafe and safe
            "unsafe": [[False, False], [False, True], [True, False]][number % 3],
        })
    return pairs


def random_batches() -> list[dict]:
    """Batches of single responses: mixed, of one class, of one example, imbalanced, far from the reference."""
    generator = torch.Generator().manual_seed(12)

    def normal(count: int, scale: float) -> torch.Tensor:
        return scale * torch.randn(count, dtype=torch.float64, generator=generator)

    shapes = [([1, 0, 1, 1, 0], 30, 1), ([1, 1, 1], 200, 20), ([0, 0], 5, 0.2), ([1], 90, 4),
              ([0, 0, 0, 0, 0, 0, 0, 1], 60, 9), ([1, 0, 0, 1], 1500, 500), ([1, 0], 40, 0)]
    batches = []
    for labels, scale, distance in shapes:
        count = len(labels)
        policy, policy_kl = -normal(count, scale).abs(), -normal(count, 2 * scale).abs()
        batches.append({"desirable": [bool(label) for label in labels],
                        "policy": policy, "ref": -(policy + normal(count, distance) + 0.3 * distance).abs(),
                        "policy_kl": policy_kl,
                        "ref_kl": -(policy_kl + normal(count, distance) - 0.2 * distance).abs()})
    return batches


# --- trainers of the TRL that is installed


def bare(trainer: type, **attributes):
    """A trainer with nothing but these attributes."""
    made = object.__new__(trainer)
    vars(made).update(model=SimpleNamespace(training=True), accelerator=ACCELERATOR, aux_loss_enabled=False,
                      _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1, **attributes)
    return made


def token_outputs(log_probs: torch.Tensor) -> SimpleNamespace:
    """What TRL's fused head returns, for per-token log-probs [sequences, tokens]."""
    nothing = torch.zeros_like(log_probs).detach()
    return SimpleNamespace(log_probs=log_probs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())


def padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths as one tensor, and a mask of PROMPT + tokens positions that is 1 on tokens."""
    mask = [torch.tensor([0] * PROMPT + [1] * len(row)) for row in rows]
    return tuple(torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True) for tensors in (rows, mask))


def leaves(pair: dict) -> list[torch.Tensor]:
    return [pair[side]["tokens"].clone().requires_grad_() for side in ("chosen", "rejected")]


def slopes(loss: torch.Tensor, tokens: list[torch.Tensor]) -> list[float]:
    """The derivative with respect to each sequence's log-prob: that of any of its tokens, since it is a sum."""
    gradients = torch.autograd.grad(loss, tokens, allow_unused=True)
    gradients = [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, tokens)]
    for gradient in gradients:
        assert torch.allclose(gradient, gradient[:1], rtol=1e-9, atol=1e-12)
    return [gradient[0].item() for gradient in gradients]


def of_dpo_trainer(loss_type: str):
    def evaluate(pair: dict, beta: float, label_smoothing: float = 0.0):
        trainer = bare(trl.DPOTrainer, loss_types=[loss_type], loss_weights=[1.0], beta=beta, ld_alpha=None,
                       label_smoothing=label_smoothing, precompute_ref_logps=True, f_divergence_type="reverse_kl",
                       use_weighting=False)
        tokens = leaves(pair)
        log_probs, mask = padded(tokens)
        inputs = {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask,
                  "ref_chosen_logps": torch.tensor([pair["chosen"]["ref"]]),
                  "ref_rejected_logps": torch.tensor([pair["rejected"]["ref"]])}
        return trainer._compute_loss(lambda **_: token_outputs(log_probs), inputs, False), tokens

    return evaluate


def two_word_logits(log_probs: torch.Tensor) -> torch.Tensor:
    """Logits [sequences, PROMPT + tokens, 2] under which WORD follows with these log-probs."""
    others = torch.where(log_probs < 0, torch.log(-torch.expm1(log_probs)), 0.0)
    logits = torch.stack([log_probs, others], -1)
    return torch.cat([logits, torch.zeros_like(logits[:, :PROMPT])], 1)


def of_logits_trainer(trainer: type, **attributes):
    def evaluate(pair: dict, beta: float, **options):
        made = bare(trainer, beta=beta, label_smoothing=0.0, alpha=0.0, is_encoder_decoder=False, pad_token_id=WORD,
                    padding_value=WORD, **(attributes | options))
        tokens = leaves(pair)
        log_probs, _ = padded(tokens)
        batch = {}
        for side, row in zip(("chosen", "rejected"), tokens):
            ids = torch.full((1, PROMPT + len(row)), WORD)
            labels = ids.clone()
            labels[:, :PROMPT] = -100
            tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
            batch |= {f"{side}_{name}": tensor for name, tensor in tensors.items()}
        model = lambda *_, **__: SimpleNamespace(logits=two_word_logits(log_probs))
        return made.get_batch_loss_metrics(model, batch)[0], tokens

    return evaluate


def kto(batch: dict, examples: list[int], beta: float, desirable_weight: float, undesirable_weight: float):
    """TRL's mean loss of some examples of a batch, under the mismatched pairs of all of it, with their log-probs and z0."""
    trainer = bare(trl.KTOTrainer, loss_type="kto", calculate_KL=True, precompute_ref_logps=True, beta=beta,
                   desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    policy = batch["policy"][examples].clone().requires_grad_()
    matched, mismatched = torch.ones(len(examples), 2).long(), torch.full((len(batch["policy"]), 2), 2)
    mask = torch.tensor([0, 1])
    inputs = {"input_ids": matched, "attention_mask": torch.ones_like(matched),
              "completion_mask": mask.expand_as(matched), "KL_input_ids": mismatched, "KL_attention_mask": torch.ones_like(mismatched),
              "KL_completion_mask": mask.expand_as(mismatched), "label": torch.tensor(batch["desirable"])[examples],
              "ref_logps": batch["ref"][examples], "ref_KL_logps": batch["ref_kl"]}

    def model(input_ids, **_):
        return token_outputs((policy if input_ids[0, 0] == 1 else batch["policy_kl"])[:, None])

    loss = trainer._compute_loss(model, inputs, False)
    return loss, policy, trainer._metrics["train"]["kl"][0]


# --- methods out of the wheels of older releases


def definition(wheels: Path, release: str, module: str, *path: str):
    """A class, or a function of a class, of a module in a wheel, without importing the module."""
    with zipfile.ZipFile(wheels / f"trl-{release}-py3-none-any.whl") as wheel:
        node = ast.parse(wheel.read(f"trl/{module}"))
    for name in path:
        node = next(n for n in node.body if isinstance(n, (ast.ClassDef, ast.FunctionDef)) and n.name == name)
    scope = vars(typing) | {"torch": torch, "F": F, "dataclass": dataclasses.dataclass, "Accelerator": object}
    exec(compile(ast.Module([node], []), f"{release} {module}", "exec"), scope)
    return scope[path[-1]]


def split(batch: dict, policy: torch.Tensor) -> list[torch.Tensor]:
    """Log-probs of desirable and undesirable examples under policy, then reference, as the old methods take them."""
    desirable = torch.tensor(batch["desirable"])
    return [policy[desirable], policy[~desirable], batch["ref"][desirable], batch["ref"][~desirable]]


def in_order(batch: dict, losses: torch.Tensor) -> torch.Tensor:
    """Losses of desirable, then undesirable examples, in the order of the batch."""
    desirable = torch.tensor(batch["desirable"])
    order = torch.cat([desirable.nonzero(), (~desirable).nonzero()])[:, 0]
    return losses[order.argsort()]


# --- losses that TRL does not have, from their papers


def log_ratio(pair: dict, side: str, tokens: torch.Tensor) -> torch.Tensor:
    return tokens.sum() - pair[side]["ref"]


def safe_dpo(pair: dict, beta: float, delta: float = 0.0):
    tokens = leaves(pair)
    ratios = [log_ratio(pair, side, t) for side, t in zip(("chosen", "rejected"), tokens)]
    unsafe = [float(u) for u in pair["unsafe"]]
    if unsafe == [1.0, 0.0]:
        ratios, unsafe = ratios[::-1], unsafe[::-1]
    return -F.logsigmoid(beta * (ratios[0] - ratios[1]) - (unsafe[1] - unsafe[0]) * delta), tokens


def modpo(pair: dict, beta: float, weight: float = 1.0):
    tokens = leaves(pair)
    chosen, rejected = (log_ratio(pair, side, t) for side, t in zip(("chosen", "rejected"), tokens))
    return -F.logsigmoid((beta * chosen - beta * rejected - pair["margin"]) / weight), tokens


def tdpo(pair: dict, beta: float, alpha: float = 0.5):
    tokens = leaves(pair)
    chosen, rejected = (log_ratio(pair, side, t) for side, t in zip(("chosen", "rejected"), tokens))
    kls = [torch.tensor(pair[side]["kl"], requires_grad=True) for side in ("chosen", "rejected")]
    difference = beta * kls[1] - (beta * kls[0]).detach()
    return -F.logsigmoid(beta * (chosen - rejected) - alpha * difference), tokens, kls


# --- the fixture


def pair_case(objective: str, source: str, evaluate, pairs: list[dict], beta: float, options: dict,
              renamed: dict | None = None) -> dict:
    """One objective on all pairs. `renamed` are the options under TRL's names, where these differ."""
    case = {"objective": objective, "source": source, "beta": beta, "options": options,
            "losses": [], "grad_chosen": [], "grad_rejected": []}
    for pair in pairs:
        loss, tokens, *kls = evaluate(pair, beta, **(options if renamed is None else renamed))
        assert loss.dtype == torch.float64
        for kl in kls:
            gradients = torch.autograd.grad(loss, kl, retain_graph=True, allow_unused=True)
            for side, gradient in zip(("chosen", "rejected"), gradients):
                case.setdefault(f"grad_kl_{side}", []).append(0.0 if gradient is None else gradient.item())
        chosen, rejected = slopes(loss, tokens)
        case["losses"].append(loss.item())
        case["grad_chosen"].append(chosen)
        case["grad_rejected"].append(rejected)
    return case


def pair_cases(pairs: list[dict], wheels: Path) -> list[dict]:
    def of_old_dpo(pair: dict, beta: float, label_smoothing: float = 0.0, sum_logps: bool = False):
        loss_type = "ipo" if sum_logps else "sigmoid"
        trainer = SimpleNamespace(accelerator=ACCELERATOR, reference_free=False, loss_type=loss_type, beta=beta,
                                  label_smoothing=label_smoothing)
        tokens = leaves(pair)
        references = [torch.tensor([pair[side]["ref"]]) for side in ("chosen", "rejected")]
        losses, _, _ = old_dpo_loss(trainer, *(t.sum()[None] for t in tokens), *references)
        return losses[0], tokens

    old_dpo_loss = definition(wheels, OLD_RELEASE, "trainer/dpo_trainer.py", "DPOTrainer", "dpo_loss")
    current, old = f"TRL {trl.__version__}", f"TRL {OLD_RELEASE}"
    cases = []
    for objective, loss_type in {"dpo": "sigmoid", "hinge": "hinge", "nca": "nca_pair", "sppo": "sppo_hard",
                                 "ipo": "ipo", "apo-zero": "apo_zero", "apo-down": "apo_down"}.items():
        for beta in (0.01, 0.1, 2.0):
            cases.append(pair_case(objective, current, of_dpo_trainer(loss_type), pairs, beta, {}))
    for objective, loss_type in {"robust-dpo": "robust", "exo": "exo_pair"}.items():
        for beta, smoothing in ((0.01, 0.001), (0.1, 0.1), (2.0, 0.4)):
            options = {"label_smoothing": smoothing}
            cases.append(pair_case(objective, current, of_dpo_trainer(loss_type), pairs, beta, options))
    cases.append(pair_case("sft", current, of_dpo_trainer("sft"), pairs, 0.1, {}))
    for beta, smoothing in ((0.01, 0.0), (0.1, 0.1), (2.0, 0.3)):
        cases.append(pair_case("dpo", old, of_old_dpo, pairs, beta, {"label_smoothing": smoothing}))
        cases.append(pair_case("ipo", old, of_old_dpo, pairs, beta, {"sum_logps": True}))
    for beta, number in ((0.1, 0.0), (0.5, 1.0), (2.0, 0.3)):
        cases.append(pair_case("cpo", current, of_logits_trainer(CPOTrainer, loss_type="sigmoid"), pairs, beta,
                               {"alpha": number}, {"cpo_alpha": number}))
        cases.append(pair_case("simpo", current, of_logits_trainer(CPOTrainer, loss_type="simpo", cpo_alpha=0.0), pairs,
                               5 * beta, {"gamma": number}, {"simpo_gamma": number}))
        cases.append(pair_case("orpo", current, of_logits_trainer(ORPOTrainer), pairs, beta, {}))
        cases.append(pair_case("safe-dpo", "formula", safe_dpo, pairs, beta, {"delta": 4 * number}))
        cases.append(pair_case("modpo", "formula", modpo, pairs, beta, {"weight": number + 0.5}))
        cases.append(pair_case("tdpo", "formula", tdpo, pairs, beta, {"alpha": number}))
    return cases


def kto_cases(batches: list[dict], wheels: Path) -> list[dict]:
    old_kto_loss = definition(wheels, OLD_RELEASE, "trainer/kto_trainer.py", "KTOTrainer", "kto_loss")
    cases = []
    for beta, *weights in ((0.001, 1.0, 1.0), (0.1, 1.0, 1.0), (0.1, 4 / 3, 0.5), (10.0, 1.0, 2.5)):
        options = dict(zip(("desirable_weight", "undesirable_weight"), weights))
        current = {"objective": "kto", "source": f"TRL {trl.__version__}", "beta": beta, "options": options,
                   "batches": []}
        old = current | {"source": f"TRL {OLD_RELEASE}", "batches": []}
        for batch in batches:
            count = len(batch["policy"])
            mean, policy, shift = kto(batch, list(range(count)), beta, *weights)
            [gradient] = torch.autograd.grad(mean, policy)
            losses = [kto(batch, [example], beta, *weights)[0].item() for example in range(count)]
            assert abs(mean.item() - sum(losses) / count) < 1e-14
            current["batches"].append({"shift": shift, "losses": losses, "grad": (count * gradient).tolist()})

            trainer = SimpleNamespace(accelerator=ACCELERATOR, beta=beta, **options)
            policy = batch["policy"].clone().requires_grad_()
            chosen, rejected, ref_chosen, ref_rejected = split(batch, policy)
            losses, _, _, shift = old_kto_loss(trainer, chosen, rejected, batch["policy_kl"], ref_chosen, ref_rejected,
                                               batch["ref_kl"])
            losses = in_order(batch, losses)
            [gradient] = torch.autograd.grad(losses.sum(), policy)
            old["batches"].append({"shift": shift.item(), "losses": losses.tolist(), "grad": gradient.tolist()})
        cases += [current, old]
    return cases


def bco_cases(batches: list[dict], wheels: Path) -> list[dict]:
    bco_loss = definition(wheels, BCO_RELEASE, "experimental/bco/bco_trainer.py", "BCOTrainer", "bco_loss")
    moments = definition(wheels, BCO_RELEASE, "experimental/bco/bco_trainer.py", "RunningMoments")
    cases = []
    for beta in (0.01, 0.1, 1.0):
        trainer = SimpleNamespace(beta=beta, match_underlying_distribution=False, running=moments(ACCELERATOR))
        case = {"objective": "bco", "source": f"TRL {BCO_RELEASE}", "beta": beta, "options": {}, "batches": []}
        for batch in batches:
            policy = batch["policy"].clone().requires_grad_()
            losses, _, _, shift = bco_loss(trainer, *split(batch, policy), None, None)
            losses = in_order(batch, losses)
            [gradient] = torch.autograd.grad(losses.sum(), policy)
            case["batches"].append({"shift": shift.item(), "losses": losses.tolist(), "grad": gradient.tolist()})
        cases.append(case)
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path, help=f"folder with the wheels of TRL {OLD_RELEASE} and {BCO_RELEASE}")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)

    pairs, batches = random_pairs(), random_batches()
    with float64():
        on_pairs = pair_cases(pairs, args.wheels)
        on_batches = kto_cases(batches, args.wheels) + bco_cases(batches, args.wheels)
    inputs = {}
    for side in ("chosen", "rejected"):
        inputs[f"policy_{side}"] = [pair[side]["tokens"].sum().item() for pair in pairs]
        inputs[f"ref_{side}"] = [pair[side]["ref"] for pair in pairs]
        inputs[f"len_{side}"] = [len(pair[side]["tokens"]) for pair in pairs]
        inputs[f"kl_{side}"] = [pair[side]["kl"] for pair in pairs]
    inputs["unsafe_chosen"], inputs["unsafe_rejected"] = map(list, zip(*(pair["unsafe"] for pair in pairs)))
    inputs["margin"] = [pair["margin"] for pair in pairs]
    singles = [{key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
               for batch in batches]
    write_json(args.out, {"pairs": inputs, "batches": singles, "pairwise": on_pairs, "unpaired": on_batches})
    print(f"{len(on_pairs)} cases of {len(pairs)} pairs, {len(on_batches)} cases of {len(batches)} batches")


if __name__ == "__main__":
    main()
