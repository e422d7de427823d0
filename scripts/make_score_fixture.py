#!/usr/bin/env python3
"""Write a tiny model with a score head, what transformers computes with it, and steps of reward and cost training.

    python scripts/make_score_fixture.py crates/engine/tests/fixtures/score crates/align/tests/fixtures/score_steps.json

The model is a LlamaForSequenceClassification with one label (random values of a fixed seed), a folder as
`save_pretrained` writes it. `expected.json` beside it (float32):

    sequences   [prompt, response], token ids; some responses end with padding tokens
    scores      of prompt and response, from one padded batch: transformers reads the last token that is no padding
    d_scores    the weights of a sum of these scores
    gradients   for each tensor, the norm and the first values of the sum's derivative

`score_steps.json` holds pairs with safety labels, and for each loss the mean loss and the gradient's norm before each of
six steps of AdamW (β₁ 0.9, β₂ 0.999, ε 1e-8, no decay, no clipping) on all pairs at once:

    reward      −log σ(r_c − r_r)
    cost        −log σ(C_r − C_c) − log σ(s_c·C_c) − log σ(s_r·C_r), s = 1 for an unsafe response, −1 for a safe one
                (equation 6 of arXiv 2310.12773, the rejected response being the more harmful one)
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForSequenceClassification
from transformers.utils import logging

from fixture_tools import digits, write_json

PAD, END, VOCAB, FIRST = 3, 2, 96, 6
LENGTHS = ((5, 7), (1, 4), (9, 12), (4, 3))  # of prompt and response
PADS = (0, 2, 1, 0)  # at the end of the response, beside those of the batch
D_SCORES = (0.7, -0.4, 0.25, 1.1)
STEPS, PAIRS, LEARNING_RATE = 6, 5, 2e-3


def random_model() -> LlamaForSequenceClassification:
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, rms_norm_eps=1e-5, bos_token_id=1,
        eos_token_id=END, pad_token_id=PAD, num_labels=1)
    generator = torch.Generator().manual_seed(31)
    model = LlamaForSequenceClassification(config).eval()
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            if weight.dim() == 1:
                weight.copy_(0.5 + torch.rand(weight.shape, generator=generator))
            else:
                weight.copy_(0.15 * torch.randn(weight.shape, generator=generator))
    return model


def scores(model, texts: list[list[int]]) -> torch.Tensor:
    """The scores of texts in one batch, padded on the right."""
    longest = max(map(len, texts))
    ids = torch.tensor([text + [PAD] * (longest - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0]


def steps(model, loss_of, pairs: list[dict]) -> list[dict]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, eps=1e-8, weight_decay=0.0)
    taken = []
    for _ in range(STEPS):
        texts = [pair["prompt"] + pair[side] for pair in pairs for side in ("chosen", "rejected")]
        chosen, rejected = scores(model, texts).view(-1, 2).unbind(1)
        loss = loss_of(chosen, rejected).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
        optimizer.step()
        taken.append({"loss": digits(loss.item()), "grad_norm": digits(norm.item())})
    return taken


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    folder, steps_file = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    model = random_model()
    model.save_pretrained(folder)

    generator = torch.Generator().manual_seed(32)
    draw = lambda n: torch.randint(PAD + 1, VOCAB, (n,), generator=generator).tolist()
    sequences = [[draw(p), draw(r) + [PAD] * pads] for (p, r), pads in zip(LENGTHS, PADS)]
    found = scores(model, [prompt + response for prompt, response in sequences])
    sum(d * score for d, score in zip(D_SCORES, found)).backward()
    write_json(folder / "expected.json", {
        "sequences": sequences,
        "scores": digits(found.detach()),
        "d_scores": list(D_SCORES),
        "gradients": {k: {"norm": digits(w.grad.double().norm().item()), "first": digits(w.grad.flatten()[:FIRST])}
                      for k, w in sorted(model.named_parameters())},
    })

    pairs = [{"prompt": draw(4 + i), "chosen": draw(3 + i % 3) + [END], "rejected": draw(2 + i % 4) + [END],
              "unsafe": [i % 4 == 3, i % 2 == 1]} for i in range(PAIRS)]
    s = torch.tensor([[1.0 if unsafe else -1.0 for unsafe in pair["unsafe"]] for pair in pairs])
    losses = {
        "reward": lambda c, r: -F.logsigmoid(c - r),
        "cost": lambda c, r: -F.logsigmoid(r - c) - F.logsigmoid(s[:, 0] * c) - F.logsigmoid(s[:, 1] * r),
    }
    write_json(steps_file, {
        "learning_rate": LEARNING_RATE,
        "pairs": pairs,
        **{name: steps(random_model(), loss, pairs) for name, loss in losses.items()},
    })


if __name__ == "__main__":
    main()
