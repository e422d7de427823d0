#!/usr/bin/env python3
"""Check that transformers loads a reward or cost model that sacpo wrote and gives the scores that sacpo gives.

    python scripts/check_reward_model_with_transformers.py MODEL VERDICTS.jsonl A.jsonl B.jsonl

MODEL is the checkpoint of `sacpo train reward` or `sacpo train cost`; its tokenizer must have a chat template. A.jsonl and
B.jsonl hold answers, rows {"prompt": text, "answer": text}, and VERDICTS.jsonl is what
`sacpo judge A.jsonl B.jsonl --reward-model MODEL --metric m --out VERDICTS.jsonl` writes (or `--cost-model`, whose scores
are costs times −1). Here the texts are tokenised by AutoTokenizer and scored by AutoModelForSequenceClassification in
float32, in padded batches, so the padding token of the model's files must be right too.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

BAR = 1e-4  # of the largest score
BATCH = 8


def rows(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def main() -> None:
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    folder, verdicts, a, b = sys.argv[1:]
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, report = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert model.config.num_labels == 1 and model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    kind = json.loads((Path(folder) / "provenance.json").read_text())["kind"]
    sign = -1.0 if kind == "cost" else 1.0

    texts, expected = [], []
    for verdict, *answers in zip(rows(verdicts), rows(a), rows(b), strict=True):
        for answer, score in zip(answers, verdict["scores"], strict=True):
            assert answer["prompt"] == verdict["prompt"]
            messages = [{"role": "user", "content": answer["prompt"]}, {"role": "assistant", "content": answer["answer"]}]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            # up to the end of the answer; what the template writes behind it is not read
            texts.append(text[: text.rindex(tokenizer.eos_token) + len(tokenizer.eos_token)])
            expected.append(score)

    found = []
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(texts[start : start + BATCH], padding=True, add_special_tokens=False, return_tensors="pt")
        with torch.inference_mode():
            found += (sign * model(**batch).logits[:, 0]).tolist()
    difference = max(abs(x - y) for x, y in zip(found, expected, strict=True))
    largest = max(map(abs, expected))
    print(f"{kind} model, {len(found)} answers, scores up to {largest:.4g}: largest difference {difference:.2e}")
    assert difference < BAR * largest


if __name__ == "__main__":
    main()
