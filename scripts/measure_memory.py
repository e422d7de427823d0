#!/usr/bin/env python3
"""Measures the peak memory of trainings against what is foretold of them.

    scripts/measure_memory.py MODEL PAIRS [--steps 2] [--batch 8] [--max-length 512]

MODEL is a folder in Hugging Face's layout and PAIRS a file of preference pairs with safety labels, such as PKU-SafeRLHF's. Each
training is a process of its own; the peak is its VmHWM. The quickstart's trainings come last. Needs `cargo build --release` and
Python alone.
"""

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

SACPO = Path(__file__).resolve().parent.parent / "target/release/sacpo"

CASES = {
    "all weights, `adamw`": [],
    "all weights, `adamw`, `memory_gib = 3`": ["run.memory_gib=3"],
    "all weights, `adamw`, `memory_gib = 2.5`": ["run.memory_gib=2.5"],
    "all weights, `adamw`, `dtype = \"bf16\"`": ["train.dtype=bf16"],
    "all weights, `adamw-8bit`": ["train.optimizer=adamw-8bit"],
    "`lora_rank = 16`": ["train.lora_rank=16"],
    "`lora_rank = 16`, `memory_gib = 1`": ["train.lora_rank=16", "run.memory_gib=1"],
}


def measure(name, arguments):
    """Runs a command that trains, and prints a row of the table."""
    done = subprocess.run([SACPO, *arguments, "--json"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    units = {"MiB": 2**20, "GiB": 2**30}
    plans = re.findall(r"^ +(([\d.]+) (MiB|GiB): (.*))\.$", done.stderr, re.MULTILINE)
    foretold, plan = max((float(number) * units[unit], plan) for _, number, unit, plan in plans)
    peak = json.loads(done.stdout)["peak_memory_bytes"]
    print(f"| {name} | {plan} | {foretold / 2**20:,.0f} | {peak / 2**20:,.0f} | {foretold / peak:.3f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("pairs")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    options = parser.parse_args()
    settings = [
        f"data.max_pairs={options.steps * options.batch}",
        "data.max_validation_pairs=2",
        f"data.max_length={options.max_length}",
        f"train.batch_size={options.batch}",
    ]
    print("| training | plan | foretold, MiB | measured, MiB | ratio |\n| --- | --- | ---: | ---: | ---: |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        command = ["train", "--model", options.model, "--data", options.pairs, "--metric", "safety", "--beta", "0.1"]
        for number, (name, own) in enumerate(CASES.items()):
            sets = [part for setting in [*settings, *own] for part in ("--set", setting)]
            measure(name, [*command, "--out", f"{folder}/{number}", *sets])
        measure("quickstart", ["quickstart", "--size", "small", "--out", f"{folder}/quickstart"])


if __name__ == "__main__":
    main()
