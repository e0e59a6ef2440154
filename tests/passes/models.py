"""Small models with every kind of site, and how the tests of rounding, pruning and encoding run passes over them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparc.capture import capture
from sparc.driver import Driver
from sparc.pass_base import Pass, Samples
from sparc.program import Program


class Called(nn.Module):
    """A function of the model itself, which has layers by name, and of a tensor."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Convolutions(nn.Module):
    """Grouped, transposed, depthwise, 1×1 and one-dimensional convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(8, 16, 3, groups=2)
        self.transposed = nn.ConvTranspose2d(16, 8, 3, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.flat = nn.Conv1d(8, 8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pointwise(self.depthwise(self.transposed(self.grouped(x))))
        return self.flat(x.flatten(2))


class Tied(nn.Module):
    """An embedding that is also the head, around a linear layer whose reduction no group divides."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 23)
        self.inner = nn.Linear(23, 23)
        self.head = nn.Linear(23, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.relu(self.inner(self.embedding(ids))))


class Experts(nn.Module):
    """Batched matrices `[experts, in, out]` behind a plain product."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(12, 16))
        self.experts = nn.Parameter(torch.randn(3, 16, 10))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm((x @ self.first).expand(3, -1, -1), self.experts)


def models() -> dict[str, tuple[nn.Module, tuple[Tensor, ...]]]:
    """Each model and its example inputs, seeded."""
    torch.manual_seed(0)
    return {
        "convolutions": (Convolutions(), (torch.randn(2, 8, 9, 9),)),
        "tied": (Tied(), (torch.randint(0, 40, (2, 7)),)),
        "experts": (Experts(), (torch.randn(5, 12),)),
        "linear": (nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 6)), (torch.randn(4, 24),)),
    }


def driver(model: nn.Module, inputs: Sequence[Tensor]) -> Driver:
    """A driver over a captured model, checked and calibrated on its example inputs."""
    samples = {"forward": [list(inputs)]}
    return Driver(capture(model, tuple(inputs)), Samples(held_out=samples, calibration=samples))


def run(model: nn.Module, inputs: Sequence[Tensor], *steps: Pass) -> Program:
    """The program after some passes."""
    chosen = driver(model, inputs)
    for step in steps:
        chosen.run(step)
    return chosen.program
