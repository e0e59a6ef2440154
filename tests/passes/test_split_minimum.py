"""Float minima apart from codes: nothing is rounded anew, and only entries with a cache are touched."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparc.cache import Cache
from sparc.driver import Driver
from sparc.encoding.int_grid import IntGrid
from sparc.passes.activation.minimum import SplitMinimum
from sparc.passes.canonicalize import Canonicalize
from sparc.passes.encode import Encode
from sparc.passes.round import Round
from tests.passes.models import driver

MINIMA = IntGrid(4, group=16, symmetric=False, zero="minimum", scale_dtype="float16")


class Gate(nn.Module):
    """Two products of one value, one of them with a bias, and a third behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(32, 48, bias=False), nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Any:
        return self.down(torch.relu(self.gate(x)) * self.up(x))


def split(spec: IntGrid = MINIMA, *, cached: bool = True) -> tuple[Driver, list[Tensor], list[Tensor]]:
    """The driver behind the pass, and the outputs before and after."""
    torch.manual_seed(0)
    chosen = driver(Gate(), (torch.randn(2, 3, 32),))
    chosen.run(Canonicalize())
    chosen.program.main.cache = Cache((), 64) if cached else None
    chosen.run(Round(spec))
    inputs = chosen.samples.held_out["forward"][0]
    before = chosen.program.run_flat(inputs)
    chosen.run(SplitMinimum())
    return chosen, before, chosen.program.run_flat(inputs)


@pytest.mark.parametrize("spec", [MINIMA, IntGrid(8, group=16, symmetric=False, zero="minimum")])
def test_the_same_values_in_two_terms(spec: IntGrid) -> None:
    chosen, before, after = split(spec)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    text = chosen.program.text()
    assert text.count("= linear(") == 6
    assert text.count("= sum.dim_IntList(") == 2  # the two products of x share theirs
    for name in ("gate", "up", "down"):
        grid = chosen.program.grid(f"{name}.weight")
        assert grid is not None
        assert grid.spec == IntGrid(spec.bits, 16, symmetric=False, scale_dtype=spec.scale_dtype)
        assert not grid.tensors["zero"].any()
    chosen.run(Encode())
    torch.testing.assert_close(chosen.program.run_flat(chosen.samples.held_out["forward"][0]), after, rtol=0, atol=0)


def test_other_entries_and_grids_stay() -> None:
    for spec, cached in ((MINIMA, False), (IntGrid(4, group=16, symmetric=False), True)):
        chosen, _, _ = split(spec, cached=cached)
        assert chosen.ledger.passes[-1].changed == 0


def test_groups_without_a_product_are_skipped() -> None:
    chosen, _, _ = split(IntGrid(4, group=8, symmetric=False, zero="minimum"))
    row = chosen.ledger.passes[-1]
    assert row.changed == 0
    assert len(row.skips) == 3
