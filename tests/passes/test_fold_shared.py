"""A weight that two branches share is applied once."""

import pytest
import torch
from torch import Tensor, nn

from sparc.capture import capture
from sparc.driver import Driver
from sparc.pass_base import Samples
from sparc.passes.canonicalize import Canonicalize
from sparc.passes.fold import fold_shared
from sparc.testing import assert_mutants_caught, assert_pass


class Twins(nn.Module):
    """One layer, applied to two values."""

    def __init__(self, layer: nn.Module, kind: str = "sum") -> None:
        super().__init__()
        self.layer, self.kind = layer, kind

    def forward(self, x: Tensor) -> Tensor:
        other = torch.tanh(x[:1] if self.kind == "shape" else x)
        return self.layer(x) - self.layer(other) if self.kind == "difference" else self.layer(x) + self.layer(other)


def run(model: nn.Module, x: Tensor):
    driver = Driver(capture(model.eval(), (x,)), Samples({"forward": [[x]]}), verify="full")
    driver.run(Canonicalize())
    return driver.run(fold_shared), driver.program


@pytest.mark.parametrize("kind", ["sum", "difference"])
@pytest.mark.parametrize("bias", [True, False])
def test_one_product_is_left(kind: str, bias: bool) -> None:
    torch.manual_seed(0)
    row, program = run(Twins(nn.Linear(8, 6, bias=bias), kind), torch.randn(3, 8))
    assert [node.target._opname for node in program.graph.nodes if node.op == "call_function"].count("linear") == 1
    assert row.measured["region, float64"] < 1e-12


def test_convolutions_too() -> None:
    row, program = run(Twins(nn.Conv2d(3, 4, 3, padding=1)), torch.randn(2, 3, 6, 6))
    assert row.matches == 1
    assert len(program.weights) == 2


def test_another_shape_is_left_alone() -> None:
    row, _ = run(Twins(nn.Linear(8, 6), "shape"), torch.randn(3, 8))
    assert row.changed == 0
    assert "different shapes" in row.skips[0].why


def test_another_batch_and_wrong_twins() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 8)
    for kind, fault in (("sum", "DroppedArgument"), ("difference", "SwappedOperands")):
        model = Twins(nn.Linear(8, 6), kind).eval()
        assert_pass(fold_shared, model, {"x": x}, dynamic={"x": {0: "batch"}})
        assert fault in assert_mutants_caught(fold_shared, model, (x,))
