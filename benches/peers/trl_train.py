#!/usr/bin/env python3
"""Training on preferences by TRL on the CPU, the peer of `preference_training`; `compare.py` runs both in turns.

    python trl_train.py --model MODEL_DIR --data PAIRS.jsonl.gz --pairs 24 --write-tokens tokens.json
    python trl_train.py --model MODEL_DIR --data PAIRS.jsonl.gz --pairs 24 --loss dpo --dtype bf16 --precompute

Data are hh-rlhf's transcripts or PKU-SafeRLHF's rows, of which the safer response is chosen; the first pairs whose prompt is
shorter than --max-length are taken, in the order of the file. What is no option here is TRL's default: AdamW, learning rate
1e-6 falling to 0, beta 0.1, gradient norms up to 1.

With --write-tokens nothing is trained: the file gets the tokens as TRL makes and cuts them, and for each pair the log-probabilities
of both responses under the f32 weights, one sequence at a time. Otherwise the last line of standard output is a JSON object.

For KTO a batch of N pairs is N desirable rows, then N undesirable ones, for TRL estimates its divergence with the response of the
row before, which must be of another prompt.
"""

import argparse
import gzip
import hashlib
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--pairs", required=True, type=int)
    parser.add_argument("--batch-size", type=int, default=8, help="pairs a step")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--loss", choices=["dpo", "kto"], default="dpo")
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32", help="bf16: autocast over f32 weights")
    parser.add_argument("--lora", type=int, metavar="RANK")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, TRL's default")
    parser.add_argument("--precompute", action="store_true", help="the reference's log-probabilities, before training")
    parser.add_argument("--write-tokens", type=Path, metavar="FILE")
    return parser.parse_args()


def conversation(transcript):
    """Messages of a transcript of hh-rlhf."""
    messages = []
    for turn in transcript.split("\n\nHuman:")[1:]:
        question, *answers = turn.split("\n\nAssistant:")
        messages.append({"role": "user", "content": question.strip()})
        messages += [{"role": "assistant", "content": answer.strip()} for answer in answers]
    return messages


def pair(row):
    """Prompt, chosen and rejected response; None for transcripts that differ before the last answer."""
    if "safer_response_id" in row:
        safer = row["safer_response_id"]
        prompt = [{"role": "user", "content": row["prompt"].strip()}]
        return prompt, row[f"response_{safer}"].strip(), row[f"response_{1 - safer}"].strip()
    (before, _, chosen), (other, _, rejected) = (row[key].rpartition("\n\nAssistant:") for key in ("chosen", "rejected"))
    return (conversation(before), chosen.strip(), rejected.strip()) if before == other else None


def first_pairs(options, tokenizer):
    """The first pairs that have text and whose prompt leaves room."""
    pairs = []
    with (gzip.open if options.data.suffix == ".gz" else open)(options.data, "rt", encoding="utf-8") as lines:
        for found in map(pair, map(json.loads, lines)):
            if found is None or not all(found):
                continue
            text = tokenizer.apply_chat_template(found[0], add_generation_prompt=True, tokenize=False)
            if len(tokenizer(text, add_special_tokens=False)["input_ids"]) < options.max_length:
                pairs.append(found)
            if len(pairs) == options.pairs:
                return pairs
    sys.exit(f"{options.data} has only {len(pairs)} pairs that can be used, and {options.pairs} are asked for.")


def rows(pairs, options):
    """The pairs as the trainer of the loss takes them."""
    answer = lambda text: [{"role": "assistant", "content": text}]
    if options.loss == "dpo":
        return [{"prompt": p, "chosen": answer(c), "rejected": answer(r)} for p, c, r in pairs]
    made = []
    for start in range(0, len(pairs), options.batch_size):
        batch = pairs[start : start + options.batch_size]
        made += [{"prompt": p, "completion": answer(c), "label": True} for p, c, _ in batch]
        made += [{"prompt": p, "completion": answer(r), "label": False} for p, _, r in batch]
    return made


def tokens(dataset, options):
    """The tokens that a trainer works on, as pairs."""
    made = list(dataset)
    if options.loss == "kto":
        pairs = []
        for start in range(0, len(made), 2 * options.batch_size):
            batch = made[start : start + 2 * options.batch_size]
            half = len(batch) // 2
            pairs += [(c["prompt_ids"], c["completion_ids"], r["completion_ids"]) for c, r in zip(batch[:half], batch[half:])]
    else:
        pairs = [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in made]
    assert len(pairs) == options.pairs, "TRL has left out pairs"
    cut = lambda prompt, response: response[: options.max_length - len(prompt)]
    return [{"prompt": p, "chosen": cut(p, c), "rejected": cut(p, r)} for p, c, r in pairs]


def log_probabilities(model, pairs):
    """Of both responses of each pair, in nats; sums in f64."""
    import torch

    def of(prompt, response):
        ids = torch.tensor([prompt + response])
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].double()
        return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).sum().item()

    with torch.no_grad():
        return [[of(pair["prompt"], pair[side]) for side in ("chosen", "rejected")] for pair in pairs]


def main():
    options = arguments()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    import datasets
    import torch
    import transformers
    import trl

    torch.set_num_threads(options.threads)
    datasets.disable_progress_bars()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    data = datasets.Dataset.from_list(rows(first_pairs(options, tokenizer), options))

    class Clock(transformers.TrainerCallback):
        marks = []

        def on_train_begin(self, *_, **__):
            self.marks.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            self.marks.append(time.perf_counter())

    adapter = None
    if options.lora:
        import peft

        adapter = peft.LoraConfig(r=options.lora, lora_alpha=2 * options.lora, lora_dropout=0.0,
                                  target_modules="all-linear", task_type="CAUSAL_LM")
    trainer_class, config_class = {"dpo": (trl.DPOTrainer, trl.DPOConfig), "kto": (trl.KTOTrainer, trl.KTOConfig)}[options.loss]
    with tempfile.TemporaryDirectory() as folder:
        config = config_class(
            output_dir=folder,
            use_cpu=True,
            model_init_kwargs={"dtype": "float32"},
            bf16=options.dtype == "bf16",
            gradient_checkpointing=options.checkpointing,
            precompute_ref_log_probs=options.precompute and not options.write_tokens,
            per_device_train_batch_size=options.batch_size * (2 if options.loss == "kto" else 1),
            max_length=options.max_length,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = trainer_class(model=options.model, args=config, train_dataset=data, processing_class=tokenizer,
                                peft_config=adapter, callbacks=[Clock])
        pairs = tokens(trainer.train_dataset, options)
        digest = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
        if options.write_tokens:
            model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
            written = {"sha256": digest, "logps": log_probabilities(model, pairs), "pairs": pairs}
            options.write_tokens.write_text(json.dumps(written))
            return
        trainer.train()
    marks = Clock.marks
    print(json.dumps({
        "program": "trl", "loss": options.loss, "dtype": options.dtype, "lora": options.lora, "sha256": digest,
        "threads": torch.get_num_threads(),
        "seconds": [end - start for start, end in zip(marks, marks[1:])],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "peak_memory_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, trl)},
    }))


if __name__ == "__main__":
    main()
