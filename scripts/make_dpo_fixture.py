#!/usr/bin/env python3
"""Write ten AdamW DPO steps on two tiny models, computed by PyTorch, for a test of the whole training step.

    python scripts/make_dpo_fixture.py crates/engine/tests/fixtures/tiny crates/align/tests/fixtures/dpo_steps.json
    python scripts/make_dpo_fixture.py --check-with-trl crates/engine/tests/fixtures/tiny OUT.json

Models: `tied` and `untied_gqa` of make_tiny_llama_fixtures.py, as transformers' LlamaForCausalLM in float32 on one
thread. The reference is the model before the first step. Step s = 0 … 9 takes batch s of four pairs:

    loss       mean over pairs of −log σ(β((πc − rc) − (πr − rr))), sums of completion log-probs (last id: end of text)
    clipping   the gradient of that mean is scaled to global norm 9 where it exceeds 9, which it does in some of the
               steps and not in others; grad_norm is the norm before
    lr         peak · s / 2 for s < 2, then peak · (10 − s) / 8: the first step moves nothing but AdamW's moments
    AdamW      β₁ 0.9, β₂ 0.999, ε 1e-8; decay 0.1 · lr on matrices (embedding and head too), none on gains of norms

Recorded for each step, before its update: loss, grad_norm and the mean log-probs of chosen and rejected completions.
`first_gradient` is the gradient of batch 0 before clipping, `final_weights` what the ten steps leave. The same steps
are also done in float64 with the decoder of fixture_tools.py; `steps_float64` holds them, and the script fails where a
loss or norm in float32 is further than 2e-5 (relative) from them, so a bar of 1e-4 tests the program and not rounding.
The decay, the clipping and β are large so that leaving one out moves a loss or norm by more than 1e-3.

--check-with-trl runs the same pairs through TRL's DPOTrainer as well (its data collator, padding, loss, clipping,
optimizer and schedule; a word-level tokenizer whose words are the ids) and fails where a step differs by more than
2e-5. With TRL 1.16 both models agree.
"""

import argparse
import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import torch
import torch.nn.functional as F
import transformers

from fixture_tools import decoder_logits, digits, next_token_logps, write_json

MODELS = ("tied", "untied_gqa")
STEPS, PAIRS, WARMUP = 10, 4, 2
BETA, PEAK_LR, WEIGHT_DECAY, MAX_GRAD_NORM = 0.5, 5e-3, 0.1, 9.0
VOCAB, END = 96, 2
TOLERANCE = 2e-5


def random_batches() -> list[list[dict]]:
    """Ten batches of four pairs: prompts of 5–9 ids, completions of 3–8 ids that end with END."""
    generator = torch.Generator().manual_seed(7)

    def ids(low: int, high: int) -> list[int]:
        count = int(torch.randint(low, high + 1, (), generator=generator))
        return torch.randint(END + 1, VOCAB, (count,), generator=generator).tolist()

    def pair() -> dict:
        return {"prompt": ids(5, 9), "chosen": ids(2, 7) + [END], "rejected": ids(2, 7) + [END]}

    return [[pair() for _ in range(PAIRS)] for _ in range(STEPS)]


def learning_rate(step: int) -> float:
    return PEAK_LR * (step / WARMUP if step < WARMUP else (STEPS - step) / (STEPS - WARMUP))


def completion_logps(logits_of, batch: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of chosen and rejected completions given their prompts, [pairs] each."""

    def one(pair: dict, side: str) -> torch.Tensor:
        ids = pair["prompt"] + pair[side]
        return next_token_logps(logits_of(ids), ids)[len(pair["prompt"]) - 1 :].sum()

    return tuple(torch.stack([one(pair, side) for pair in batch]) for side in ("chosen", "rejected"))


def train(logits_of, weights: dict[str, torch.Tensor], batches: list[list[dict]]) -> dict:
    """Ten steps; updates `weights`, which `logits_of` computes with."""
    with torch.no_grad():
        reference = [completion_logps(logits_of, batch) for batch in batches]
    matrices = [w for w in weights.values() if w.dim() > 1]
    gains = [w for w in weights.values() if w.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)

    steps, first_gradient = [], {}
    for step, (batch, (ref_chosen, ref_rejected)) in enumerate(zip(batches, reference)):
        chosen, rejected = completion_logps(logits_of, batch)
        loss = -F.logsigmoid(BETA * ((chosen - ref_chosen) - (rejected - ref_rejected))).mean()
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            first_gradient = {name: w.grad.clone() for name, w in weights.items()}
        grad_norm = torch.nn.utils.clip_grad_norm_(weights.values(), MAX_GRAD_NORM)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        steps.append({"lr": learning_rate(step), "loss": loss.item(), "grad_norm": grad_norm.item(),
                      "logps_chosen": chosen.mean().item(), "logps_rejected": rejected.mean().item()})
    return {"reference": reference, "first_gradient": first_gradient, "steps": steps}


def largest_difference(steps: list[dict], others: list[dict]) -> float:
    """The largest relative difference of two runs in any recorded value."""
    return max(abs(a[k] - b[k]) / max(abs(b[k]), 1e-12) for a, b in zip(steps, others, strict=True) for k in b)


def rounded(rows: list[dict], count: int) -> list[dict]:
    return [{key: digits(value, count) for key, value in row.items()} for row in rows]


def trl_steps(folder: Path, batches: list[list[dict]]) -> list[dict]:
    """What TRL's DPOTrainer records for the same steps."""
    import datasets
    import trl
    from tokenizers import Tokenizer, models, pre_tokenizers

    # two digits, for the end token is found inside words too: a "t2" would split "t28"
    words = Tokenizer(models.WordLevel({f"t{i:02}": i for i in range(VOCAB)}, unk_token="t00"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"t{END:02}", pad_token="t00")

    def text(ids: list[int]) -> str:
        return " ".join(f"t{i:02}" for i in ids)

    rows = [{"prompt": text(pair["prompt"]), "chosen": " " + text(pair["chosen"]), "rejected": " " + text(pair["rejected"])}
            for batch in batches for pair in batch]
    datasets.disable_progress_bars()

    class Recorder(trl.DPOTrainer):
        """Keeps each step's loss unrounded; the trainer's own log rounds some of its values."""

        losses: list[float] = []

        def compute_loss(self, *args, **kwargs):
            result = super().compute_loss(*args, **kwargs)
            self.losses.append((result[0] if isinstance(result, tuple) else result).item())
            return result

    with tempfile.TemporaryDirectory() as scratch:
        config = trl.DPOConfig(
            output_dir=scratch, use_cpu=True, bf16=False, gradient_checkpointing=False, disable_dropout=True,
            per_device_train_batch_size=PAIRS, num_train_epochs=1, train_sampling_strategy="sequential",
            beta=BETA, learning_rate=PEAK_LR, lr_scheduler_type="linear", warmup_steps=WARMUP,
            weight_decay=WEIGHT_DECAY, max_grad_norm=MAX_GRAD_NORM,
            logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True)
        model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        trainer = Recorder(model=model, args=config, train_dataset=datasets.Dataset.from_list(rows),
                           processing_class=tokenizer)
        trainer.remove_callback(transformers.PrinterCallback)
        seen = [{key: row[f"{key}_ids"] for key in ("prompt", "chosen", "rejected")} for row in trainer.train_dataset]
        assert seen == [pair for batch in batches for pair in batch], "TRL tokenised the pairs differently"
        Recorder.losses.clear()
        trainer.train()
    log = [row for row in trainer.state.log_history if "grad_norm" in row]
    return [{"lr": row["learning_rate"], "loss": loss, "grad_norm": row["grad_norm"],
             "logps_chosen": row["logps/chosen"], "logps_rejected": row["logps/rejected"]}
            for row, loss in zip(log, Recorder.losses, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check-with-trl", action="store_true")
    parser.add_argument("models", type=Path, help="the folder that make_tiny_llama_fixtures.py wrote")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.disable_progress_bar()

    batches, results = random_batches(), {}
    for name in MODELS:
        model = transformers.LlamaForCausalLM.from_pretrained(args.models / name, dtype=torch.float32)
        config, weights = model.config, dict(model.named_parameters())
        exact_weights = {k: w.detach().double().requires_grad_() for k, w in weights.items()}
        run = train(lambda ids: model(torch.tensor([ids]), use_cache=False).logits[0], weights, batches)
        exact = train(lambda ids: decoder_logits(config, exact_weights, ids), exact_weights, batches)
        difference = largest_difference(run["steps"], exact["steps"])
        assert difference < TOLERANCE, f"{name}: float32 and float64 differ by {difference}"
        print(f"{name}: loss {run['steps'][0]['loss']:.4f} … {run['steps'][-1]['loss']:.4f}, "
              f"largest relative difference from float64 {difference:.1e}")
        if args.check_with_trl:
            theirs = trl_steps(args.models / name, batches)
            difference = largest_difference(theirs, run["steps"])
            print(f"{name}: largest relative difference of TRL {difference:.1e}")
            assert difference < TOLERANCE, f"{theirs}\n{run['steps']}"
        results[name] = {
            "reference_logps": [{"chosen": digits(c), "rejected": digits(r)} for c, r in run["reference"]],
            "first_gradient": {
                k: {"norm": digits(g.double().norm().item()), "head": digits(g.flatten()[:8])}
                for k, g in run["first_gradient"].items()},
            "steps": rounded(run["steps"], 9),
            "steps_float64": rounded(exact["steps"], 15),
            "final_weights": {
                k: {"sum": digits(w.double().sum().item()), "abs_sum": digits(w.double().abs().sum().item())}
                for k, w in weights.items()},
        }
    write_json(args.out, {
        "beta": BETA, "peak_lr": PEAK_LR, "warmup_steps": WARMUP, "total_steps": STEPS,
        "adamw": {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "weight_decay": WEIGHT_DECAY},
        "max_grad_norm": MAX_GRAD_NORM,
        "batches": batches,
        "models": results,
    })


if __name__ == "__main__":
    main()
