#!/usr/bin/env python3
"""Greedy generation by transformers' `generate`, the peer of this crate's own.

    python crates/engine/benches/peer_generate.py --model MODEL_FOLDER --threads 2 --dtype bf16

Driven by lines on standard input, so that another program can take turns with it: each line is one request,

    {"prompts": [[token, …], …], "new_tokens": N}

whose prompts have the same length, so that nothing is padded. It is answered with one line, {"seconds": of `generate`,
"tokens": [[the N new tokens], …]}. No token ends an answer. A line with `"ready": true` comes first.
"""

import argparse
import json
import os
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32", help="of weights and computation")
    options = parser.parse_args()

    import torch
    import transformers

    torch.set_num_threads(options.threads)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    versions = {module.__name__: module.__version__ for module in (torch, transformers)}
    print(json.dumps({"ready": True, "threads": torch.get_num_threads()} | versions), flush=True)

    for line in sys.stdin:
        request = json.loads(line)
        prompts, new_tokens = torch.tensor(request["prompts"]), request["new_tokens"]
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                max_new_tokens=new_tokens,
                pad_token_id=0,
            )
        seconds = time.perf_counter() - start
        tokens = out[:, prompts.shape[1] :].tolist()
        assert all(len(row) == new_tokens for row in tokens)
        print(json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main()
