"""Products of one value are stacked."""

import pytest
import torch
from torch import Tensor, nn

from sparc.capture import capture
from sparc.driver import Driver
from sparc.encoding.int_grid import IntGrid
from sparc.pass_base import Samples
from sparc.passes.canonicalize import Canonicalize
from sparc.passes.coalesce import coalesce_parallel
from sparc.passes.encode import Encode
from sparc.passes.round import Round
from sparc.testing import assert_mutants_caught, assert_pass


class Gated(nn.Module):
    """A gated layer, whose products may differ in something."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.kind = kind
        self.gate, self.up = nn.Linear(8, 12), nn.Linear(8, 12, bias=kind != "bias")
        self.wider, self.down = nn.Linear(8, 20), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        up = self.gate(torch.tanh(x)) if self.kind == "shared" else self.up(x.flip(1) if self.kind == "input" else x)
        y = self.down(torch.nn.functional.silu(self.gate(x)) * up)
        return torch.cat([y, self.wider(x)], -1) if self.kind == "three" else y


class Inception(nn.Module):
    """Convolutions of one image."""

    def __init__(self, **given: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.Conv2d(4, 8, 3, bias=False, **given)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.first(x)).sum() + torch.tanh(self.second(x)).sum()


def run(model: nn.Module, x: Tensor, *first):
    driver = Driver(capture(model.eval(), (x,)), Samples({"forward": [[x]]}), verify="full")
    for step in (Canonicalize(), *first):
        driver.run(step)
    row = driver.run(coalesce_parallel)
    return driver.program, row


X = torch.randn(2, 5, 8)


@pytest.mark.parametrize(("kind", "sizes"), [("", [12, 12]), ("three", [12, 12, 20])])
def test_linear_layers_become_one(kind: str, sizes: list[int]) -> None:
    program, row = run(Gated(kind), X)
    (split,) = [node for node in program.graph.nodes if node.target is torch.ops.aten.split_with_sizes.default]
    assert split.args[1:] == (sizes, -1)
    assert row.matches == 1
    assert row.bytes_after == row.bytes_before
    origins = ["up.weight", "gate.weight", "wider.weight"][: len(sizes)]
    assert program.weights.record("up.weight").origins == tuple(origins)
    assert program.weights["up.weight"].shape == (sum(sizes), 8)


def test_convolutions_of_one_geometry_become_one() -> None:
    program, row = run(Inception(padding=1), torch.randn(2, 4, 7, 7))
    assert sum(node.target is torch.ops.aten.conv2d.default for node in program.graph.nodes) == 1
    assert row.measured["region, float64"] < 1e-12


@pytest.mark.parametrize("kind", ["bias", "input"])
def test_products_that_differ_stay_apart(kind: str) -> None:
    _, row = run(Gated(kind), X)
    assert row.changed == 0
    assert not row.skips


def test_another_padding_is_another_geometry() -> None:
    assert run(Inception(), torch.randn(2, 4, 7, 7))[1].changed == 0


@pytest.mark.parametrize(
    ("kind", "why"), [("encoded", "encoded already"), ("groups", "in groups"), ("tied", "elsewhere")]
)
def test_reasons_to_leave_it_alone(kind: str, why: str) -> None:
    if kind == "encoded":
        _, row = run(Gated(), X, Round(IntGrid(8)), Encode())
    elif kind == "groups":
        model = Inception(padding=1, groups=2)
        model.first = nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False)
        _, row = run(model, torch.randn(2, 4, 7, 7))
    else:
        _, row = run(nn.Sequential(Tied()), X)
    assert row.changed == 0
    assert why in row.skips[0].why


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) * self.second(x) + self.first(torch.tanh(x))


def test_another_batch_and_wrong_twins() -> None:
    assert_pass(coalesce_parallel, Gated("three").eval(), {"x": X}, dynamic={"x": {0: "batch"}})
    assert assert_mutants_caught(coalesce_parallel, Gated().eval(), (X,))
