#!/usr/bin/env python3
"""Write adapters as PEFT saves them, on the tiny models, and what transformers with PEFT computes with them.

    python scripts/make_lora_fixture.py crates/engine/tests/fixtures/tiny crates/engine/tests/fixtures/lora

Each adapter is a folder as `save_pretrained` writes it (without its README.md, and with a relative path to the base),
whose factors A, B and m have random values of a fixed seed, and an `expected.json` beside them (float32):

    sequences   [prompt, response], token ids
    logps       log-probability of each response after its prompt
    d_logps     the weights of a sum of these log-probabilities
    gradients   for each factor, by its name in the file, the norm and the first values of the sum's derivative
"""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from transformers import LlamaForCausalLM
from transformers.utils import logging

from fixture_tools import digits, next_token_logps, write_json

FIRST = 6  # how many values of each gradient are written
LENGTHS = ((5, 7), (1, 4), (9, 12))  # of prompt and response
D_LOGPS = (0.7, -0.4, 0.25)

ADAPTERS = {
    "all": ("untied_gqa", dict(r=4, lora_alpha=6, lora_dropout=0.1, target_modules="all-linear")),
    "rslora_qv": ("tied", dict(r=3, lora_alpha=2, use_rslora=True, target_modules=["q_proj", "v_proj"])),
    "dora": ("llama3_rope", dict(r=2, lora_alpha=4, use_dora=True, target_modules="all-linear")),
}


def randomise(model, generator: torch.Generator) -> None:
    """A and B normal with deviation 0.1; DoRA's lengths between 0.7 and 1.3 of what they were."""
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if "lora_magnitude_vector" in name:
                weight.mul_(0.7 + 0.6 * torch.rand(weight.shape, generator=generator))
            elif "lora_" in name:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))


def response_logps(model, sequences: list) -> list[torch.Tensor]:
    """Log-probability of each response, the sum over its tokens."""
    logps = []
    for prompt, response in sequences:
        ids = prompt + response
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        logps.append(next_token_logps(logits, ids)[len(prompt) - 1 :].sum())
    return logps


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    tiny, out = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    for seed, (name, (base, options)) in enumerate(ADAPTERS.items(), start=1):
        folder = out / name
        generator = torch.Generator().manual_seed(200 + seed)
        model = LlamaForCausalLM.from_pretrained(tiny / base, dtype=torch.float32)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options)).eval()
        randomise(model, generator)
        model.save_pretrained(folder)
        (folder / "README.md").unlink()
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = f"../../tiny/{base}"
        config["target_modules"].sort()
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")

        vocabulary = model.config.vocab_size
        draw = lambda n: torch.randint(vocabulary, (n,), generator=generator).tolist()
        sequences = [[draw(n) for n in lengths] for lengths in LENGTHS]
        logps = response_logps(model, sequences)
        sum(d * logp for d, logp in zip(D_LOGPS, logps)).backward()
        # the same names as in the file, but gradients instead of values
        gradients = get_peft_model_state_dict(
            model, state_dict={k: p.grad for k, p in model.named_parameters() if p.grad is not None})
        write_json(folder / "expected.json", {
            "sequences": sequences,
            "logps": digits([logp.item() for logp in logps]),
            "d_logps": list(D_LOGPS),
            "gradients": {k: {"norm": digits(g.double().norm().item()), "first": digits(g.flatten()[:FIRST])}
                          for k, g in sorted(gradients.items())},
        })
        print(f"{name}: {len(gradients)} factors, log-probs {digits([logp.item() for logp in logps], 6)}")


if __name__ == "__main__":
    main()
