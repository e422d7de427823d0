#!/usr/bin/env python3
"""Check that sacpo merges adapters of one base as PEFT does by `add_weighted_adapter(combination_type="cat")`.

    sacpo merge --method task-arithmetic --base BASE --weight 0.7 --weight=-0.4 A B MERGED
    python scripts/check_merge_with_peft.py A 0.7 B -0.4 MERGED

Any number of adapters with their weights may come before MERGED. Compared are the updates s·B·A of all matrices,
computed in float64.
"""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import AutoPeftModelForCausalLM
from peft.tuners.lora import LoraLayer
from transformers.utils import logging

BAR = 1e-6  # of the largest entry of a matrix's update


def update(layer: LoraLayer, name: str) -> torch.Tensor:
    if name not in layer.lora_A:
        return torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
    return layer.scaling[name] * layer.lora_B[name].weight.double() @ layer.lora_A[name].weight.double()


def main() -> None:
    *given, merged = sys.argv[1:] or [""]
    folders, weights = given[::2], [float(weight) for weight in given[1::2]]
    if not folders or len(folders) != len(weights):
        sys.exit(__doc__)
    logging.disable_progress_bar()
    model = AutoPeftModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32, adapter_name="0")
    names = [str(index) for index in range(len(folders))]
    for name, folder in zip(names[1:], folders[1:]):
        model.load_adapter(folder, name)
    model.add_weighted_adapter(names, weights, "theirs", combination_type="cat")
    model.load_adapter(merged, "ours")
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer)]
    worst, moved = 0.0, 0
    with torch.no_grad():
        for name, layer in layers:
            ours, theirs = update(layer, "ours"), update(layer, "theirs")
            largest = theirs.abs().max().item()
            worst = max(worst, (ours - theirs).abs().max().item() / (largest or 1.0))
            moved += largest > 0
    print(f"{len(layers)} matrices, {moved} of them changed: largest difference {worst:.1e} of a matrix's largest change")
    if worst > BAR:
        sys.exit(f"more than {BAR}")


if __name__ == "__main__":
    main()
