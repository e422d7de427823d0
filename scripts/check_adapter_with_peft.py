#!/usr/bin/env python3
"""Check that PEFT loads an adapter that sacpo wrote and gives the log-probs that sacpo gives.

    python scripts/check_adapter_with_peft.py ADAPTER PAIRS.jsonl LOGPS.json
    python scripts/check_adapter_with_peft.py --randomise ADAPTER

ADAPTER is a folder of `sacpo model add-adapter`; its base must have a chat template. PAIRS.jsonl has rows
{"prompt": text, "chosen": text, "rejected": text} whose texts become chat messages, and LOGPS.json is what
`sacpo logps --model ADAPTER --data … --template-tail keep --json` prints for the same rows as messages; `--messages`
instead of LOGPS.json writes them, to standard output. A fresh adapter changes nothing, which proves nothing:
`--randomise` gives it random values first.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from transformers.utils import logging

from fixture_tools import next_token_logps
from make_smollm2_logps_fixture import tokenise

BAR = 1e-5  # relative


def randomise(folder: Path) -> None:
    """B normal with deviation 0.02, DoRA's lengths between 0.9 and 1.1 of what they were."""
    path = folder / "adapter_model.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(path)
    for name, weight in sorted(tensors.items()):
        if name.endswith("lora_magnitude_vector"):
            weight.mul_(0.9 + 0.2 * torch.rand(weight.shape, generator=generator))
        elif name.endswith("lora_B.weight"):
            weight.copy_(0.02 * torch.randn(weight.shape, generator=generator))
    save_file(tensors, path, metadata={"format": "pt"})


def as_messages(row: dict) -> dict:
    answer = lambda text: [{"role": "assistant", "content": text}]
    prompt = [{"role": "user", "content": row["prompt"]}]
    return {"prompt": prompt, "chosen": answer(row["chosen"]), "rejected": answer(row["rejected"])}


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "--randomise":
        return randomise(Path(sys.argv[2]))
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    adapter, pairs, logps = sys.argv[1:]
    rows = [as_messages(json.loads(line)) for line in Path(pairs).read_text().splitlines()]
    if logps == "--messages":
        return print("\n".join(json.dumps(row) for row in rows))
    logging.disable_progress_bar()
    ours = json.loads(Path(logps).read_text())["rows"]
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model.peft_config["default"].base_model_name_or_path)
    worst, moved = 0.0, 0.0
    for row, given in zip(rows, ours, strict=True):
        for response in given["responses"]:
            prompt, completion = tokenise(tokenizer, row["prompt"], row[response["role"]][0]["content"])
            ids = prompt + completion

            def logp() -> float:
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
                return next_token_logps(logits, ids)[len(prompt) - 1 :].sum().item()

            theirs = logp()
            with model.disable_adapter():
                moved = max(moved, abs(theirs / logp() - 1))
            assert len(completion) == response["tokens"], "the two read the row differently"
            worst = max(worst, abs(response["logp"] / theirs - 1))
    print(f"{2 * len(rows)} responses: largest relative difference {worst:.1e}; the adapter moves them by up to {moved:.1e}")
    if worst > BAR:
        sys.exit(f"more than {BAR}")


if __name__ == "__main__":
    main()
