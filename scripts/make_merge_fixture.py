"""Merges of small random tensors by mergekit's own methods: what sacpo's merging is compared with.

    pip install --no-deps mergekit==0.1.5 immutables     # over scripts/requirements.txt
    python scripts/make_merge_fixture.py crates/align/tests/fixtures/merge.json

The tensors are float32 numbers drawn here; mergekit merges them in float64, so its results, of which nine digits are
written, may serve for comparison to float32 rounding. The same merges in float32 are checked to agree.

DARE: mergekit 0.1.5 scales what is kept so that the sum of absolute values is what it was; the paper divides by the
density. The latter is asked of mergekit as `rescale` off and `lambda` = 1 / density. The random masks that it drew are
written too, since no other program draws the same. What it keeps it rounds to float32, even where all else is float64.
"""

import sys
from pathlib import Path

import torch
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import TensorGroup

from fixture_tools import digits, write_json

SIZE = 60
WEIGHTS = [[1.0, 1.0, 1.0], [0.3, 0.5, 0.9], [1.5, -0.4, 0.7]]


def merge(method, group, **parameters):
    return registry.get(method)([group], parameters=parameters)[0]


def linear(tensors, weights, normalise):
    return merge("linear", TensorGroup.from_tensors(tensors), weight=dict(enumerate(weights)), normalize=normalise)


def between(first, second, q):
    return merge("slerp", TensorGroup.from_tensors([first, second], base_index=0), t=q)


def task_vectors(method, base, tensors, weights, normalise, density):
    """The merge, and the mask of each model (1: kept) where the method draws one."""
    masks, draw = [], torch.bernoulli

    def recorded(probabilities):
        masks.append(draw(probabilities))
        return masks[-1]

    parameters = {
        "int8_mask": False,
        "normalize": normalise,
        "rescale": False,
        "lambda": 1 / density if method.startswith("dare") else 1.0,
        "weight": dict(enumerate(weights, 1)),
        "density": dict.fromkeys(range(1, len(tensors) + 1), density),
    }
    group = TensorGroup.from_tensors([base, *tensors], base_index=0)
    torch.bernoulli = recorded
    try:
        merged = merge(method, group, **parameters)
    finally:
        torch.bernoulli = draw
    return merged, [[int(x) for x in mask.tolist()] for mask in masks]


def main(out: Path) -> None:
    generator = torch.Generator().manual_seed(7)
    base = torch.randn(SIZE, generator=generator)
    models = [base + 0.3 * torch.randn(SIZE, generator=generator) for _ in range(3)]
    other = torch.randn(SIZE, generator=generator)

    cases = []

    def case(compute, **described):
        torch.manual_seed(len(cases))
        merged, masks = compute(torch.float64)
        torch.manual_seed(len(cases))
        single, same_masks = compute(torch.float32)
        assert masks == same_masks and torch.allclose(single.double(), merged, rtol=0, atol=2e-6), described
        cases.append(described | ({"masks": masks} if masks else {}) | {"merged": digits(merged)})

    for weights in WEIGHTS:
        for normalise in (True, False):
            case(
                lambda dtype: (linear([m.to(dtype) for m in models], weights, normalise), []),
                method="linear", weights=weights, normalise=normalise,
            )
            for method, densities in [
                ("task-arithmetic", [1.0]), ("ties", [0.2, 0.5, 1.0]), ("dare-linear", [0.5]), ("dare-ties", [0.5])
            ]:
                for density in densities:
                    case(
                        lambda dtype: task_vectors(
                            method.replace("-", "_"), base.to(dtype), [m.to(dtype) for m in models],
                            weights, normalise, density,
                        ),
                        method=method, weights=weights, normalise=normalise, density=density,
                    )
    # between unlike tensors along the arc; between nearly parallel ones along the line
    for second, tensor in [("other", other), ("near", base + 1e-3 * other)]:
        for q in (0.0, 0.3, 0.5, 1.0, 1.4):
            case(
                lambda dtype: (between(base.to(dtype), tensor.to(dtype), q), []),
                method="slerp", second=second, q=q,
            )
    write_json(
        out,
        {
            "made_by": "mergekit 0.1.5 in float64",
            "base": digits(base),
            "models": digits(torch.stack(models)),
            "other": digits(other),
            "near": digits(base + 1e-3 * other),
            "cases": cases,
        },
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
