#!/usr/bin/env python3
"""Measures what a sweep of one step costs against its parts: step 1, and each value of step 2 by itself.

    scripts/measure_sweep.py RECIPE [--runs 3] [--set KEY=VALUE]…

The recipe's last step has a list of `beta_over_lambda`. For every measurement the whole recipe runs in a fresh folder; then step 1
alone does; then each value alone, in a folder where step 1 is complete and the reference log-probabilities of step 2 are there,
so that nothing of it but training and ranking is left. The three take turns. Needs `cargo build --release` and Python alone.
"""

import argparse
import shutil
import statistics
import subprocess
import tempfile
import time
import tomllib
from pathlib import Path

SACPO = Path(__file__).resolve().parent.parent / "target/release/sacpo"


def run(recipe, out, settings):
    """Seconds of a run."""
    command = [SACPO, "run", recipe, *(part for value in [f"run.out={out}", *settings] for part in ("--set", value))]
    start = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.monotonic() - start


def first_step(recipe, folder):
    """The recipe up to the end of its first step, as a file."""
    lines = recipe.read_text().splitlines()
    starts = [i for i, line in enumerate(lines) if line.strip().startswith("[[step]]")]
    rest = next((i for i in range(starts[1] + 1, len(lines)) if lines[i].startswith("[")), len(lines))
    path = folder / "first.toml"
    path.write_text("\n".join(lines[: starts[1]] + lines[rest:]))
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], dest="settings")
    options = parser.parse_args()
    values = tomllib.loads(options.recipe.read_text())["step"][-1]["beta_over_lambda"]
    whole, first, alone = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        start = first_step(options.recipe, folder)
        for number in range(options.runs):
            sweep, single = folder / f"sweep{number}", folder / f"single{number}"
            whole.append(run(options.recipe, sweep, options.settings))
            first.append(run(start, single, options.settings))
            (single / "manifest.json").unlink()
            shutil.rmtree(single / "cache")
            shutil.copytree(sweep / "cache", single / "cache")
            alone.append(
                [run(options.recipe, single, [*options.settings, f"step.2.beta_over_lambda={v}"]) for v in values]
            )
            parts = first[-1] + sum(alone[-1])
            print(
                f"sweep {whole[-1]:.1f} s; step 1 {first[-1]:.1f} s, then "
                f"{', '.join(f'{seconds:.1f}' for seconds in alone[-1])} s: together {parts:.1f} s"
            )
    ratio = [a / (b + sum(c)) for a, b, c in zip(whole, first, alone)]
    print(f"the sweep takes {statistics.median(ratio):.3f} of its parts without reference passes (median)")


if __name__ == "__main__":
    main()
