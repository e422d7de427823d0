#!/usr/bin/env python3
"""A full training step in PyTorch, the peer of this crate's own: forward, cross-entropy, backward, AdamW.

    printf 'step 5\\nstep 5\\n' | python crates/engine/benches/peer_training_step.py --variant fused

Model: Llama type, width 512, 8 blocks, 8 heads of 64, feed-forward 1408, vocabulary 32,000, tied head (42 M weights);
batch 8 × 256 tokens, loss on all positions, float32 throughout. AdamW: lr 3e-4, betas 0.9 and 0.999, ε 1e-8, decay
0.01 on matrices; no clipping. Every step trains on the same batch.

Variants:

    eager    plain modules, causal scaled_dot_product_attention, rms_norm; AdamW with foreach loops
    fused    the same with the fused AdamW
    chunked  fused AdamW, and linear_cross_entropy in chunks, which never holds all logits
    compile  fused AdamW, and model and loss through torch.compile (wants a C++ compiler)

Environment: PyTorch brings its own matrix library (MKL and oneDNN, in the `ready` line below) and heeds --threads, not
OMP_NUM_THREADS; OPENBLAS_* does not touch it. Under glibc it is at its best with

    MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000

for otherwise each step gives its large buffers back to the system and has them zeroed again, some hundred thousand page
faults a step. These must be set before the program starts; a fair comparison sets them.

Driven by lines on standard input, so that another program can take turns with it: after the untimed warm-up steps it
prints a line with `"ready": true`, what PyTorch was built with and its settings. Then each line `step N`
runs N timed steps and prints one JSON line; end of input ends the program.

    {"variant": …, "threads": …, "seconds": [of each step], "tokens_per_second": median, "loss": [before each update],
     "peak_rss_bytes": of the process so far}

Weights and tokens are functions of their position, so another program can start from the same ones and must then show
the same losses. With mix = MurmurHash3's 32-bit finaliser: token j is mix(2³¹ + j) mod 32,000, j counting through
8 rows of 257 (inputs are the first 256 of a row, targets the last 256). Weight i is a (2 mix(i)/2³² − 1), a = 0.02 √3,
i counting through the tensors in the order of Hugging Face's names: embedding; each block's input norm, q, k, v, o,
post-attention norm, gate, up, down; last norm. Gains of norms are counted but set to 1.
"""

import argparse
import json
import math
import os
import resource
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, BLOCKS, HEADS, FEED_FORWARD, VOCAB = 512, 8, 8, 1408, 32000
HEAD_DIM = WIDTH // HEADS
SEQUENCES, LENGTH = 8, 256
EPSILON, ROPE_THETA = 1e-5, 10000.0
VARIANTS = ("eager", "fused", "chunked", "compile")


def mix(values: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's finaliser of 32-bit numbers, held in int64."""
    low = 0xFFFFFFFF
    values = values ^ (values >> 16)
    values = (values * 0x85EBCA6B) & low  # wraps modulo 2^64, which leaves the low 32 bits right
    values = values ^ (values >> 13)
    values = (values * 0xC2B2AE35) & low
    return values ^ (values >> 16)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (WIDTH,), self.weight, EPSILON)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = Norm()
        self.query, self.key, self.value, self.output = (linear(WIDTH, WIDTH) for _ in range(4))
        self.feed_forward_norm = Norm()
        self.gate, self.up = linear(WIDTH, FEED_FORWARD), linear(WIDTH, FEED_FORWARD)
        self.down = linear(FEED_FORWARD, WIDTH)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        h = self.attention_norm(x)
        q, k, v = (p(h).view(SEQUENCES, LENGTH, HEADS, HEAD_DIM).transpose(1, 2)
                   for p in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        x = x + self.output(mixed.transpose(1, 2).reshape(SEQUENCES, LENGTH, WIDTH))
        h = self.feed_forward_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Decoder(nn.Module):
    def __init__(self, chunked_head: bool) -> None:
        super().__init__()
        self.chunked_head = chunked_head
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.final_norm = Norm()
        frequencies = ROPE_THETA ** -(torch.arange(0, HEAD_DIM, 2).double() / HEAD_DIM)
        angles = torch.outer(torch.arange(LENGTH).double(), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos().float())
        self.register_buffer("sin", angles.sin().float())

        scale, start = 0.02 * math.sqrt(3), 0
        for weight in self.parameters():  # in the order that the docstring gives
            if weight.dim() > 1:
                uniform = mix(torch.arange(start, start + weight.numel())).double() / 2**32
                weight.data = (scale * (2 * uniform - 1)).float().view_as(weight)
            start += weight.numel()

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of the targets, both [SEQUENCES, LENGTH]."""
        x = self.embedding(inputs)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        x = self.final_norm(x).view(-1, WIDTH)
        if self.chunked_head:
            return F.linear_cross_entropy(x, self.embedding.weight, targets.reshape(-1),
                                          options=nn.LinearCrossEntropyOptions())
        return F.cross_entropy(F.linear(x, self.embedding.weight), targets.reshape(-1))


def training_step(variant: str):
    """A function that takes one step and returns the loss before its update."""
    decoder = Decoder(chunked_head=variant == "chunked")
    matrices = [w for w in decoder.parameters() if w.dim() > 1]
    gains = [w for w in decoder.parameters() if w.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": gains, "weight_decay": 0.0}],
        lr=3e-4, betas=(0.9, 0.999), eps=1e-8, foreach=variant == "eager", fused=variant != "eager")
    loss_of = torch.compile(decoder) if variant == "compile" else decoder
    tokens = (mix(2**31 + torch.arange(SEQUENCES * (LENGTH + 1))) % VOCAB).view(SEQUENCES, LENGTH + 1)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> float:
        loss = loss_of(inputs, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=VARIANTS, default="fused")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=2, metavar="STEPS", help="untimed steps before the first command")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    step = training_step(args.variant)
    warmup_losses = [step() for _ in range(args.warmup)]
    print(json.dumps({
        "ready": True, "variant": args.variant, "warmup_loss": warmup_losses, "torch": torch.__version__,
        "build": torch.__config__.show(), "parallel": torch.__config__.parallel_info(),
        "malloc": {key: value for key, value in os.environ.items() if key.startswith("MALLOC_")},
    }), flush=True)

    for line in sys.stdin:
        match line.split():
            case ["step", count] if count.isdigit() and int(count) > 0:
                seconds, losses = [], []
                for _ in range(int(count)):
                    start = time.perf_counter()
                    losses.append(step())
                    seconds.append(time.perf_counter() - start)
                print(json.dumps({
                    "variant": args.variant,
                    "threads": torch.get_num_threads(),
                    "seconds": seconds,
                    "tokens_per_second": SEQUENCES * LENGTH / statistics.median(seconds),
                    "loss": losses,
                    "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                }), flush=True)
            case []:
                pass
            case _:
                sys.exit(f"The command {line.strip()!r} is not known; write `step N` with N of at least 1.")


if __name__ == "__main__":
    main()
