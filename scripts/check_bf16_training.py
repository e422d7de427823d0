#!/usr/bin/env python3
"""Whether training in bf16 is training in f32: the same steps in both, by several seeds.

    scripts/check_bf16_training.py --model models/SmolLM2-135M-Instruct --data PAIRS.jsonl.gz --metric harmlessness --out runs/precision

A seed decides the order of the pairs. For each seed a model is trained in f32 and in bf16 (`sacpo train`), the loss is averaged over
windows of steps, and the largest difference of the two curves is compared with how far the curves of different seeds in f32 are
apart. The accuracy on held-out pairs is compared alike. Exits with 1 if bf16 is further from f32 than seeds from each other.

Runs that are complete are read, not made again, so it can be stopped.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sacpo", default="target/release/sacpo")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--metric", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--window", type=int, default=20, help="steps that are averaged")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--set", action="append", default=[], help="a key of the recipe, such as train.learning_rate=2e-5")
    args = parser.parse_args()

    curves, accuracies, seconds = {}, {}, {}
    for seed, dtype in itertools.product(range(args.seeds), ("f32", "bf16")):
        steps, accuracy = train(args, seed, dtype)
        losses = [step["loss"] for step in steps]
        windows = range(0, len(losses) - args.window + 1, args.window)
        curves[seed, dtype] = [statistics.fmean(losses[at : at + args.window]) for at in windows]
        accuracies[seed, dtype] = accuracy
        seconds[seed, dtype] = sum(step["seconds"] for step in steps)

    apart = lambda a, b: max(abs(x - y) for x, y in zip(curves[a], curves[b]))
    seeds = range(args.seeds)
    of_precision = [apart((seed, "f32"), (seed, "bf16")) for seed in seeds]
    of_seeds = [apart((a, "f32"), (b, "f32")) for a, b in itertools.combinations(seeds, 2)]
    accuracy_of_precision = [abs(accuracies[seed, "f32"] - accuracies[seed, "bf16"]) for seed in seeds]
    accuracy_of_seeds = [abs(accuracies[a, "f32"] - accuracies[b, "f32"]) for a, b in itertools.combinations(seeds, 2)]

    print("| seed | precision | loss, first window | last | held-out accuracy | seconds |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for (seed, dtype), curve in curves.items():
        accuracy, took = accuracies[seed, dtype], seconds[seed, dtype]
        print(f"| {seed} | {dtype} | {curve[0]:.4f} | {curve[-1]:.4f} | {accuracy:.3f} | {took:.0f} |")
    show = lambda values: ", ".join(f"{value:.4f}" for value in values)
    print(f"\nLargest difference of the curves, bf16 against f32 by seed: {show(of_precision)}; f32 between seeds: {show(of_seeds)}.")
    print(f"Accuracies, likewise: {show(accuracy_of_precision)}; {show(accuracy_of_seeds)}.")
    if max(of_precision) > min(of_seeds):
        sys.exit("The curves in bf16 are further from those in f32 than seeds are from each other.")


def train(args: argparse.Namespace, seed: int, dtype: str) -> tuple[list[dict], float]:
    """The steps of a training, and its accuracy on held-out pairs."""
    out = args.out / f"{dtype}-{seed}"
    settings = {
        "run.seed": seed,
        "train.dtype": dtype,
        "train.batch_size": args.batch_size,
        "data.max_pairs": args.batch_size * args.steps,
        "data.max_validation_pairs": args.held_out,
    }
    command = [args.sacpo, "train", "--model", args.model, "--data", args.data, "--metric", args.metric, "--beta", "0.1",
               "--out", str(out), "--json"]
    for setting in [f"{key}={value}" for key, value in settings.items()] + args.set:
        command += ["--set", setting]
    print(f"{dtype}, seed {seed}", file=sys.stderr)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    metrics = next(out.glob("steps/*/metrics.jsonl")).read_text()
    policies = json.loads((out / "results.json").read_text())["policies"]
    return [json.loads(line) for line in metrics.splitlines()], next(iter(policies[-1]["validation"].values()))["accuracy"]


if __name__ == "__main__":
    main()
