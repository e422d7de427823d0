"""Compare sacpo's cache of the Hugging Face Hub with that of the Python package huggingface_hub.

    python scripts/check_hub_cache.py SACPO

SACPO is the program. A small Hub on this machine has one data set and one model of made-up content. Both programs fetch them
from it, each into a cache of its own; the caches must hold the same, and each program must read the other's when it may not
use the network. Needs huggingface_hub.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def rows(count):
    return "".join(json.dumps({"prompt": f"{n}?", "chosen": f" {n}", "rejected": f" {n + 1}"}) + "\n" for n in range(count)).encode()


REPOS = {
    "datasets/o/n": {
        "README.md": b"about", ".gitattributes": b"x",
        "data/train-00000-of-00002.jsonl": rows(40), "data/train-00001-of-00002.jsonl": rows(2),
        "data/test-00000-of-00001.jsonl": rows(3), "more/\u00e9 a.jsonl": rows(5),
    },
    "o/m": {
        "README.md": b"about", "config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": bytes(5000),
        "pytorch_model.bin": bytes(6000),
    },
}


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def git(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(content):
    return len(content) >= 1000


class Hub(BaseHTTPRequestHandler):
    """The Hub's interface and files; large files are redirected to another name of this machine."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        port = self.server.server_address[1]
        for content in (content for files in REPOS.values() for content in files.values()):
            if path == f"/content/{sha256(content)}":
                return self.answer(200, content)
        for repo, files in REPOS.items():
            interface = f"/api/{repo}" if repo.startswith("datasets/") else f"/api/models/{repo}"
            if path in [f"{interface}/revision/main", f"{interface}/revision/{COMMIT}"]:
                info = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
                return self.answer(200, json.dumps(info).encode())
            if path == f"{interface}/tree/{COMMIT}":
                tree = []
                for name, content in files.items():
                    entry = {"type": "file", "path": name, "size": len(content), "oid": git(content)}
                    if is_large(content):
                        entry["oid"] = git(sha256(content).encode())
                        entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 64}
                    tree.append(entry)
                return self.answer(200, json.dumps(tree).encode())
            name = path.removeprefix(f"/{repo}/resolve/{COMMIT}/")
            if name in files:
                content = files[name]
                headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{git(content)}"'}
                if not is_large(content):
                    return self.answer(200, content, headers)
                headers |= {"X-Linked-ETag": f'"{sha256(content)}"', "X-Linked-Size": str(len(content)),
                            "Location": f"http://localhost:{port}/content/{sha256(content)}"}
                return self.answer(302, b"", headers)
        self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})

    def answer(self, status, content, headers=None):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def held(cache):
    """What a cache holds of repositories: contents of files, targets of links."""
    found = {}
    for path in sorted(cache.rglob("*")):
        name = str(path.relative_to(cache))
        if not name.startswith((".", "CACHEDIR.TAG")) and (path.is_symlink() or path.is_file()):
            found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes()
    for name in [name for name in found if "/trees/" in name]:
        found[name] = json.loads(found[name])
    return found


def main():
    program, = sys.argv[1:]
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {name: value for name, value in os.environ.items() if not name.upper().endswith("_PROXY")}
    environment = {name: value for name, value in environment.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}", "HF_HUB_DISABLE_XET": "1",
                    "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    os.environ.clear()
    os.environ.update(environment)
    import huggingface_hub
    from huggingface_hub.errors import IncompleteSnapshotError

    def pairs(home, address, **variables):
        command = [program, "data", "stats", address, "--json"]
        variables = environment | {"HF_HOME": str(home)} | variables
        done = subprocess.run(command, env=variables, check=True, capture_output=True)
        return json.loads(done.stdout)["counts"]["rows"]

    def model(home, **variables):
        # the model is none; what is there of it is
        command = [program, "model", "inspect", "hf://o/m"]
        variables = environment | {"HF_HOME": str(home)} | variables
        return subprocess.run(command, env=variables, capture_output=True, text=True).stderr

    def snapshots(home, **options):
        cache = {"cache_dir": home / "hub", **options}
        huggingface_hub.snapshot_download("o/n", repo_type="dataset", allow_patterns=["data/train-*", "more/*"], **cache)
        weights = ["config.json", "tokenizer*", "*.safetensors"]
        return Path(huggingface_hub.snapshot_download("o/m", allow_patterns=weights, **cache))

    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder, "ours"), Path(folder, "theirs")
        for home in [ours, theirs]:
            home.mkdir()
        assert pairs(ours, "hf://datasets/o/n/data/train-*") == 42
        assert pairs(ours, "hf://datasets/o/n/more") == 5
        assert "config.json" in model(ours)
        snapshots(theirs)
        ours_held, theirs_held = held(ours / "hub"), held(theirs / "hub")
        different = {name for name in ours_held | theirs_held if ours_held.get(name) != theirs_held.get(name)}
        if different:
            sys.exit(f"the caches differ in {', '.join(sorted(different))}")
        print(f"both caches hold the same {len(ours_held)} files and links")

        found = snapshots(ours, local_files_only=True)
        assert (found / "model.safetensors").read_bytes() == REPOS["o/m"]["model.safetensors"]
        one = huggingface_hub.hf_hub_download("o/n", "data/train-00001-of-00002.jsonl", repo_type="dataset",
                                              cache_dir=ours / "hub", local_files_only=True)
        assert Path(one).read_bytes() == rows(2)
        try:
            huggingface_hub.snapshot_download("o/n", repo_type="dataset", cache_dir=ours / "hub", local_files_only=True)
            sys.exit("huggingface_hub takes the part of the data set that is there for all of it")
        except IncompleteSnapshotError:
            pass
        scanned = huggingface_hub.scan_cache_dir(ours / "hub")
        assert not scanned.warnings and len(scanned.repos) == 2, scanned
        print("huggingface_hub reads sacpo's cache")

        server.shutdown()
        server.server_close()
        offline = {"HF_HUB_OFFLINE": "1"}
        assert pairs(theirs, "hf://datasets/o/n/data/train-*", **offline) == 42
        assert pairs(theirs, "hf://datasets/o/n/more", **offline) == 5
        assert "HF_HUB_OFFLINE" not in model(theirs, **offline)
        assert pairs(theirs, f"hf://datasets/o/n@{COMMIT}/data/train-*") == 42
        print("sacpo reads huggingface_hub's cache")


if __name__ == "__main__":
    main()
