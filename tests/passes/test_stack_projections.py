"""Queries, keys and values of an attention over a cache as one product."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparc.cache import Cache
from sparc.driver import Driver
from sparc.encoding.int_grid import IntGrid
from sparc.passes.canonicalize import Canonicalize
from sparc.passes.coalesce import coalesce_parallel, stack_projections
from sparc.passes.round import Round
from tests.passes.models import driver


class Step(nn.Module):
    """Attention whose queries come from `x`, keys and values from it or from another value."""

    def __init__(self, *, apart: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16)
        self.apart = apart

    def forward(self, x: Tensor, key: Tensor, value: Tensor) -> Any:
        y = x * 2 if self.apart else x
        q, k, v = (f(z).view(2, 3, -1, 8).transpose(1, 2) for f, z in ((self.q, x), (self.k, x), (self.v, y)))
        k, v = torch.cat([key, k], 2), torch.cat([value, v], 2)
        mask = torch.ones(3, 7, dtype=torch.bool).tril(4)
        return nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True), k, v


def stacked(model: nn.Module, *grids: tuple[str, IntGrid], cached: bool = True) -> Driver:
    torch.manual_seed(0)
    chosen = driver(model, (torch.randn(2, 3, 32), torch.randn(2, 2, 4, 8), torch.randn(2, 2, 4, 8)))
    chosen.run(Canonicalize())
    chosen.program.main.cache = Cache((), 64) if cached else None
    for where, grid in grids:
        chosen.run(Round(grid), where, lambda site, name=where: site.weight.startswith(name))
    chosen.run(stack_projections)
    return chosen


def products(chosen: Driver) -> list[list[int]]:
    linears = [node for node in chosen.program.graph.nodes if node.target is torch.ops.aten.linear.default]
    return [list(chosen.program.weights[str(node.args[1].target)].shape) for node in linears]


def test_three_products_become_one() -> None:
    assert products(stacked(Step())) == [[64, 32]]


class Gate(nn.Module):
    """A gate of one value, or of two."""

    def __init__(self, *, apart: bool = False) -> None:
        super().__init__()
        self.gate, self.up, self.apart = nn.Linear(32, 48), nn.Linear(32, 48), apart

    def forward(self, x: Tensor) -> Any:
        return nn.functional.silu(self.gate(x)) * self.up(x * 2 if self.apart else x)


@pytest.mark.parametrize(("apart", "cached"), [(False, True), (True, True), (False, False)])
def test_the_products_of_a_gate_become_one(apart: bool, cached: bool) -> None:
    torch.manual_seed(0)
    model, x = Gate(apart=apart), torch.randn(2, 3, 32)
    chosen = driver(model, (x,))
    chosen.run(Canonicalize())
    chosen.program.main.cache = Cache((), 64) if cached else None
    chosen.run(stack_projections)
    assert products(chosen) == ([[96, 32]] if cached and not apart else [[48, 32], [48, 32]])
    torch.testing.assert_close(chosen.program.run_flat([x])[0], model(x))


def test_only_of_one_value_and_over_a_cache() -> None:
    apart = [[32, 32], [16, 32], [16, 32]]
    assert products(stacked(Step(apart=True))) == apart
    assert products(stacked(Step(), cached=False)) == apart


@pytest.mark.parametrize("grid", [IntGrid(8), IntGrid(4, 16, symmetric=False), IntGrid(4, 8, False, "minimum")])
def test_stacked_weights_stay_on_their_grids(grid: IntGrid) -> None:
    chosen = stacked(Step(), ("", grid))
    assert products(chosen) == [[64, 32]]
    (node,) = [node for node in chosen.program.graph.nodes if node.target is torch.ops.aten.linear.default]
    record = chosen.program.weights.record(str(node.args[1].target))
    assert record.grid is not None
    assert record.grid.spec == grid
    codes = grid.codes(record.tensor, record.grid.tensors)
    assert torch.equal(grid.values(codes, record.grid.tensors, torch.float32), record.tensor)


def test_other_grids_are_left_alone() -> None:
    mixed = (("q", IntGrid(8)), ("k", IntGrid(4, 16)), ("v", IntGrid(4, 16)))
    assert len(products(stacked(Step(), *mixed))) == 3
    whole = dataclasses.replace(IntGrid(8), group="tensor")
    assert len(products(stacked(Step(), ("", whole)))) == 3
    chosen = stacked(Step(), *mixed)
    chosen.run(coalesce_parallel)
    assert sorted(products(chosen)) == [[32, 32], [32, 32]]
