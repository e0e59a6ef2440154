"""Structural pruning around grouped convolutions: scores, refitting, and what `keep` and `multiple` count."""

import pytest
import torch
from torch import Tensor, nn

from sparc.analysis.dependency import groups
from sparc.calibration import Calibration
from sparc.diag import Diagnostic
from sparc.pass_base import PassContext
from sparc.passes.cut.prune_units import PruneUnits
from sparc.passes.cut.refit import refitted
from sparc.passes.cut.select import kept_count
from tests.passes.pruned import after, architecture, group_of, prepared
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


def remarks(driver) -> list[Diagnostic]:
    return [each for each in driver.diagnostics if each.code.id == "SPARC216"]


def whys(driver) -> str:
    return "; ".join(each.why for each in remarks(driver))


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


# factors of one axis ------------------------------------------------------------------------------------------------
class Stages(nn.Module):
    """A grouped convolution between two dense ones, on 64 channels in 8 groups."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Conv2d(3, 64, 1), nn.Conv2d(64, 8, 1)
        self.g = nn.Conv2d(64, 64, 3, padding=1, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.relu(self.g(torch.relu(self.a(x)))))


@pytest.mark.parametrize(("keep", "ranking"), [(0.75, "group"), (0.5, "group"), (0.25, "group"), (0.5, "global")])
def test_keep_and_multiple_are_of_the_whole_width(keep, ranking):
    torch.manual_seed(0)
    driver = prepared(Stages(), tuple(images(1)[0]))
    weights = after(driver, PruneUnits(keep=keep, ranking=ranking)).weights
    assert [len(weights[name]) % 8 for name in ("a.weight", "g.weight")] == [0, 0]
    if ranking == "group":
        assert tuple(weights["g.weight"].shape) == (64 * keep, 8 * keep, 3, 3)
    row = driver.ledger.passes[-1]
    assert row.matches == 2
    stays = "its units stay (channel, the first at 0-7): one axis is cut once, here along a.weight[0]"
    assert any((skip.where, skip.why.startswith(stays)) == ("a.weight[0]", True) for skip in row.skips)


@pytest.mark.parametrize("kinds", [("head", "head_dim"), ("head_dim", "head")])
def test_heads_are_cut_rather_than_what_is_inside_them(kinds):
    driver = architecture("gpt2")
    driver.run(PruneUnits(kinds=kinds, keep=0.5, multiple=1))
    cut = {each.what.partition("(")[2].rstrip(")").partition(",")[0] for each in remarks(driver)}
    assert cut == {"head"}
    assert any("one axis is cut once" in skip.why for skip in driver.ledger.passes[-1].skips)


def test_heads_of_keys_are_cut_with_their_queries():
    """Where attention is no single operator, the queries of a head of keys are heads as well."""
    driver = architecture("gemma2")
    before = dict(driver.program.weights)
    program = after(driver, PruneUnits(kinds=("head",), keep=0.5, multiple=1))
    for name in ("q", "k", "v"):
        weight = f"model.layers.0.self_attn.{name}_proj.weight"
        assert 2 * len(program.weights[weight]) == len(before[weight])


def test_every_reader_is_a_multiple_wide():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.two, self.three = nn.Linear(6, 12), nn.Linear(24, 4), nn.Linear(36, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.up(x))
            return self.two(torch.cat([h, h], -1)) + self.three(torch.cat([h, h, h], -1))

    group = group_of(prepared(Twice(), (torch.randn(2, 6),)).program, "up.weight")
    assert kept_count(group, 6.0, 4) == 8


# the report ---------------------------------------------------------------------------------------------------------
def test_every_group_has_a_remark_of_its_own():
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.a, self.b = nn.Linear(6, 32), nn.Linear(16, 4), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            a, b = torch.relu(self.c(x)).chunk(2, -1)
            return self.a(torch.tanh(a)) * self.b(torch.sin(b))

    driver = prepared(Halves(), (torch.randn(3, 6),))
    row = driver.run(PruneUnits(keep=0.5, multiple=1))
    assert row.matches == 2
    assert [each.what for each in remarks(driver)] == [
        "8 of 16 units of c.weight[0] were removed (neuron, the first at 0)",
        "8 of 16 units of c.weight[0] were removed (neuron, the first at 16)",
    ]
