"""Compare what sacpo reads from Parquet and compressed files that pyarrow and datasets write with the same rows as JSON lines.

    python scripts/check_files_with_pyarrow.py SACPO MODEL

SACPO is the program and MODEL a small model with a chat template. `sacpo logps` of conversations must be the same text for
every file, and so must `sacpo loss` of rows of numbers. Needs pyarrow, datasets and the command `zstd`.
"""

import decimal
import gzip
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet

CODECS = ["none", "snappy", "gzip", "zstd"]

# columns of types that no format has, which must do no harm
OTHERS = {
    "nanoseconds": pyarrow.array([1, None], pyarrow.timestamp("ns")),
    "milliseconds": pyarrow.array([1, None], pyarrow.timestamp("ms", tz="UTC")),
    "date": pyarrow.array([1, None], pyarrow.date32()),
    "time": pyarrow.array([1, None], pyarrow.time32("ms")),
    "duration": pyarrow.array([1, None], pyarrow.duration("us")),
    "decimal": pyarrow.array([decimal.Decimal("1.20"), None]),
    "binary": pyarrow.array([b"\xff", None]),
    "fixed": pyarrow.array([b"ab", None], pyarrow.binary(2)),
    "half": pyarrow.array([1, float("nan")], pyarrow.float16()),
    "map": pyarrow.array([[("key", 1)], None], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
    "nothing": pyarrow.nulls(2),
    "categories": pyarrow.array(["a", "b"]).dictionary_encode(),
    "nested": pyarrow.array([[[1], []], None]),
    "struct": pyarrow.array([{"x": None, "y": [{"z": 1}]}, None]),
}


def conversations(count):
    """Rows with the columns of UltraFeedback-binarized; the texts are made up."""
    rows = []
    for number in range(count):
        question = {"content": f"What comes after {number}? é\n", "role": "user"}
        chosen, rejected = ([question, {"content": text, "role": "assistant"}] for text in (f"{number + 1}.", "Zürich…"))
        rows.append({
            "prompt": question["content"], "prompt_id": f"{number:04x}", "chosen": chosen, "rejected": rejected,
            "messages": chosen, "score_chosen": 8.5, "score_rejected": None if number % 3 == 0 else 2.0,
        })
    return rows


def numbers(count):
    columns = ["policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected"]
    return [{column: -1.5 * number - at / 7 for at, column in enumerate(columns)} for number in range(count)]


def write(rows, folder):
    """The rows in every kind of file; the first is JSON lines."""
    plain = folder / "rows.jsonl"
    text = "".join(json.dumps(row) + "\n" for row in rows)
    plain.write_text(text)
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    subprocess.run(["zstd", "-q", "--long=27", "-19", plain, "-o", folder / "rows.jsonl.zst"], check=True)
    table = pyarrow.Table.from_pylist(rows)
    for codec in CODECS:
        for version in ["1.0", "2.0"]:
            pyarrow.parquet.write_table(table, folder / f"{codec}-{version}.parquet", compression=codec,
                                        row_group_size=7, data_page_size=300, data_page_version=version)
    pyarrow.parquet.write_table(table, folder / "plain.parquet", use_dictionary=False, write_statistics=False)
    pyarrow.parquet.write_table(table, folder / "old-lists.parquet", use_compliant_nested_type=False)
    large = table.cast(pyarrow.schema([
        (field.name, pyarrow.large_string() if field.type == pyarrow.string() else field.type) for field in table.schema
    ]))
    pyarrow.parquet.write_table(large, folder / "large.parquet")
    others = table
    for name, values in OTHERS.items():
        values = pyarrow.concat_arrays([values] * -(-len(rows) // len(values)))
        others = others.append_column(name, values.slice(0, len(rows)))
    pyarrow.parquet.write_table(others, folder / "other-types.parquet")
    dataset = datasets.Dataset.from_list(rows)
    dataset.to_parquet(folder / "datasets.parquet")
    shards = folder / "shards"
    shards.mkdir()
    for shard in range(3):
        dataset.shard(3, shard, contiguous=True).to_parquet(shards / f"train-{shard:05}-of-00003.parquet")
    files = sorted(path for path in folder.iterdir() if path != plain)
    return [plain, *files, shards / "train-*.parquet"]


def main():
    program, model = sys.argv[1:]
    datasets.disable_progress_bars()

    def output(*arguments):
        return subprocess.run([program, *map(str, arguments), "--json"], check=True, capture_output=True).stdout

    for what, rows, command in [
        ("conversations", conversations(20), lambda path: output("logps", "--model", model, "--data", path)),
        ("numbers", numbers(200), lambda path: output("loss", "--objective", "dpo", "--beta", "0.1", path)),
    ]:
        with tempfile.TemporaryDirectory() as folder:
            plain, *files = write(rows, Path(folder))
            expected = command(plain)
            different = [path.name for path in files if command(path) != expected]
            if different:
                sys.exit(f"{what}: not as from JSON lines: {', '.join(different)}")
            print(f"{what}: {len(rows)} rows are the same from JSON lines and {len(files)} others")


if __name__ == "__main__":
    main()
