"""Compensation: values are chosen once more on grids, and under masks, that are there already."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from sparc.capture import capture
from sparc.contract import Approximate
from sparc.diag import PassError
from sparc.driver import Driver
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.nm import NM
from sparc.pass_base import Pass, PassContext, Samples, Stage
from sparc.passes.encode import Encode
from sparc.passes.low_rank import LowRank
from sparc.passes.prune import PermuteChannels, Prune
from sparc.passes.round import Compensate, Round
from sparc.program import Program

GRID = IntGrid(3, group=8, symmetric=False)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16)).eval()


def batches(count: int = 6) -> list[list[Tensor]]:
    mix = torch.randn(24, 24, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 2, 24)[:, None]
    return [[torch.randn(64, 24, generator=torch.Generator().manual_seed(2 + seed)) @ mix] for seed in range(count)]


def driver() -> Driver:
    given = batches()
    samples = Samples({"forward": given[:1]}, {"forward": given[1:]}, synthetic=False)
    return Driver(capture(model(), tuple(given[0])), samples)


def compress(*steps: Pass) -> Program:
    chosen = driver()
    for step in steps:
        chosen.run(step)
    return chosen.program


def errors(program: Program) -> Tensor:
    """The mean squared error of each output of the first product, whose inputs nothing has changed."""
    dense = driver().program.weights["0.weight"].double()
    x = torch.cat([batch[0] for batch in batches()[1:]]).double()
    return ((program.weights["0.weight"].double() - dense) @ x.T).square().mean(1)


def test_refitted_scales_leave_less_error() -> None:
    plain, refit = compress(Round(GRID), Compensate()), compress(Round(GRID), Compensate(refit=True))
    assert (errors(refit) <= errors(plain) * (1 + 1e-6)).all()
    assert errors(refit).sum() < 0.98 * errors(plain).sum()


def test_on_a_grid_of_nearest_values_it_is_gptq() -> None:
    nearest, swept = compress(Round(GRID), Compensate()), compress(Round(GRID, method="gptq"))
    for name in ("0.weight", "2.weight"):
        assert torch.equal(nearest.weights[name], swept.weights[name])


@pytest.mark.parametrize("steps", [[Round(GRID)], [Prune(NM(2, 4))], [Prune(NM(2, 4)), Round(GRID)]])
def test_no_output_gets_worse_and_most_get_better(steps: list[Pass]) -> None:
    before, after = errors(compress(*steps)), errors(compress(*steps, Compensate()))
    assert bool((after <= before * (1 + 1e-5)).all())
    assert float(after.sum()) < 0.9 * float(before.sum())


def test_masks_and_grids_stay() -> None:
    before, after = compress(Prune(NM(2, 4)), Round(GRID)), compress(Prune(NM(2, 4)), Round(GRID), Compensate())
    for name in ("0.weight", "2.weight"):
        old, new = before.grid(name), after.grid(name)
        assert old is not None
        assert new is not None
        assert new.spec == old.spec
        assert all(torch.equal(new.tensors[part], old.tensors[part]) for part in old.tensors)
        assert bool((after.weights[name][~new.tensors["mask"]] == 0).all())
        assert not torch.equal(after.weights[name], before.weights[name])


def test_what_it_makes_is_encoded_exactly() -> None:
    chosen = driver()
    for step in (Round(GRID), Compensate()):
        chosen.run(step)
    row = chosen.run(Encode())
    assert (row.matches, len(row.skips)) == (2, 0)


def test_a_shared_budget_keeps_its_choice() -> None:
    budgeted = Round(GRID, finer=IntGrid(8), budget=0.265)
    specs = [
        {name: grid.spec for name in program.weights if (grid := program.grid(name)) is not None}
        for program in (compress(budgeted), compress(budgeted, Compensate()))
    ]
    assert specs[0] == specs[1]
    assert len(set(specs[0].values())) == 2


def test_without_grids_there_is_nothing_to_do() -> None:
    row = driver().run(Compensate())
    assert (row.matches, row.changed) == (0, 0)


def test_negative_damping_is_refused() -> None:
    with pytest.raises(PassError, match="SPARC209"):
        Compensate(damping=-1)


@dataclass(frozen=True)
class Shorten(Pass):
    """Stands for every pass that approximates before others rewrite the weights."""

    name: ClassVar[str] = "shorten"
    stage: ClassVar[Stage] = Stage.CUT

    @property
    def contract(self) -> Approximate:
        """A weight changes a little."""
        return Approximate()

    def run(self, program: Program, context: PassContext) -> None:
        """Make a weight a thousandth smaller."""
        program.set_weight("2.weight", program.weights["2.weight"] * 0.999)


def test_it_aims_at_what_equal_rewrites_made_of_a_cut_model() -> None:
    given = batches()
    found = []
    for last in ([], [Compensate()]):
        chosen = driver()
        expected = chosen.program.run_flat(given[0])[0]
        for step in (Shorten(), PermuteChannels(NM(2, 4)), Prune(NM(2, 4)), Round(GRID), *last):
            chosen.run(step)
        found.append(float((chosen.program.run_flat(given[0])[0] - expected).square().mean()))
    assert found[1] < found[0]


def test_the_factors_of_a_weight_are_compensated_too() -> None:
    chosen = driver()
    for step in (LowRank(rank=8), Round(GRID)):
        chosen.run(step)
    row = chosen.run(Compensate())
    assert (row.changed, row.skips) == (4, [])


def test_what_only_factors_have_changed_is_left_alone() -> None:
    chosen = driver()
    chosen.run(LowRank(rank=2, beside=IntGrid(8)))
    row = chosen.run(Compensate())
    assert row.changed == 0
    assert {skip.why for skip in row.skips} == {"no mask and no rounding has changed it"}
