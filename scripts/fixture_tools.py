"""What the makers of fixtures share: a plain Llama decoder in any float type, log-probs of tokens, and JSON output.

The decoder here is written from the published formulas and shares no code with transformers, whose own model rounds
norms and rotary angles to float32 whatever the type of its weights. So it serves twice: in float64 it says how far a
float32 result may be from the truth, and it checks transformers' model, which the fixtures hold.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F


def inverse_frequencies(config) -> torch.Tensor:
    """Rotary frequencies in radians per position, [head_dim / 2], float64."""
    rope = config.rope_parameters
    frequencies = rope["rope_theta"] ** -(torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)
    if rope["rope_type"] == "default":
        return frequencies
    if rope["rope_type"] == "linear":
        return frequencies / rope["factor"]
    assert rope["rope_type"] == "llama3"
    # turns within the original context: few turns are stretched, many are kept, a ramp between
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / rope["factor"]


def decoder_logits(config, weights: dict[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
    """Logits of one sequence, [len(ids), vocab_size], in the type of the weights (Hugging Face's tensor names)."""
    head_dim, n = config.head_dim, len(ids)
    angles = torch.outer(torch.arange(n, dtype=torch.float64), inverse_frequencies(config)).repeat(1, 2)
    x = weights["model.embed_tokens.weight"][torch.tensor(ids)]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    future = torch.ones(n, n, dtype=torch.bool).triu(1)

    def norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt() * weights[f"{name}.weight"]

    def rotate(x):
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        h = norm(x, f"{at}.input_layernorm")
        # [heads, positions, head_dim]
        q, k, v = ((h @ weights[f"{at}.self_attn.{p}_proj.weight"].T).view(n, -1, head_dim).transpose(0, 1) for p in "qkv")
        group = config.num_attention_heads // config.num_key_value_heads
        k, v = rotate(k).repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        scores = (rotate(q) @ k.transpose(1, 2) / math.sqrt(head_dim)).masked_fill(future, -math.inf)
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(n, -1)
        x = x + mixed @ weights[f"{at}.self_attn.o_proj.weight"].T
        h = norm(x, f"{at}.post_attention_layernorm")
        gated = F.silu(h @ weights[f"{at}.mlp.gate_proj.weight"].T) * (h @ weights[f"{at}.mlp.up_proj.weight"].T)
        x = x + gated @ weights[f"{at}.mlp.down_proj.weight"].T
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return norm(x, "model.norm") @ weights[head].T


def next_token_logps(logits: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """Log-probability of ids[t + 1] at position t, [len(ids) - 1]."""
    return logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def digits(values, count: int = 9):
    """Floats rounded to `count` significant digits; nine hold a float32 exactly."""
    if isinstance(values, torch.Tensor):
        values = values.tolist()
    if isinstance(values, float):
        return float(f"{values:.{count}g}")
    return [digits(value, count) for value in values]


def write_json(path: Path, value) -> None:
    """Indented JSON in which lists and objects without inner lists or objects take one line."""

    def text(value, indent: str) -> str:
        inner = list(value.values()) if isinstance(value, dict) else value
        if not isinstance(value, (dict, list)) or not any(isinstance(part, (dict, list)) for part in inner):
            return json.dumps(value)
        deeper = indent + " "
        opening, closing = "{}" if isinstance(value, dict) else "[]"
        names = [f"{json.dumps(name)}: " for name in value] if isinstance(value, dict) else [""] * len(inner)
        parts = [f"{deeper}{name}{text(part, deeper)}" for name, part in zip(names, inner)]
        return f"{opening}\n" + ",\n".join(parts) + f"\n{indent}{closing}"

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text(value, "") + "\n")
