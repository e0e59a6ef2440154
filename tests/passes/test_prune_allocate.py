"""Densities by sensitivity: by hand, their mean, their order, and the sensitivities themselves."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sparc.capture import capture
from sparc.encoding.blocks import Blocks
from sparc.encoding.unstructured import Unstructured
from sparc.passes.prune import Prune
from sparc.passes.prune.allocate import allocate, mean_curvatures
from tests.passes.models import driver, models


def test_densities_by_hand() -> None:
    assert allocate([3.0, 1.0, 2.0], [10, 10, 10], 0.5, 0.1) == pytest.approx([0.6, 0.4, 0.5])
    assert allocate([3.0, 1.0], [30, 10], 0.5, 0.1) == pytest.approx([0.55, 0.35])
    assert allocate([3.0, 1.0], [10, 10], 0.95, 0.1) == pytest.approx([1.0, 0.9])
    assert allocate([1.0, 3.0], [10, 10], 0.05, 0.1) == pytest.approx([0.0, 0.1], abs=1e-12)
    assert allocate([5.0], [10], 0.3, 0.1) == pytest.approx([0.3])
    assert allocate([2.0, 2.0, 2.0], [1, 2, 3], 0.3, 0.1) == pytest.approx([0.3] * 3)


@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 10**6)), min_size=1, max_size=12),
    st.floats(0.01, 0.99),
    st.floats(0, 0.99),
)
def test_the_mean_over_parameters_is_the_density(
    matrices: list[tuple[float, int]], density: float, spread: float
) -> None:
    sensitivities, sizes = zip(*matrices, strict=True)
    found = allocate(sensitivities, sizes, density, spread)
    assert all(0 <= each <= 1 for each in found)
    mean = sum(each * size for each, size in zip(found, sizes, strict=True)) / sum(sizes)
    assert mean == pytest.approx(density, abs=1e-9)
    for a, b in zip(sensitivities, found, strict=True):
        assert all(b >= other for each, other in zip(sensitivities, found, strict=True) if a > each)


class Two(nn.Module):
    """Two layers, a bend between them, of very different weight in the result."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)
        self.small = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))) + 0.01 * self.small(x)


def test_sensitivities_are_traces_of_the_hessian() -> None:
    model, x = Two().eval(), torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    program = capture(model, (x,))
    names = ["first.weight", "second.weight", "small.weight"]
    found = mean_curvatures(program, names, {"forward": [x]}, probes=2000)
    with torch.no_grad():
        before = model(x)
    for name in names:

        def distance(weight: Tensor, name: str = name) -> Tensor:
            changed = torch.func.functional_call(model, {name: weight}, (x,))
            return (changed - before).square().sum() / 2

        weight = model.get_parameter(name).detach()
        hessian = torch.autograd.functional.hessian(distance, weight).reshape(weight.numel(), -1)
        assert found[name] == pytest.approx(float(hessian.trace()) / weight.numel(), rel=0.1)
    assert found["small.weight"] < found["second.weight"]


def test_what_is_heard_least_keeps_least() -> None:
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    chosen = driver(Two().eval(), (x,))
    chosen.run(Prune(Unstructured(), density=0.5, allocation="sensitivity", spread=0.2))
    kept = {name: float((chosen.program.weights[f"{name}.weight"] != 0).float().mean()) for name in ("first", "small")}
    assert kept["small"] < 0.4 < kept["first"]
    total = sum(int((chosen.program.weights[f"{name}.weight"] != 0).sum()) for name in ("first", "second", "small"))
    assert abs(total - 52) <= 1


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_densities_are_shared_out_once_for_all_blocks(method: str) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4)])})

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model["layers"]

        def forward(self, x: Tensor) -> Tensor:
            for place, layer in enumerate(self.layers):  # type: ignore[arg-type]
                x = layer(x) * 3.0**-place
            return x

    chosen = driver(Stack().eval(), (torch.randn(50, 16),))
    step = Prune(Unstructured(), density=0.5, method=method, allocation="sensitivity")  # type: ignore[arg-type]
    chosen.run(step)
    kept = [float((chosen.program.weights[f"layers.{layer}.0.weight"] != 0).float().mean()) for layer in range(4)]
    assert len(set(kept)) == 4
    assert sum(kept) / 4 == pytest.approx(0.5, abs=0.005)
    assert max(kept) == pytest.approx(0.6, abs=0.005)


def test_blocks_have_densities_and_integers_no_gradients() -> None:
    model, inputs = models()["linear"]
    chosen = driver(model, inputs)
    chosen.run(Prune(Blocks((1, "all")), density=0.5, allocation="sensitivity"))
    rows = [int((chosen.program.weights[name] != 0).any(-1).sum()) for name in ("0.weight", "2.weight")]
    assert rows == [11, 4]  # of 24 and 6: 0.46 and 0.66, by the bisection

    class Choice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).argmax(-1)

    chosen = driver(Choice(), (torch.randn(4, 8),))
    chosen.run(Prune(Unstructured(), density=0.25, allocation="sensitivity"))
    assert int((chosen.program.weights["layer.weight"] != 0).sum()) == 16
    assert [each.what for each in chosen.diagnostics if "density" in each.what] == [
        "every matrix keeps the same density"
    ]
