"""Round: the numbers by hand, the promise of the search, masks, floors, and what is left alone."""

import pytest
import torch
from torch import Tensor, nn

from sparc.analysis.sites import find_sites
from sparc.calibration import Calibration
from sparc.driver import Driver
from sparc.encoding.base import Encoding
from sparc.encoding.blocks import Blocks
from sparc.encoding.grid import Grid
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.nm import NM
from sparc.pass_base import PassContext
from sparc.passes.prune import Prune
from sparc.passes.round import Round
from sparc.passes.round.importance import column_importance
from sparc.passes.round.weights import damped
from tests.passes.models import driver, models, run


def linear(weight: Tensor) -> nn.Linear:
    model = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    model.weight = nn.Parameter(weight)
    return model


def rounded(weight: Tensor, step: Round) -> Tensor:
    return run(linear(weight), (torch.randn(3, weight.shape[1]),), step).weights["weight"]


def grid_of(chosen: Driver, name: str) -> Grid:
    grid = chosen.program.grid(name)
    assert grid is not None
    return grid


# numbers --------------------------------------------------------------------------------------------------------------
def test_symmetric_codes_by_hand() -> None:
    weight = torch.tensor([[7.0, -3.4, 1.6, 0.2], [0.0, 14.0, -5.2, 9.0]])
    expected = torch.tensor([[7.0, -3.0, 2.0, 0.0], [0.0, 14.0, -6.0, 8.0]])
    assert torch.equal(rounded(weight, Round(IntGrid(4, group=4))), expected)


def test_integer_zero_point_by_hand() -> None:
    weight = torch.tensor([[-3.0, 12.0, 4.4, 0.0, -15.0, 0.0, -7.6, -1.2]])
    expected = torch.tensor([[-3.0, 12.0, 4.0, 0.0, -15.0, 0.0, -8.0, -1.0]])
    assert torch.equal(rounded(weight, Round(IntGrid(4, group=4, symmetric=False))), expected)


def test_minimum_by_hand() -> None:
    weight = torch.tensor([[0.5, 15.5, 4.6, 9.2] * 4])
    expected = torch.tensor([[0.5, 15.5, 4.5, 9.5] * 4])
    step = Round(IntGrid(4, group=16, symmetric=False, zero="minimum"))
    assert torch.equal(rounded(weight, step), expected)


def test_one_scale_for_the_whole_tensor_or_for_each_channel() -> None:
    weight = torch.tensor([[127.0, 1.4, -2.6, 0.3] * 2, [1.27, 0.004, -0.026, 0.0] * 2])
    assert torch.equal(rounded(weight, Round(IntGrid(8, group="tensor")))[1], torch.tensor([1.0, 0, 0, 0] * 2))
    per_channel = rounded(weight, Round(IntGrid(8)))
    torch.testing.assert_close(per_channel[1], torch.tensor([1.27, 0.0, -0.03, 0.0] * 2))


# the search -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("spec", [IntGrid(4, 8, symmetric=False), IntGrid(4, 8), IntGrid(2, 8), IntGrid(8)], ids=str)
@pytest.mark.parametrize("importance", ["none", "data"])
def test_the_search_is_never_worse_in_any_group(spec: IntGrid, importance: str) -> None:
    torch.manual_seed(1)
    model = linear(torch.randn(12, 24) ** 3)
    inputs = (torch.randn(64, 24) * torch.logspace(-2, 2, 24),)
    cost = damped(inputs[0].square().mean(0)) if importance == "data" else torch.ones(24)

    def errors(step: Round) -> Tensor:
        squared = (run(model, inputs, step).weights["weight"] - model.weight.detach()).square() * cost
        return squared.reshape(12, -1, 24 if spec.group == "channel" else 8).sum(-1)

    least, plain = errors(Round(spec, fit="search", importance=importance)), errors(Round(spec))  # type: ignore[arg-type]
    assert bool((least <= plain * (1 + 1e-5)).all())
    assert float(least.sum()) < float(plain.sum())


def test_columns_that_read_little_may_be_rounded_badly() -> None:
    weight = torch.tensor([[8.0, 1.0, 2.0, -3.0, 0.5, -1.5, 2.5, 3.5]])
    inputs = (torch.ones(4, 8) * torch.tensor([1e-3, 1, 1, 1, 1, 1, 1, 1]),)

    def errors(importance: str) -> Tensor:
        step = Round(IntGrid(4, 8, symmetric=False), fit="search", importance=importance)  # type: ignore[arg-type]
        return (run(linear(weight), inputs, step).weights["weight"] - weight).square()[0]

    plain, weighted = errors("none"), errors("data")
    assert float(weighted[1:].sum()) < float(plain[1:].sum())
    assert float(weighted[0]) > float(plain[0])


def test_columns_that_calibration_never_met_still_count() -> None:
    """Other inputs may meet them, so they are not cut down to the range of the columns that it met."""
    torch.manual_seed(0)
    never = torch.arange(32) % 4 == 0
    weight = torch.randn(6, 32) * torch.where(never, 12.0, 1.0)
    step = Round(IntGrid(4, 16), fit="search", importance="data")
    error = run(linear(weight), (torch.randn(8, 32) * ~never,), step).weights["weight"] - weight
    assert float(error[:, never].abs().mean()) < float(weight[:, never].abs().mean()) / 2
    silent = (torch.zeros(8, 32),)
    uniform = run(linear(weight), silent, Round(IntGrid(4, 16), fit="search")).weights["weight"]
    assert torch.equal(run(linear(weight), silent, step).weights["weight"], uniform)


@pytest.mark.parametrize("name", ["grouped", "transposed", "depthwise", "pointwise", "flat"])
def test_importance_of_a_convolution_is_its_channels(name: str) -> None:
    model = {
        "grouped": nn.Conv2d(8, 16, 3, groups=2),
        "transposed": nn.ConvTranspose2d(8, 4, 3, groups=2),
        "depthwise": nn.Conv2d(8, 8, 3, groups=8),
        "pointwise": nn.Conv2d(8, 8, 1),
        "flat": nn.Conv1d(8, 8, 2),
    }[name]
    x = torch.randn(2, 8, 9) if name == "flat" else torch.randn(2, 8, 9, 9)
    x *= torch.arange(1.0, 9).reshape(8, *[1] * (x.ndim - 2))
    chosen = driver(model, (x,))
    (site,) = find_sites(chosen.program)[0]
    calibration = Calibration(chosen.program, chosen.samples.calibration)
    context = PassContext()
    context.statistics = calibration.gather(0, Round(importance="data").watches(chosen.program, context))
    found = column_importance(chosen.program, site, context)

    square = x.movedim(1, -1).square().flatten(0, -2).mean(0)
    expected = torch.empty_like(model.weight)
    inputs, outputs = 8 // model.groups, model.out_channels // model.groups
    for group in range(model.groups):
        for out in range(outputs):
            for channel in range(inputs):
                if name == "transposed":
                    expected[group * inputs + channel, out] = square[group * inputs + channel]
                else:
                    expected[group * outputs + out, channel] = square[group * inputs + channel]
    assert found is not None
    torch.testing.assert_close(found, site.view.to_matrix(expected))


# what stays -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("spec", [IntGrid(8), IntGrid(4, 8, symmetric=False, zero="minimum")], ids=str)
@pytest.mark.parametrize("pruning", [Prune(NM(2, 4)), Prune(Blocks((4, 4)), density=0.25)], ids=str)
def test_masks_survive(spec: IntGrid, pruning: Prune) -> None:
    model, inputs = models()["linear"]
    chosen = driver(model, inputs)
    chosen.run(pruning)
    zeros = chosen.program.weights["0.weight"] == 0
    chosen.run(Round(spec))
    assert bool((chosen.program.weights["0.weight"][zeros] == 0).all())
    grid = grid_of(chosen, "0.weight")
    assert grid.spec == pruning.pattern.around(spec)
    assert torch.equal(grid.spec.spread(grid.tensors["mask"], (24, 24)), ~zeros)  # type: ignore[attr-defined]


@pytest.mark.parametrize("step", [Round(), Round(IntGrid(4, 8, symmetric=False), fit="search")], ids=str)
def test_rounding_twice_is_rounding_once(step: Round) -> None:
    for model, inputs in models().values():
        chosen = driver(model, inputs)
        first = chosen.run(step)
        weights = dict(chosen.program.weights)
        again = chosen.run(step)
        assert first.matches > 0
        assert (again.matches, again.changed) == (0, 0)
        assert all(torch.equal(chosen.program.weights[name], value) for name, value in weights.items())


def test_a_weight_may_be_rounded_again_to_another_grid() -> None:
    model, inputs = models()["linear"]
    chosen = driver(model, inputs)
    chosen.run(Round(IntGrid(8)))
    chosen.run(Round(IntGrid(4, 8)))
    assert grid_of(chosen, "0.weight").spec == IntGrid(4, 8)


def test_everything_else_is_untouched() -> None:
    model, inputs = models()["convolutions"]
    before = driver(model, inputs).program
    after = run(model, inputs, Round())
    changed = [name for name in before.weights if not torch.equal(before.weights[name], after.weights[name])]
    assert changed == [name for name in before.weights if name.endswith("weight")]


def test_views_are_those_of_the_uses() -> None:
    views = {}
    for model, inputs in models().values():
        program = run(model, inputs, Round())
        views |= {name: grid.view for name in program.weights if (grid := program.grid(name)) is not None}
    assert views["grouped.weight"] == views["depthwise.weight"] == "conv"
    assert views["transposed.weight"] == "conv_transposed:2"
    assert views["first"] == views["experts"] == "transposed"
    assert views["embedding.weight"] == "matrix"


# what is left alone ---------------------------------------------------------------------------------------------------
def test_sites_below_the_floor_are_restored() -> None:
    model, inputs = models()["linear"]
    with torch.no_grad():
        model[0].weight[:, 0] = 100.0
        inputs[0][:, 0] = 0.0
    chosen = driver(model, inputs)
    row = chosen.run(Round(IntGrid(4), floor=18.0))
    assert row.measured["restored"] == 1
    assert chosen.program.grid("0.weight") is None
    assert torch.equal(chosen.program.weights["0.weight"], model[0].weight.detach())
    assert chosen.program.grid("2.weight") is not None
    assert [item.code.id for item in chosen.diagnostics] == ["SPARC302"]


def reasons(model: nn.Module, inputs: tuple[Tensor, ...], encoding: Encoding) -> dict[str, str]:
    chosen = driver(model, inputs)
    row = chosen.run(Round(encoding))
    for skip in row.skips:
        assert chosen.program.grid(skip.where) is None
    return {skip.where: skip.why for skip in row.skips}


class Odd(nn.Module):
    """Weights that cannot be rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.both_ways = nn.Parameter(torch.randn(16, 16))
        self.register_buffer("table_weight", torch.arange(32).reshape(4, 8))
        self.turn_weight = nn.Parameter(torch.randn(8, 8, dtype=torch.complex64))
        self.fine = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(x, self.both_ways) @ self.both_ways
        x = self.fine(x) + self.table_weight.sum()
        return x + (self.turn_weight @ self.turn_weight).real.sum()


def test_odd_weights_are_skipped_with_their_reasons() -> None:
    torch.manual_seed(0)
    found = reasons(Odd(), (torch.randn(2, 16),), IntGrid(8))
    assert found["both_ways"] == "its uses need different views (matrix, transposed)"
    assert found["table_weight"] == "its dtype is int64"
    assert found["turn_weight"] == "its dtype is complex64"
    assert "fine.weight" not in found


def test_a_weight_that_would_not_shrink_is_skipped() -> None:
    found = reasons(nn.Linear(1, 16), (torch.randn(2, 1),), IntGrid(8))
    assert found == {"weight": "it takes 64 bytes as it is and 80 as IntGrid(bits=8)"}


def test_what_the_encoding_does_not_accept_is_skipped() -> None:
    found = reasons(nn.Linear(9, 16), (torch.randn(2, 9),), NM(2, 4))
    assert found == {"weight": "4 does not divide its reduced size 9"}
