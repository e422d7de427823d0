#!/usr/bin/env python3
"""Trains on the same tokens with sacpo and with TRL, in turns, and makes the table of docs/performance.md.

    python -m venv venv && venv/bin/pip install -r scripts/requirements.txt
    benches/peers/compare.py --python venv/bin/python --model MODEL_DIR \\
        --data pku=PKU.jsonl.gz --data hh=HH.jsonl.gz --results runs/peers.jsonl --write docs/performance.md

Needs Python alone; --python is one that has TRL. TRL makes the tokens, which both train on in the same batches; that they are the same
and that both programs give their responses the same log-probabilities before the first step is checked. Each turn is a process
of its own, whose first step is not counted. A result is appended to the file as soon as it is there, and what the file has is not
measured again: a comparison that was stopped goes on. After a change of a
program take another file. --only takes some of the comparisons, --dry-run says what would be done.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

# glibc then keeps freed memory, for which PyTorch would otherwise go to the system at every step
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "4000000000"}


# options and environment of TRL by the name of the setting
TRL = {
    "best": (["--precompute"], {}),
    "best, malloc set": (["--precompute"], KEEP_MEMORY),
    "defaults": (["--checkpointing"], {}),
}
BEST = ["best", "best, malloc set"]


@dataclass
class Comparison:
    text: str
    both: list  # options of both programs
    trl: list  # the settings of TRL that sacpo is compared with
    seconds_per_pair: float  # of TRL on two cores, for the estimate


COMPARISONS = {
    "dpo-f32": Comparison("DPO in f32", ["--loss", "dpo", "--dtype", "f32"], BEST, 5),
    "dpo-bf16": Comparison("DPO in bf16", ["--loss", "dpo", "--dtype", "bf16"], [*BEST, "defaults"], 4),
    "kto-f32": Comparison("KTO in f32", ["--loss", "kto", "--dtype", "f32"], BEST, 10),
    "kto-bf16": Comparison("KTO in bf16", ["--loss", "kto", "--dtype", "bf16"], BEST, 8),
    "lora-f32": Comparison("DPO of LoRA in f32", ["--loss", "dpo", "--dtype", "f32", "--lora", "16"], BEST, 6),
    "lora-bf16": Comparison("DPO of LoRA in bf16", ["--loss", "dpo", "--dtype", "bf16", "--lora", "16"], BEST, 5),
}

OURS = "sacpo"
OURS_PER_PAIR = 1.3
START = 25  # seconds until a process trains
LOGPS_TOLERANCE = {"f32": (0.01, 0), "bf16": (0.5, 0.01)}  # nats a response, and a share of its log-probability
MARKS = ("<!-- peers: made by benches/peers/compare.py -->", "<!-- /peers -->")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="a Python that has TRL")
    parser.add_argument("--model", required=True, type=Path, help="folder in Hugging Face's layout")
    parser.add_argument("--data", required=True, action="append", metavar="NAME=FILE")
    parser.add_argument("--results", required=True, type=Path, help="JSON lines; what is there is not measured again")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(COMPARISONS), metavar="NAME,…",
                        help=f"of {', '.join(COMPARISONS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn that are counted, after one that is not")
    parser.add_argument("--batch-size", type=int, default=8, help="pairs a step")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between the marks of this file")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    for name in options.only:
        if name not in COMPARISONS:
            parser.error(f"there is no comparison {name!r}; there are {', '.join(COMPARISONS)}")
    options.data = dict(entry.partition("=")[::2] for entry in options.data)
    for path in [options.model, *map(Path, options.data.values())]:
        if not path.exists() or path == Path():
            parser.error(f"there is no {path}; --model is a folder, and --data has the form NAME=FILE")
    options.model = options.model.resolve()
    return options


def last_json(command, **kwargs):
    """Runs a program and reads the last line that it prints."""
    done = subprocess.run(command, capture_output=True, text=True, **kwargs)
    if done.returncode:
        sys.exit(f"{done.stderr}\n{' '.join(map(str, command))} ended with exit code {done.returncode}.")
    lines = done.stdout.splitlines()
    return json.loads(lines[-1]) if lines else None


def trl(options, data, more, env):
    command = [options.python, Path(__file__).with_name("trl_train.py"), "--model", options.model, "--data", data,
               "--pairs", str(options.batch_size * (options.steps + 1)), "--batch-size", str(options.batch_size),
               "--max-length", str(options.max_length), "--threads", str(options.threads), *more]
    return last_json(command, env=os.environ | env)


def ours(options, tokens, more):
    return last_json(["cargo", "bench", "-q", "-p", "sacpo-align", "--bench", "preference_training", "--",
                      "--model", options.model, "--tokens", tokens, "--batch-size", str(options.batch_size),
                      "--threads", str(options.threads), *more], cwd=ROOT)


def check(name, tokens, result):
    """The program has worked on these tokens, and its policy was TRL's model before the first step."""
    if result["program"] == "trl":
        if result["sha256"] != tokens["sha256"]:
            sys.exit(f"{name}: TRL trained on other tokens than those that it wrote.")
        return
    nats, share = LOGPS_TOLERANCE[result["dtype"]]
    for row, (a, b) in enumerate(zip(result["logps"], tokens["logps"], strict=True)):
        for side, x, y in zip(("chosen", "rejected"), a, b):
            tolerance = nats + share * abs(y)
            if not abs(x - y) <= tolerance:
                sys.exit(f"{name}: the {side} response of pair {row} has the log-probability {x} by sacpo and {y} by TRL's "
                         f"model, more than {tolerance:.3f} apart.")


def turns(options):
    """All that is to be measured, in this order: data, round, comparison, and sacpo or a setting of TRL."""
    for data in options.data:
        for number in range(options.rounds):
            for name in options.only:
                programs = [OURS, *COMPARISONS[name].trl]
                yield from ((data, number, name, program) for program in (reversed(programs) if number % 2 else programs))


def measure(options, have):
    """Makes all turns that `have` lacks and adds them to it and to the file."""
    wanted = list(turns(options))
    missing = [turn for turn in wanted if turn not in have]
    pairs = options.batch_size * (options.steps + 1)
    each = [OURS_PER_PAIR if program == OURS else COMPARISONS[name].seconds_per_pair for _, _, name, program in missing]
    print(f"{len(missing)} of {len(wanted)} turns are to be measured: about "
          f"{sum(START + pairs * seconds for seconds in each) / 60:.0f} minutes on two cores.", file=sys.stderr)
    if options.dry_run:
        return
    options.results.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, options.results.open("ab", buffering=0) as results:
        written = {}
        for done, turn in enumerate(missing):
            data, _, name, program = turn
            start = time.monotonic()
            print(f"{done + 1}/{len(missing)} {data} {name} {program}: ", end="", file=sys.stderr, flush=True)
            if data not in written:
                path = Path(folder) / f"{data}.json"
                trl(options, options.data[data], ["--write-tokens", path], {})
                written[data] = path, json.loads(path.read_text())
            path, tokens = written[data]
            both = COMPARISONS[name].both
            if program == OURS:
                result = ours(options, path, both)
            else:
                more, env = TRL[program]
                result = trl(options, options.data[data], both + more, env)
            check(f"{name} on {data}", tokens, result)
            have[turn] = result
            line = {"turn": turn, "settings": settings(options, data), "result": result}
            results.write(f"{json.dumps(line)}\n".encode())  # one write, so that a kill leaves whole lines
            print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)


def settings(options, data):
    """What a result must have been measured with to be in the table."""
    keys = ("model", "steps", "batch_size", "max_length", "threads")
    return {"data": options.data.get(data)} | {key: str(getattr(options, key)) for key in keys}


def table(options, have):
    """Markdown, a row for each setting of TRL: medians over the counted steps of all rounds, memory at most."""
    lines = ["| data | comparison | TRL | tokens a step | TRL, pairs/s | sacpo, pairs/s | ratio | TRL, memory | sacpo, memory | ratio "
             "| share of the peak |",
             "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for data in options.data:
        for name in options.only:
            of = lambda program: [result for turn, result in have.items() if (turn[0], *turn[2:]) == (data, name, program)]
            counted = lambda results, key: statistics.median(value for result in results for value in result[key][1:])
            rate = lambda results: options.batch_size / counted(results, "seconds")
            memory = lambda results: max(result["peak_memory_bytes"] for result in results) / 2**30
            for setting in COMPARISONS[name].trl:
                mine, theirs = of(OURS), of(setting)
                if not (mine and theirs):
                    continue
                shares = [result["utilisation"] for result in mine if result["utilisation"] is not None]
                share = f"{100 * statistics.median(shares):.0f} %" if shares else ""
                lines.append(f"| {data} | {COMPARISONS[name].text} | {setting} | {counted(mine, 'tokens'):,.0f} "
                             f"| {rate(theirs):.3f} | {rate(mine):.3f} | {rate(mine) / rate(theirs):.1f} × "
                             f"| {memory(theirs):.1f} GiB | {memory(mine):.1f} GiB | {memory(mine) / memory(theirs):.2f} × | {share} |")
    return "\n".join(lines)


def main():
    options = arguments()
    have = {}
    if options.results.exists():
        lines = map(json.loads, options.results.read_text().splitlines())
        have = {tuple(line["turn"]): line["result"] for line in lines if line["settings"] == settings(options, line["turn"][0])}
    measure(options, have)
    if options.dry_run:
        return
    made = table(options, have)
    if options.write is None:
        print(made)
        return
    text = options.write.read_text()
    (before, found, rest), (_, end, after) = text.partition(MARKS[0]), text.partition(MARKS[1])
    if not (found and end):
        sys.exit(f"{options.write} lacks the marks {MARKS[0]} and {MARKS[1]}.")
    options.write.write_text(f"{before}{MARKS[0]}\n\n{made}\n\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
