"""Compare what sacpo reads from Parquet and compressed files that pyarrow and datasets write, and what these read from those
that sacpo writes, with the same rows as JSON lines.

    python scripts/check_files_with_pyarrow.py SACPO MODEL

SACPO is the program and MODEL a small model with a chat template. `sacpo logps` of conversations must be the same text for
every file, and so must `sacpo loss` of rows of numbers. What `sacpo data convert` writes as Parquet must have typed columns and
the rows that it writes as JSON lines, to pyarrow, datasets and pandas. Needs pyarrow, datasets and the command `zstd`.
"""

import decimal
import gzip
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
import pandas
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


MESSAGES = pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))

# rows for `data convert`, what they are written as, and the columns of that
CONVERSIONS = [
    (conversations(20), "trl", {"prompt": MESSAGES, "chosen": MESSAGES, "rejected": MESSAGES}),
    ([{"chosen": f"\n\nHuman: \"{i}\"?\n\nAssistant: é", "rejected": f"\n\nHuman: \"{i}\"?\n\nAssistant: ß"} for i in range(9)],
     "hh", {"chosen": pyarrow.string(), "rejected": pyarrow.string()}),
    (conversations(20), "unpaired", {"prompt": MESSAGES, "completion": MESSAGES, "label": pyarrow.bool_()}),
    (conversations(20), "prompts", {"prompt": MESSAGES}),
    ([{"prompt": "é\n \"", "chosen": " a\0b", "rejected": "c"},
      {"prompt": "p", "chosen": "d", "rejected": "e", "safe_chosen": True, "safe_rejected": False, "margin": -0.1}],
     "trl",
     {"prompt": pyarrow.string(), "chosen": pyarrow.string(), "rejected": pyarrow.string(), "safe_chosen": pyarrow.bool_(),
      "safe_rejected": pyarrow.bool_(), "margin": pyarrow.float64()}),
    ([{"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 1}], "pku",
     {"prompt": pyarrow.string(), "response_0": pyarrow.string(), "response_1": pyarrow.string(),
      "better_response_id": pyarrow.int64()}),
]


def check_written(program, rows, to, columns, folder):
    """What other programs read from a Parquet file of sacpo's; returns the names of those that read something else."""
    plain = folder / "rows.jsonl"
    plain.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for out in ("out.jsonl", "out.parquet"):
        subprocess.run([program, "data", "convert", plain, folder / out, "--to", to], check=True, capture_output=True)
    lines = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    expected = [{name: line.get(name) for name in columns} for line in lines]
    table = pyarrow.parquet.read_table(folder / "out.parquet")
    frame = pandas.read_parquet(folder / "out.parquet", dtype_backend="pyarrow")
    read = {
        "pyarrow": table.to_pylist(),
        "datasets": datasets.Dataset.from_parquet(str(folder / "out.parquet"), cache_dir=folder / "cache").to_list(),
        "pandas": pyarrow.Table.from_pandas(frame).to_pylist(),
    }
    assert {field.name: field.type for field in table.schema} == columns, table.schema
    return [name for name, found in read.items() if found != expected]


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
    for rows, to, columns in CONVERSIONS:
        with tempfile.TemporaryDirectory() as folder:
            different = check_written(program, rows, to, columns, Path(folder))
            if different:
                sys.exit(f"written as {to}: not as in JSON lines: {', '.join(different)}")
            print(f"written as {to}: {len(rows)} rows, the same in Parquet as in JSON lines")


if __name__ == "__main__":
    main()
