"""Small models with every kind of unit, and how the tests of structural pruning run them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparc.analysis.dependency import Group, groups
from sparc.capture import capture
from sparc.driver import Driver
from sparc.pass_base import Pass, Samples
from sparc.passes.canonicalize import Canonicalize
from sparc.program import Program
from tests.architectures import ARCHITECTURES


class Gated(nn.Module):
    """`down(silu(gate(x)) * up(x))` on 12 channels, with 16 neurons, and a head of 5 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(12, 16), nn.Linear(12, 16, bias=False)
        self.down, self.head = nn.Linear(16, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.down(F.silu(self.gate(x)) * self.up(x))))


class Images(nn.Module):
    """Convolutions with a batch norm, a residual, a depthwise layer, squeeze and excitation, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.outer = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1)
        self.deep = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.head = nn.Linear(8, 5)
        for parameter in (self.norm.weight, self.norm.bias, self.norm.running_mean, self.norm.running_var):
            assert parameter is not None
            parameter.data.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        y = torch.relu(self.deep(F.relu6(self.inner(x))))
        y = y * torch.sigmoid(self.excite(torch.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return self.head((x + self.outer(y)).mean((2, 3)))


def prepared(model: nn.Module, inputs: Any, *batches: list[Tensor], dynamic: Any = None) -> Driver:
    """A driver over the captured model in its canonical form; calibrated on the batches, or on the inputs."""
    program = capture(model.eval(), inputs, dynamic=dynamic)
    named = inputs if isinstance(inputs, dict) else {}
    flat = program.main.signature.bind(() if named else tuple(inputs), named)
    driver = Driver(program, Samples({"forward": [flat]}, {"forward": list(batches) or [flat]}))
    driver.run(Canonicalize())
    return driver


def architecture(name: str) -> Driver:
    """The same of an architecture of the sweep."""
    built = ARCHITECTURES[name].build().enlivened()
    return prepared(built.model, dict(built.inputs), dynamic=built.dynamic)


def gated(*batches: list[Tensor]) -> tuple[Gated, Driver]:
    """The gated model, and a driver over it."""
    torch.manual_seed(0)
    return (model := Gated().eval()), prepared(model, (torch.randn(9, 12),), *batches)


def images(*batches: list[Tensor]) -> tuple[Images, Driver]:
    """The convolutional model, and a driver over it."""
    torch.manual_seed(0)
    return (model := Images().eval()), prepared(model, (torch.randn(2, 3, 6, 6),), *batches)


def after(driver: Driver, *steps: Pass) -> Program:
    """The program after some passes."""
    for step in steps:
        driver.run(step)
    return driver.program


def group_of(program: Program, weight: str, axis: int = 0) -> Group:
    """The one group that holds an axis of a weight."""
    (found,) = [each for each in groups(program) if any((m.weight, m.axis) == (weight, axis) for m in each.members)]
    return found
