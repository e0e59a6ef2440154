"""Pruning every kind of site by data, and rounding what was pruned."""

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from sparc.analysis.sites import find_sites
from sparc.calibration import Calibration
from sparc.capture import capture
from sparc.driver import Driver
from sparc.encoding.blocks import Blocks
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.mask import MaskEncoding
from sparc.encoding.nm import NM
from sparc.encoding.unstructured import Unstructured
from sparc.pass_base import PassContext, Samples
from sparc.passes.encode import Encode
from sparc.passes.prune import Prune
from sparc.passes.prune.masks import Pattern
from sparc.passes.round import Round
from sparc.passes.second_order import gram_watches, reconstruction_error, site_gram
from sparc.program import Program
from tests.mixtures import DYNAMIC, Mixture
from tests.mixtures import inputs as routed
from tests.passes.models import driver, models
from tests.passes.pruning import PATTERNS, correlated, driver_of, weights


# kinds of sites -------------------------------------------------------------------------------------------------------
@cache
def every_kind() -> dict[str, tuple[Program, tuple[Tensor, ...]]]:
    cases = {**models(), "mixture": (Mixture(), routed("an expert without tokens"))}
    return {name: (capture(model, inputs), inputs) for name, (model, inputs) in cases.items()}


@pytest.mark.parametrize(
    "step",
    [
        Prune(NM(2, 4), method="wanda", refine=True),
        Prune(NM(2, 4), method="sparsegpt"),
        Prune(Unstructured(), density=0.5, method="wanda_variant"),
        Prune(Unstructured(), density=0.5, method="sparsegpt", criterion="isc", refine=True),
        Prune(Blocks((2, 2)), density=0.5, method="sparsegpt"),
    ],
    ids=str,
)
def test_every_kind_of_site_gains(step: Prune) -> None:
    for name, (before, inputs) in every_kind().items():
        samples = {"forward": [list(inputs)]}
        found = []
        for each in (Prune(step.pattern, step.density), step):
            chosen = Driver(before.clone(), Samples(held_out=samples, calibration=samples), verify="types")
            chosen.run(each)
            found.append(chosen.program)
        first = _first_site_errors(before, found, inputs)
        assert first is None or first[1] <= first[0] * (1 + 1e-6) + 1e-9, name
        for weight in before.weights:
            grids = [program.grid(weight) for program in found]
            assert (grids[0] is None) == (grids[1] is None)
            if grids[0] is not None and grids[1] is not None:
                assert isinstance(grids[1].spec, MaskEncoding)
                old, kept = (grid.tensors["mask"] for grid in grids)
                rows = kept[..., 0].numel() if isinstance(step.pattern, Unstructured) else 0  # each rounds for itself
                assert abs(int(kept.sum()) - int(old.sum())) <= rows / 2, (name, weight)


def _first_site_errors(before: Program, programs: list[Program], inputs: tuple[Tensor, ...]) -> list[float] | None:
    """The errors of the first pruned site that has a Gram matrix: nothing before it was changed."""
    context = PassContext()
    calibration = Calibration(before, {"forward": [list(inputs)]})
    context.statistics = calibration.gather_all(gram_watches(before, context))
    for site in find_sites(before)[0]:
        gram = site_gram(before, site, context)
        if gram is not None and programs[0].grid(site.weight) is not None:
            old = site.view.to_matrix(before.weights[site.weight])
            changes = [site.view.to_matrix(each.weights[site.weight]) - old for each in programs]
            return [
                float(reconstruction_error(each.reshape(len(gram), -1, old.shape[-1]), gram).sum()) for each in changes
            ]
    return None


def test_an_expert_is_pruned_by_its_own_rows() -> None:
    x, experts = routed("33 tokens")
    x = torch.where((experts == 1)[:, None], x * torch.linspace(0.01, 10, 32), x)
    samples = {"forward": [[x, experts]]}
    chosen = Driver(capture(Mixture(), (x, experts), dynamic=DYNAMIC), Samples(held_out=samples, calibration=samples))
    weight = chosen.program.weights["up"]
    chosen.run(Prune(NM(2, 4), method="wanda"))
    own = torch.stack([x[experts == each].square().mean(0) for each in range(4)])
    wanda = NM(2, 4).select(weight, own.unsqueeze(1).expand(weight.shape))
    found = chosen.program.grid("up").tensors["mask"]  # type: ignore[union-attr]
    same = (found == wanda).all(-1).float().mean(-1)
    assert bool((same > 0.6).all())  # the other rows are better by magnitude
    assert not torch.equal(found[1], NM(2, 4).select(weight)[1])


def test_what_no_data_reaches_is_pruned_by_magnitude_and_said() -> None:
    model, inputs = models()["convolutions"]
    chosen = driver(model, inputs)
    chosen.run(Prune(NM(2, 4), method="sparsegpt"))
    said = [each.what for each in chosen.diagnostics if "by magnitude" in each.what]
    assert said == ["transposed.weight was pruned by magnitude"]


# what follows ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("pattern", "density"), PATTERNS, ids=str)
def test_rounding_by_a_sweep_keeps_the_mask(pattern: Pattern, density: float | None) -> None:
    weight, x = weights(16, 32), correlated(32)
    chosen = driver_of(weight, x)
    chosen.run(Prune(pattern, density, method="sparsegpt"))
    grid = chosen.program.grid("weight")
    assert grid is not None
    kept = pattern.spread(grid.tensors["mask"], weight.shape)
    chosen.run(Round(IntGrid(4, 16), method="gptq"))
    rounded = chosen.program.weights["weight"]
    assert not bool(rounded[~kept].any())
    chosen.run(Encode())
    (decoded,) = chosen.program.run_flat([torch.eye(256, 32)])
    assert torch.equal(decoded[:32].T, rounded)
    assert chosen.ledger.passes[-1].changed


def test_a_sweep_keeps_exactly_the_part_of_all_groups() -> None:
    torch.manual_seed(0)
    model, x = nn.Conv2d(9, 9, 3, groups=3), torch.randn(4, 9, 6, 6)  # groups of 81 elements
    chosen = driver(model, (x,))
    chosen.run(Prune(Unstructured(), density=0.5, method="sparsegpt"))
    grid = chosen.program.grid("weight")
    assert grid is not None
    assert int(grid.tensors["mask"].sum()) == 122  # 121.5, halves up
