"""What the tests of pruning share: weights, correlated inputs, and the pass on a single layer."""

from functools import cache

import torch
from torch import Tensor, nn

from sparc.capture import capture
from sparc.driver import Driver
from sparc.encoding.blocks import Blocks
from sparc.encoding.nm import NM
from sparc.encoding.unstructured import Unstructured
from sparc.pass_base import Samples
from sparc.passes.prune import Prune
from sparc.passes.prune.masks import Pattern
from sparc.passes.second_order import reconstruction_error
from sparc.program import Program

PATTERNS: list[tuple[Pattern, float | None]] = [
    (NM(2, 4), None),
    (NM(3, 8), None),
    (Unstructured(), 0.5),
    (Unstructured(), 0.3),
    (Blocks((4, 4)), 0.5),
    (Blocks((1, "all")), 0.5),
    (Blocks(("all", 1)), 0.5),
]


def correlated(columns: int, rows: int = 256, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return mixed * torch.rand(columns, generator=generator) + 0.3


def weights(rows: int, columns: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def gram_of(x: Tensor) -> Tensor:
    return (x.double().T @ x.double() / len(x)).unsqueeze(0)


@cache
def layer(rows: int, columns: int, samples: int) -> Program:
    return capture(nn.Linear(columns, rows, bias=False), (torch.zeros(samples, columns),))


def driver_of(weight: Tensor, x: Tensor) -> Driver:
    program, samples = layer(*weight.shape, len(x)).clone(), {"forward": [[x]]}
    program.set_weight("weight", weight.clone())
    return Driver(program, Samples(held_out=samples, calibration=samples), verify="types")


def pruned(weight: Tensor, x: Tensor, step: Prune) -> Tensor:
    chosen = driver_of(weight, x)
    chosen.run(step)
    return chosen.program.weights["weight"]


def error(weight: Tensor, other: Tensor, x: Tensor) -> float:
    return float(reconstruction_error((other - weight).unsqueeze(0), gram_of(x)).sum())


def damped(x: Tensor) -> Tensor:
    gram = gram_of(x)[0]
    return gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
