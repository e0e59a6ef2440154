"""Recipes that put any pruning before any rounding, behind any pass that keeps the function, and what must hold for
what they make.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor, nn

from sparc.encoding.base import ElementEncoding
from sparc.encoding.binary_code import BinaryCode
from sparc.encoding.blocks import Blocks
from sparc.encoding.codebook import Codebook
from sparc.encoding.float8 import Float8
from sparc.encoding.grid import Grid
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.mask import MaskEncoding, kept_count
from sparc.encoding.microscaling import MXFP4, NVFP4
from sparc.encoding.nm import NM
from sparc.encoding.unstructured import Unstructured
from sparc.pass_base import Pass
from sparc.passes.encode import Encode
from sparc.passes.equalize.awq import Awq
from sparc.passes.low_rank import LowRank
from sparc.passes.prune import PermuteChannels, Prune
from sparc.passes.rotate import Rotate
from sparc.passes.round import Compensate, Round
from tests import mixtures
from tests.generation.decoders import decoder

DENSITY = 0.5
GROUPS = IntGrid(4, group=16)

MASKS: dict[str, Prune | None] = {
    "dense": None,
    "2:4 magnitude": Prune(NM(2, 4)),
    "2:4 sparsegpt": Prune(NM(2, 4), method="sparsegpt"),
    "unstructured": Prune(Unstructured(), density=DENSITY, method="wanda"),
    "blocks": Prune(Blocks((4, 4)), density=DENSITY),
    "rows": Prune(Blocks((1, "all")), density=DENSITY, method="sparsegpt"),
}
ENCODINGS: dict[str, ElementEncoding | None] = {
    "float": None,
    "int8": IntGrid(8),
    "int4": IntGrid(4, group=16, symmetric=False),
    "int4 minimum": IntGrid(4, group=16, symmetric=False, zero="minimum"),
    "nf4": Codebook("nf4", group=16),
    "kmeans": Codebook("kmeans", bits=3, group="none"),
    "binary": BinaryCode(2, group=16),
    "float8": Float8(),
    "mxfp4": MXFP4(),
    "nvfp4": NVFP4(),
}
METHODS = ("nearest", "gptq", "compensate")
FRONTS: dict[str, Callable[[], Pass | None]] = {
    "nothing": lambda: None,
    "rotate": Rotate,
    "awq": lambda: Awq(GROUPS, points=4),
    "low rank": lambda: LowRank(rank=2, beside=IntGrid(8)),
    "permute": lambda: PermuteChannels(NM(2, 4), rounds=4),
}


class Gated(nn.Module):
    """Two layers behind a norm, the second one with a residual sum; 32 columns are two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def convolutions() -> nn.Module:
    """Depthwise, in groups, pointwise, and a head."""
    layers = [nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 32, 3, groups=2), nn.ReLU(), nn.Conv2d(32, 32, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 8))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": Gated,
    "llama": lambda: decoder("llama", num_hidden_layers=1, use_cache=False),
    "convolutions": convolutions,
    "mixture": mixtures.Mixture,
}


def model(name: str) -> nn.Module:
    """One of the models, the same every time."""
    torch.manual_seed(0)
    return MODELS[name]().eval()


@cache
def batches(name: str) -> tuple[Any, ...]:
    """Inputs, correlated so that second-order methods have something to do."""
    generator = torch.Generator().manual_seed(3)
    if name == "llama":
        return tuple({"input_ids": torch.randint(5, 97, (2, 12), generator=generator)} for _ in range(4))
    if name == "convolutions":
        return tuple((torch.randn(2, 16, 9, 9, generator=generator),) for _ in range(4))
    if name == "mixture":
        return tuple(
            (torch.randn(33, mixtures.WIDTH, generator=generator), (5 * torch.arange(33)) % mixtures.EXPERTS)
            for _ in range(4)
        )
    mix = torch.randn(32, 32, generator=generator)
    return tuple((torch.randn(24, 32, generator=generator) @ mix,) for _ in range(4))


@dataclass(frozen=True)
class Case:
    """One recipe on one model, by the names above."""

    model: str
    mask: str
    encoding: str
    method: str
    front: str

    def __str__(self) -> str:
        return f"{self.model}, {self.front}, {self.mask}, {self.encoding}, {self.method}"

    def steps(self) -> list[Pass]:
        """The passes in order."""
        prune, encoding, front = MASKS[self.mask], ENCODINGS[self.encoding], FRONTS[self.front]()
        steps: list[Pass] = [each for each in (front, prune) if each is not None]
        if encoding is not None:
            steps.append(Round(encoding, method="gptq" if self.method == "gptq" else "nearest"))
        return [*steps, *([Compensate()] if self.method == "compensate" else []), Encode()]


def every_case(models: Iterable[str]) -> list[Case]:
    """The full product on some models."""
    return [Case(*each) for each in product(models, MASKS, ENCODINGS, METHODS, FRONTS)]


def covering(models: Iterable[str]) -> list[Case]:
    """Few cases in which every two choices of two kinds meet, greedily: each case covers most pairs that are left."""
    cases = [tuple(vars(each).values()) for each in every_case(models)]
    pairs = [set(combinations(enumerate(each), 2)) for each in cases]
    left: set[Any] = set().union(*pairs)
    chosen = []
    while left:
        best = max(range(len(cases)), key=lambda index: len(pairs[index] & left))
        chosen.append(Case(*cases[best]))
        left -= pairs[best]
    return chosen


def check_mask(grid: Grid, matrix: Tensor) -> None:
    """Exactly as many elements are kept as the pattern says, and all others are zero.

    Args:
        grid: of a mask.
        matrix: the weight on it, `[batch..., out, reduce]`.
    """
    spec, mask = grid.spec, grid.tensors["mask"]
    assert isinstance(spec, MaskEncoding)
    if isinstance(spec, NM):
        assert bool((mask.unflatten(-1, (-1, spec.m)).sum(-1) == spec.n).all())
    else:
        assert int(mask.sum()) == kept_count(DENSITY, mask.numel())
    kept = spec.spread(mask, matrix.shape)
    assert bool((matrix[~kept] == 0).all())
    assert bool(matrix[kept].any())
