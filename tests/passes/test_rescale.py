"""Scales fitted to the codes that a sweep chose: against plain least squares, and never worse."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparc.encoding.grid import Grid
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.nm import NM
from sparc.passes.round.gptq import column_of, refined
from sparc.passes.second_order.factor import factor
from sparc.passes.second_order.gram import reconstruction_error
from sparc.passes.second_order.rescale import rescaled
from sparc.passes.second_order.sweep import sweep
from tests.passes.test_gptq import correlated, gram_of

SPECS = [
    IntGrid(3, group=8, symmetric=False),
    IntGrid(4, group=8),
    IntGrid(3, group="channel"),
    IntGrid(4, group=16, symmetric=False, scale_dtype="float16"),  # the last group is short
    NM(2, 4, of=IntGrid(4, group=8)),
]


def weights(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))


def rounded(spec: IntGrid | NM, weight: Tensor) -> tuple[Tensor, Grid]:
    grid = spec.fit(weight)
    return spec.round(weight, grid)[None], grid


def plain(units: Tensor, weight: Tensor, x: Tensor, ridge: float, width: int) -> Tensor:
    """Each row's scales by least squares on the inputs themselves, `sqrt(ridge) I` below them."""
    rows = torch.cat([x.double() / len(x) ** 0.5, ridge**0.5 * torch.eye(x.shape[1], dtype=torch.float64)])
    found = []
    for own, wanted in zip(units.double(), weight.double(), strict=True):
        design = torch.stack([part.sum(1) for part in (rows * own).split(width, dim=1)], dim=1)
        found.append(torch.linalg.lstsq(design, (rows @ wanted)[:, None]).solution[:, 0])
    return torch.stack(found)


def test_scales_are_those_of_least_squares() -> None:
    weight, x, spec = weights(12, 24), correlated(200, 24), IntGrid(3, group=8, symmetric=False)
    values, grid = rounded(spec, weight)
    ridge = torch.tensor([0.3])
    found = rescaled(grid, values, weight[None], gram_of(x), ridge)
    assert found is not None
    units = values[0] / grid.tensors["scale"].repeat_interleave(8, 1)
    wanted = plain(units, weight, x, 0.3, 8)
    positive = (wanted > 0).all(1)
    assert positive.sum() >= 6
    torch.testing.assert_close(found[1].tensors["scale"][positive].double(), wanted[positive], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1].tensors["scale"][~positive], grid.tensors["scale"][~positive])
    assert torch.equal(found[1].tensors["zero"], grid.tensors["zero"])
    assert torch.equal(spec.round(found[0][0], found[1]), found[0][0])  # it lies on the new grid


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_products_of_no_row_get_worse_and_most_get_better(spec: IntGrid | NM) -> None:
    weight, x = weights(32, 24), correlated(300, 24)
    gram = gram_of(x)
    prepared = factor(gram, descending=True)
    _, grid = rounded(spec, weight)
    swept = sweep(weight[None], prepared, column_of(grid, weight.shape, masked=True)).weight
    values, changed = refined(grid, weight.shape, swept, weight[None], gram, prepared)
    assert torch.equal(changed.spec.round(values[0], changed), values[0])
    before, after = (reconstruction_error(each - weight, gram)[0] for each in (swept, values))
    assert (after <= before * (1 + 1e-6)).all()
    assert (after < before * 0.999).float().mean() > 0.7
    if isinstance(spec, NM):
        assert torch.equal(changed.tensors["mask"], grid.tensors["mask"])
        assert not values[0][~spec.spread(grid.tensors["mask"], weight.shape)].any()


def test_groups_of_inputs_have_their_own_gram_matrices() -> None:
    weight, spec = weights(8, 16), IntGrid(3, group=8)
    grams = torch.cat([gram_of(correlated(100, 16, seed)) for seed in (0, 1)])
    values, grid = rounded(spec, weight)
    ridge = torch.tensor([0.1, 0.2])
    both = rescaled(grid, values.reshape(2, 4, 16), weight.reshape(2, 4, 16), grams, ridge)
    assert both is not None
    for index in (0, 1):
        rows = slice(4 * index, 4 * index + 4)
        part = replace(grid, tensors={"scale": grid.tensors["scale"][rows]})
        alone = rescaled(part, values[:, rows], weight[None, rows], grams[index : index + 1], ridge[index : index + 1])
        assert alone is not None
        torch.testing.assert_close(both[1].tensors["scale"][rows], alone[1].tensors["scale"])


def test_a_group_of_zeros_keeps_its_scale() -> None:
    weight = weights(4, 16)
    weight[:, :8] = 0
    values, grid = rounded(IntGrid(4, group=8), weight)
    found = rescaled(grid, values, weight[None], gram_of(correlated(50, 16)), torch.tensor([0.1]))
    assert found is not None
    assert torch.equal(found[1].tensors["scale"][:, 0], grid.tensors["scale"][:, 0])


@pytest.mark.parametrize(
    "spec", [IntGrid(4, group="tensor"), IntGrid(4, group=8, symmetric=False, zero="minimum")], ids=str
)
def test_other_grids_stay(spec: IntGrid) -> None:
    weight = weights(4, 16)
    values, grid = rounded(spec, weight)
    assert rescaled(grid, values, weight[None], gram_of(correlated(50, 16)), torch.tensor([0.1])) is None
