#!/usr/bin/env python3
"""Check what TensorBoard and an MLflow server get of trainings, against metrics.jsonl, in a run that is killed and goes on.

    python scripts/check_tracking.py [--mlflow MLFLOW_COMMAND]

Starts a real MLflow server on loopback with a free port, runs two steps on the quickstart's data with it, kills them in the
first, and runs them again. Then the server, and the `tensorboard` package, must know every number of every step once. Takes a minute or two.
Needs `cargo build --release`, and the packages tensorboard and mlflow, which may be in an environment of its own.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SACPO = Path(__file__).resolve().parent.parent / "target/release/sacpo"


def check(what, holds):
    print(f"{'ok  ' if holds else 'FAIL'} {what}")
    if not holds:
        sys.exit(1)


class Server:
    def __init__(self, command, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.start = [command, "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
                      "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/artifacts"]
        self.log = open(f"{folder}/server.log", "w")
        self.process = None

    def __enter__(self):
        self.process = subprocess.Popen(self.start, stdout=self.log, stderr=self.log, start_new_session=True)
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=2)
                return self
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        sys.exit("The MLflow server does not start.")

    def __exit__(self, *_):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def call(self, path, body=None, **query):
        url = f"{self.url}/api/2.0/mlflow/{path}?{urllib.parse.urlencode(query)}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request, timeout=30))

    def runs(self, experiment):
        found = self.call("experiments/get-by-name", experiment_name=experiment)["experiment"]["experiment_id"]
        return self.call("runs/search", {"experiment_ids": [found], "max_results": 100})["runs"]

    def history(self, run_id, key):
        history, token = [], {}
        while True:
            page = self.call("metrics/get-history", run_id=run_id, metric_key=key, max_results=1000, **token)
            history += page["metrics"]
            if not page.get("next_page_token"):
                return history
            token = {"page_token": page["next_page_token"]}


def lines(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    numbers = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and value is not None:
                numbers.setdefault(name, []).append((row["step"], value))
    return numbers


def recipe(scratch):
    """A small chain of two steps on the quickstart's model and data."""
    made = Path(scratch, "quickstart")
    subprocess.run([SACPO, "quickstart", "--size", "small", "--out", made], check=True, capture_output=True)
    path = Path(scratch, "recipe.toml")
    path.write_text(f"""
        [model]
        base = "{made}/base"
        [data]
        max_length = 64
        max_pairs = 400
        [train]
        batch_size = 8
        save_every = 20
        validate_every = 25
        [[step]]
        metric = "helpfulness"
        data = "{made}/data/helpfulness.jsonl"
        beta = 1.0
        [[step]]
        metric = "safety"
        data = "{made}/data/safety.jsonl"
        beta_over_lambda = 0.5
    """)
    return path


def train(recipe, out, environment):
    command = [SACPO, "run", recipe, "--set", f"run.out={out}"]
    return subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--mlflow", default="mlflow")
    arguments = parser.parse_args()
    scratch = tempfile.TemporaryDirectory()
    out = Path(scratch.name, "run")
    made = recipe(scratch.name)
    with Server(arguments.mlflow, scratch.name) as server:
        environment = {"MLFLOW_TRACKING_URI": server.url, "MLFLOW_EXPERIMENT_NAME": "small world"}
        process = train(made, out, environment)
        # after a state was saved, and steps were taken that it does not have
        state_of = lambda: next(out.glob("steps/*/*state*"), None)
        while process.poll() is None and not state_of():
            time.sleep(0.005)
        time.sleep(0.1)
        process.kill()
        process.wait()
        first = next(out.glob("steps/*"))
        check("killed in a training, after a state was saved", not (first / "policy.json").exists())
        before = len((first / "metrics.jsonl").read_text().splitlines())
        process = train(made, out, environment)
        stderr = process.communicate()[1]
        check("the same command ends the run", process.returncode == 0)
        if "Continues after step" not in stderr:
            print(stderr)
        check("it has gone on from a saved state", "Continues after step" in stderr)

        steps = sorted(path.parent for path in out.glob("steps/*/metrics.jsonl"))
        runs = server.runs("small world")
        check(f"{len(runs)} runs for {len(steps)} trainings", sorted(r["info"]["run_name"] for r in runs) == [s.name for s in steps])
        for run in runs:
            folder = out / "steps" / run["info"]["run_name"]
            check(f"{folder.name} is FINISHED", run["info"]["status"] == "FINISHED")
            parameters = {p["key"]: p["value"] for p in run["data"]["params"]}
            check(f"  its parameters {parameters}", parameters["objective"] == "dpo" and parameters["metric"] != "")
            numbers = lines(folder)
            for name, expected in numbers.items():
                points = server.history(run["info"]["run_id"], name)
                points = sorted((int(point["step"]), point["value"]) for point in points)
                if name == "seconds":  # of steps that were taken twice
                    points, expected = ([step for step, _ in p] for p in (points, expected))
                if points != expected:
                    print(name, len(points), len(expected), points[:3], expected[:3])
                check(f"  MLflow has all {len(expected)} of {name} once", points == expected)

        # without the server a training is refused before it begins, but what is complete needs none
        environment["MLFLOW_TRACKING_URI"] = "http://127.0.0.1:9"
        check("a finished run needs no server", train(made, out, environment).wait() == 0)
        process = train(made, Path(scratch.name, "other"), environment)
        check("a server that is away is named", "127.0.0.1:9" in process.communicate()[1] and process.returncode == 2)

        # the server goes away in a training, which ends all the same
        environment["MLFLOW_TRACKING_URI"] = server.url
        process = train(made, Path(scratch.name, "third"), environment)
        while process.poll() is None and not list(Path(scratch.name, "third").glob("steps/*/metrics.jsonl")):
            time.sleep(0.005)
        server.__exit__()
        stderr = process.communicate()[1]
        check("a training that loses its server says so", "does not take what is sent" in stderr)

    killed = max(len(list(folder.glob("*tfevents*"))) for folder in steps)
    check(f"the training that was killed after {before} steps has {killed} event files", killed == 2)
    for folder in steps:
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=True)
        events.Reload()
        for name, expected in lines(folder).items():
            tag = f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"
            points = [(event.step, event.value) for event in events.Scalars(tag)]
            check(f"TensorBoard has all {len(expected)} of {folder.name}'s {tag}", points == [(s, np.float32(v)) for s, v in expected])


main()
