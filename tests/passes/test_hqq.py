"""HQQ: minima as a plain loop in float64 finds them, never worse than those of the range, without data."""

import pytest
import torch
from torch import Tensor, nn

from sparc.diag import PassError
from sparc.encoding.base import Encoding
from sparc.encoding.codebook import Codebook
from sparc.encoding.half_quadratic import half_quadratic
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.nm import NM
from sparc.passes.prune import Prune
from sparc.passes.round import Round
from tests.passes.models import driver, models, run

SPEC = IntGrid(3, 16, symmetric=False, zero="minimum")


def heavy(*shape: int, seed: int = 0) -> Tensor:
    """Weights with outliers."""
    torch.manual_seed(seed)
    weight = torch.randn(*shape)
    return torch.where(torch.rand(*shape) < 0.05, 4 * weight, weight)


def plain(group: list[float], levels: int) -> tuple[float, float]:
    """The published iteration for one group: scale and zero point (in codes), `w' = (q - z) * scale`."""
    scale = (max(group) - min(group)) / (levels - 1)
    w = torch.tensor(group, dtype=torch.float64) / scale
    z = best = -float(w.min())
    least, beta = float("inf"), 10.0
    for _ in range(21):
        q = torch.round(w + z).clamp(0, levels - 1)
        e = w - (q - z)
        error = float((e.abs() ** 0.7).sum())
        best, least = (z, error) if error < least else (best, least)
        taken = [torch.sign(each) * max(0.0, abs(each) - abs(each) ** -0.3 / beta) if each else 0.0 for each in e]
        z = float((q - (w - torch.tensor(taken, dtype=torch.float64))).mean())
        beta *= 1.01
    return scale, best


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_minima_are_those_of_the_published_iteration(bits: int) -> None:
    spec = IntGrid(bits, 16, symmetric=False, zero="minimum")
    weight = heavy(5, 40, seed=bits)  # the last group of a row is shorter
    grid = half_quadratic(weight, spec.fit(weight))
    for row in range(5):
        for index, start in enumerate((0, 16, 32)):
            scale, zero = plain(weight[row, start : start + 16].tolist(), 2**bits)
            assert float(grid.tensors["scale"][row, index]) == pytest.approx(scale, rel=1e-6)
            assert float(grid.tensors["minimum"][row, index]) == pytest.approx(-zero * scale, abs=1e-4 * scale)


def errors(weight: Tensor, fit: str) -> Tensor:
    """`sum |e|^0.7` of each group."""
    model = nn.Linear(64, 24, bias=False, dtype=weight.dtype)
    model.weight = nn.Parameter(weight)
    step = Round(SPEC, fit=fit)  # type: ignore[arg-type]
    found = run(model, (torch.randn(3, 64, dtype=weight.dtype),), step).weights["weight"]
    return ((found - weight).double().abs() ** 0.7).reshape(24, 4, 16).sum(-1)


def test_no_group_gets_worse() -> None:
    weight = heavy(24, 64)
    ranged, found = errors(weight, "range"), errors(weight, "hqq")
    assert bool((found <= ranged * (1 + 1e-5)).all())
    assert float((found < 0.99 * ranged).double().mean()) > 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_groups_together_get_better(dtype: torch.dtype) -> None:
    weight = heavy(24, 64).to(dtype)
    assert float(errors(weight, "hqq").sum()) < 0.98 * float(errors(weight, "range").sum())


def test_the_unit_of_the_weights_does_not_matter() -> None:
    weight = heavy(6, 32)
    one, other = (half_quadratic(each, SPEC.fit(each)) for each in (weight, weight * 2.0**-9))
    assert torch.equal(one.tensors["minimum"] * 2.0**-9, other.tensors["minimum"])


def test_weights_on_a_grid_stay() -> None:
    weight = torch.tensor([[0.5, 1.0, 4.0, 2.5] * 4])
    assert torch.equal(run_on(weight), weight)


def run_on(weight: Tensor) -> Tensor:
    model = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    model.weight = nn.Parameter(weight)
    return run(model, (torch.randn(2, weight.shape[1]),), Round(SPEC, fit="hqq")).weights["weight"]


def test_what_a_mask_drops_does_not_count() -> None:
    weight = heavy(6, 32)
    grid = NM(2, 4, of=SPEC).fit(weight)
    dropped = ~grid.tensors["mask"]
    found = half_quadratic(weight, grid)
    assert torch.equal(
        half_quadratic(weight.masked_fill(dropped, 9.0), grid).tensors["minimum"], found.tensors["minimum"]
    )
    assert not torch.equal(found.tensors["minimum"], grid.tensors["minimum"])
    kept = grid.tensors["mask"]

    def error(each: Tensor) -> Tensor:
        return ((each - weight).abs() ** 0.7 * kept).sum()

    assert float(error(found.spec.round(weight, found))) < float(error(grid.spec.round(weight, grid)))


def test_a_mask_stays_and_nothing_is_measured() -> None:
    model, inputs = models()["linear"]
    chosen = driver(model, inputs)
    chosen.run(Prune(NM(2, 4)))
    zeros = chosen.program.weights["0.weight"] == 0
    step = Round(SPEC, fit="hqq")
    chosen.run(step)
    grid = chosen.program.grid("0.weight")
    assert grid is not None
    assert grid.spec == NM(2, 4, of=SPEC)
    assert bool((chosen.program.weights["0.weight"][zeros] == 0).all())
    assert not step.needs


@pytest.mark.parametrize("encoding", [IntGrid(4, 16), IntGrid(4, 16, symmetric=False), Codebook()], ids=str)
def test_only_grids_with_a_minimum_have_one_to_look_for(encoding: Encoding) -> None:
    with pytest.raises(PassError, match="has no floating minimum"):
        Round(encoding, fit="hqq")
    with pytest.raises(PassError, match="has no floating minimum"):
        Round(SPEC, fit="hqq", finer=encoding, budget=0.5)


def test_bad_options() -> None:
    with pytest.raises(PassError, match="weighs no errors"):
        Round(SPEC, fit="hqq", importance="data")
    with pytest.raises(PassError, match="option 'fit' of 'round' is 'mean'"):
        Round(SPEC, fit="mean")  # type: ignore[arg-type]
