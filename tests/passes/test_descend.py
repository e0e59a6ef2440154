"""Coordinate descent behind a sweep: the published formula in float64, and that no single code could be better."""

import pytest
import torch
from torch import Tensor

from sparc.encoding.int_grid import IntGrid
from sparc.encoding.nm import NM
from sparc.passes.round.gptq import column_of
from sparc.passes.second_order.descend import ROUNDS, descended
from sparc.passes.second_order.factor import factor
from sparc.passes.second_order.sweep import sweep
from tests.passes.test_gptq import correlated, gram_of

GRID = IntGrid(3, group=8, symmetric=False)


def weights(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(5))


def damped(gram: Tensor, damping: float = 0.01) -> Tensor:
    return gram[0] + damping * gram[0].diagonal().mean() * torch.eye(gram.shape[-1])


def error(values: Tensor, weight: Tensor, gram: Tensor) -> Tensor:
    """Of each row: `d H dᵀ`."""
    change = (values - weight).double()
    return ((change @ damped(gram)) * change).sum(-1)


def plain(start: Tensor, weight: Tensor, gram: Tensor, order: list[int], rounds: int) -> Tensor:
    """Each code is tried at every value of its grid, with all the others as they are."""
    grid = GRID.fit(weight)
    scale, zero = (grid.tensors[name].double().repeat_interleave(8, 1) for name in ("scale", "zero"))
    values = start.double().clone()
    for _ in range(rounds):
        for j in order:
            trials = []
            for code in range(8):
                trial = values.clone()
                trial[:, j] = (code - zero[:, j]) * scale[:, j]
                trials.append(trial)
            best = torch.stack([error(trial, weight, gram) for trial in trials]).argmin(0)
            values = torch.stack([trials[at][row] for row, at in enumerate(best.tolist())])
    return values


@pytest.mark.parametrize("columns", [24, 160])  # within a block, and over two
def test_each_column_takes_the_best_value_on_its_grid(columns: int) -> None:
    weight, gram = weights(6, columns), gram_of(correlated(300, columns))
    prepared, grid = factor(gram, descending=True), GRID.fit(weight)
    nearest = GRID.round(weight, grid)
    found = descended(nearest[None], weight[None], gram, prepared, column_of(grid, weight.shape, masked=True))
    expected = plain(nearest, weight, gram, prepared.order.tolist(), ROUNDS)
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", [GRID, NM(2, 4, of=IntGrid(4, group=8))], ids=str)
def test_no_row_gets_worse_and_most_get_better(spec: IntGrid | NM) -> None:
    weight, gram = weights(64, 48), gram_of(correlated(300, 48))
    prepared, grid = factor(gram, descending=True), spec.fit(weight)
    column = column_of(grid, weight.shape, masked=True)
    swept = sweep(weight[None], prepared, column).weight
    found = descended(swept, weight[None], gram, prepared, column)
    before, after = error(swept[0], weight, gram), error(found[0], weight, gram)
    assert (after <= before * (1 + 1e-6)).all()
    assert (after < before * 0.999).float().mean() > 0.5
    assert torch.equal(spec.round(found[0], grid), found[0])


def test_groups_of_inputs_descend_by_themselves() -> None:
    weight = weights(8, 16)
    grams = torch.cat([gram_of(correlated(100, 16, seed)) for seed in (0, 1)])
    grid = GRID.fit(weight)
    nearest, prepared = GRID.round(weight, grid).reshape(2, 4, 16), factor(grams)
    column = column_of(grid, weight.shape, masked=True)
    both = descended(nearest, weight.reshape(2, 4, 16), grams, prepared, column)
    for at in (0, 1):
        rows = slice(4 * at, 4 * at + 4)
        part = GRID.fit(weight[rows])
        own = column_of(part, torch.Size((4, 16)), masked=True)
        gram = grams[at : at + 1]
        alone = descended(nearest[at : at + 1], weight[None, rows], gram, factor(gram), own)
        torch.testing.assert_close(both[at], alone[0])
