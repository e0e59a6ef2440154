"""Float minima apart from codes: nothing is rounded anew, and only entries with a cache are touched."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparc.cache import Cache
from sparc.driver import Driver
from sparc.encoding.int_grid import IntGrid
from sparc.passes.activation.minimum import SplitMinimum, write_digits
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
def test_one_product_of_codes_has_the_same_values(spec: IntGrid) -> None:
    chosen, before, after = split(spec)
    assert float((after[0] - before[0]).norm() / before[0].norm()) < 1e-4
    text = chosen.program.text()
    assert text.count("= linear(") == 3 + 2
    assert text.count("= sum.dim_IntList(") == 2  # the two products of x share theirs
    for name in ("gate", "up", "down"):
        grid = chosen.program.grid(f"{name}.weight")
        assert grid is not None
        assert grid.spec == IntGrid(spec.bits, 16, symmetric=False, scale_dtype=spec.scale_dtype)
    chosen.run(Encode())
    torch.testing.assert_close(chosen.program.run_flat(chosen.samples.held_out["forward"][0]), after, rtol=0, atol=0)


def test_codes_meet_x_without_their_mean() -> None:
    """What rounding x changes is multiplied by the distance from an integer zero point, not by codes from 0 on."""
    weights = torch.tensor([[0.0, 1.0, 7.0, 15.0]]).repeat(1, 8) * 0.5 - 3.7
    chosen = driver(nn.Linear(32, 1, bias=False), (torch.randn(2, 32),))
    chosen.run(Canonicalize())
    chosen.program.main.cache = Cache((), 64)
    chosen.program.set_weight("weight", weights)
    chosen.run(Round(IntGrid(4, group=32, symmetric=False, zero="minimum")))
    chosen.run(SplitMinimum())
    grid = chosen.program.grid("weight")
    assert grid is not None
    assert grid.tensors["zero"][0, 0] == 7  # 3.7 / 0.5 = 7.4
    torch.testing.assert_close(chosen.program.weights["weight"][0, :4], weights[0, :4] + 0.2)


@pytest.mark.parametrize("groups", [1, 5, 18])
@pytest.mark.parametrize(("bits", "steps"), [(4, 15**3), (8, 255**2)])
def test_digits_hold_numbers_to_half_a_last_step(groups: int, bits: int, steps: int) -> None:
    """The plain definition: the number is the sum of its columns, each its code's value times its factor."""
    numbers = torch.randn(7, groups, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    numbers[3] = 0
    spec = IntGrid(bits, group=16, symmetric=False)
    digits = write_digits(numbers, spec)
    assert digits.codes.shape[1] % 16 == 0
    scale = digits.scale.double().repeat_interleave(16, dim=1)
    found = torch.zeros_like(numbers)
    for column in range(digits.codes.shape[1]):
        value = (digits.codes[:, column].double() - digits.zero) * scale[:, column]
        found += value[:, None] * digits.factors[column].double()
    largest = numbers.abs().amax(1)
    worst = largest / steps + largest * 2**-23  # scales are float32
    assert bool(((found - numbers).abs().amax(1) <= worst).all())
    assert not found[3].any()


def test_other_entries_and_grids_stay() -> None:
    for spec, cached in ((MINIMA, False), (IntGrid(4, group=16, symmetric=False), True)):
        chosen, _, _ = split(spec, cached=cached)
        assert chosen.ledger.passes[-1].changed == 0


def test_groups_without_a_product_are_skipped() -> None:
    chosen, _, _ = split(IntGrid(4, group=8, symmetric=False, zero="minimum"))
    row = chosen.ledger.passes[-1]
    assert row.changed == 0
    assert len(row.skips) == 3
