"""Structural pruning around grouped convolutions: scores, refitting, and what `keep` and `multiple` count."""

import pytest
import torch
from torch import Tensor, nn

from sparc.analysis.dependency import groups
from sparc.calibration import Calibration
from sparc.pass_base import PassContext
from sparc.passes.cut.prune_units import PruneUnits
from sparc.passes.cut.refit import refitted
from tests.passes.pruned import after, prepared
from tests.passes.test_prune_claims import Tied
from tests.passes.test_prune_importance import square

READERS = {
    "conv": lambda: nn.Conv2d(16, 8, 1, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(16, 8, 1, groups=2),
}


class Read(nn.Module):
    """A grouped product of 16 channels, which are 2 groups of 8."""

    def __init__(self, reader: str) -> None:
        super().__init__()
        self.a, self.r = nn.Conv2d(3, 16, 1), READERS[reader]()

    def hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(self.a(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.r(self.hidden(x))

    def matrices(self) -> list[Tensor]:
        """`[out, in]` of each group."""
        halves = self.r.weight.detach()[:, :, 0, 0].double().chunk(2)
        return [half.T if isinstance(self.r, nn.ConvTranspose2d) else half for half in halves]


def read(reader: str, *batches: list[Tensor]):
    torch.manual_seed(0)
    return (model := Read(reader).eval()), prepared(model, tuple(batches[0]), *batches)


def images(count: int = 3) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(4, 3, 6, 6, generator=generator)] for _ in range(count)]


def rows(model: Read, batches: list[list[Tensor]]) -> list[Tensor]:
    """The channels that each group reads, `[positions, 8]`."""
    hidden = torch.cat([model.hidden(x).detach().double() for (x,) in batches])
    return list(hidden.movedim(1, -1).reshape(-1, 2, 8).unbind(1))


@pytest.mark.parametrize("reader", READERS)
def test_activation_of_channels_inside_groups(reader):
    batches = images()
    model, driver = read(reader, *batches)
    group = next(each for each in groups(driver.program) if len(each.contractions) and each.units == 8)
    step, context = PruneUnits(importance="activation"), PassContext()
    calibration = Calibration(driver.program, driver.samples.calibration)
    context.statistics = calibration.gather_all(step.watches(driver.program, context))
    parts = zip(rows(model, batches), model.matrices(), strict=True)
    plain = sum(square(x).mean(0) * square(weight).sum(0) for x, weight in parts)
    assert torch.allclose(step._scores(driver.program, context, [group])[0], plain, rtol=1e-5)


@pytest.mark.parametrize("reader", READERS)
def test_grouped_readers_are_refitted_group_by_group(reader):
    batches = images()
    model, driver = read(reader, *batches)
    program = after(driver, PruneUnits(keep=0.5, multiple=1, compensate=True))
    kept = [int((row == model.a.weight.detach()).flatten(1).all(1).nonzero()) for row in program.weights["a.weight"]]
    columns = torch.tensor(kept[:4])
    assert kept[4:] == [8 + place for place in kept[:4]]
    found = program.weights["r.weight"][:, :, 0, 0].double().chunk(2)
    for half, weight, x in zip(found, model.matrices(), rows(model, batches), strict=True):
        expected = refitted(weight, 1, columns, x.T @ x / len(x))[:, columns]
        assert torch.allclose(half if reader == "conv" else half.T, expected, rtol=1e-4, atol=1e-6)
    assert "what reads them was refitted" in whys(driver)


@pytest.mark.parametrize("reader", READERS)
def test_refitting_brings_grouped_products_closer(reader):
    (x,), *batches = images(9)
    errors = []
    for compensate in (False, True):
        model, driver = read(reader, *batches)
        program = after(driver, PruneUnits(keep=0.5, multiple=1, compensate=compensate))
        errors.append(float((program.run_flat([x])[0] - model(x).detach()).square().mean()))
    assert errors[1] < 0.7 * errors[0]


def test_a_group_whose_inputs_are_zero_stays_as_it_is():
    batches = images()
    model, _ = read("conv", *batches)
    for parameter in (model.a.weight, model.a.bias):
        parameter.data[8:] = 0
    driver = prepared(model, tuple(batches[0]), *batches)
    program = after(driver, PruneUnits(keep=0.5, multiple=1, compensate=True))
    found, weights = program.weights["r.weight"][:, :, 0, 0], model.matrices()
    assert not torch.isin(found[:4].double(), weights[0]).any()
    assert torch.isin(found[4:].double(), weights[1]).all()


def whys(driver) -> str:
    return "; ".join(each.why for each in driver.diagnostics if each.code.id == "SPARC216")


def test_refitted_is_said_only_where_something_was():
    torch.manual_seed(0)
    driver = prepared(Tied(), (torch.randn(2, 3, 8, 8),))
    row = driver.run(PruneUnits(keep=0.5, multiple=1, compensate=True))
    assert row.matches == 1
    assert whys(driver) == "by magnitude"
    assert ("c.weight", "its columns are not refitted: it is also used otherwise") in [
        (skip.where, skip.why) for skip in row.skips
    ]


def test_a_group_that_no_product_reads_is_not_refitted():
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(6, 16, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.up(x)).sum(-1)

    driver = prepared(Summed(), (torch.randn(5, 6),))
    row = driver.run(PruneUnits(keep=0.5, multiple=1, compensate=True))
    assert row.matches == 1
    assert whys(driver) == "by magnitude"
    assert any("no product with a weight sums over them" in skip.why for skip in row.skips)
