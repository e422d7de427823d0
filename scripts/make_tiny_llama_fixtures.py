#!/usr/bin/env python3
"""Write tiny random Llama models and what transformers computes with them.

    python scripts/make_tiny_llama_fixtures.py crates/engine/tests/fixtures/tiny

Each model is a Hugging Face folder (float32, fixed seed) with a `logits.json` beside the weights:

    ids              a token sequence
    logps            log-probability of ids[t + 1] at position t, transformers' LlamaForCausalLM in float32
    logps_float64    the same from the float64 decoder of fixture_tools.py
    logits           for two positions, the logits over the vocabulary (float32, transformers)

`tied` and `untied_gqa` have a config.json as transformers 5 writes it (`rope_parameters`, `dtype`). `llama3_rope` and
`linear_rope` have one as most published models do (`rope_theta`, `rope_scaling`, `torch_dtype`), `linear_rope` with
the old key `type` for the kind of scaling. The script reads each folder back before it computes anything.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from fixture_tools import decoder_logits, digits, next_token_logps, write_json

SEQUENCE_LENGTH = 40  # longer than the original context of `llama3_rope`
LOGITS_AT = (7, SEQUENCE_LENGTH - 1)

SHAPE = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=256, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, pad_token_id=None)

# head_dim 16 gives wavelengths of 6, 20 and ≥ 63 positions: below 32/4, between, and above 32/1
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)

MODELS = {
    "tied": dict(num_key_value_heads=4, head_dim=8, tie_word_embeddings=True),
    "untied_gqa": dict(num_key_value_heads=2, head_dim=8, tie_word_embeddings=False),
    "llama3_rope": dict(num_key_value_heads=2, head_dim=16, tie_word_embeddings=False, eos_token_id=[2, 3],
                        rope_parameters=dict(rope_theta=10000.0, **LLAMA3)),
    "linear_rope": dict(num_key_value_heads=1, head_dim=8, tie_word_embeddings=True,
                        rope_parameters=dict(rope_theta=10000.0, rope_type="linear", factor=2.0)),
}
OLD_CONFIG_STYLE = {"llama3_rope": LLAMA3, "linear_rope": dict(type="linear", factor=2.0)}


def random_model(config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    """Matrices normal with deviation 0.15, so that logits are not flat; gains of norms between 0.5 and 1.5."""
    generator = torch.Generator().manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            if weight.dim() == 1:
                weight.copy_(0.5 + torch.rand(weight.shape, generator=generator))
            else:
                weight.copy_(0.15 * torch.randn(weight.shape, generator=generator))
    return model


def to_old_style(path: Path, scaling: dict) -> None:
    """Rewrite a config.json of transformers 5 in the form of transformers 4."""
    config = json.loads(path.read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["rope_scaling"] = scaling
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    for seed, (name, options) in enumerate(MODELS.items(), start=1):
        folder = Path(sys.argv[1]) / name
        random_model(LlamaConfig(**SHAPE | options), seed).save_pretrained(folder)
        if name in OLD_CONFIG_STYLE:
            to_old_style(folder / "config.json", OLD_CONFIG_STYLE[name])

        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        generator = torch.Generator().manual_seed(100 + seed)
        ids = torch.randint(SHAPE["vocab_size"], (SEQUENCE_LENGTH,), generator=generator).tolist()
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0]
            exact = decoder_logits(model.config, {k: v.double() for k, v in model.state_dict().items()}, ids)
        logps, exact_logps = next_token_logps(logits, ids), next_token_logps(exact, ids)
        difference = (logits.double() - exact).abs().max().item()
        assert difference < 1e-5, f"{name}: transformers and the float64 decoder differ by {difference}"
        write_json(folder / "logits.json", {
            "ids": ids,
            "logps": digits(logps),
            "logps_float64": digits(exact_logps, 15),
            "logits": [{"position": t, "values": digits(logits[t])} for t in LOGITS_AT],
        })
        print(f"{name}: {sum(p.numel() for p in model.parameters())} weights, "
              f"largest difference of a logit from float64 {difference:.1e}")


if __name__ == "__main__":
    main()
