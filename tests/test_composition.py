"""Any pruning before any rounding behind any pass that keeps the function: one recipe, and both are stored."""

import functools
from pathlib import Path

import pytest
import torch

import sparc
from sparc.analysis.sites import find_sites
from sparc.api import check_job, compile_program, registry
from sparc.artifact import Artifact
from sparc.capture import capture
from sparc.diag import Diagnostics, PassError
from sparc.driver import Driver
from sparc.encoding.mask import MaskEncoding
from sparc.encoding.nm import NM
from sparc.encoding.view import WeightView
from sparc.pass_base import Pass, Samples
from sparc.passes.encode import Encode
from sparc.passes.equalize.awq import Awq
from sparc.passes.low_rank import LowRank
from sparc.passes.prune import PermuteChannels, Prune
from sparc.passes.rotate import Rotate
from sparc.passes.round import Compensate, Round
from sparc.program import Program
from sparc.recipe import Recipe, Step
from sparc.samples import bind, make_samples
from sparc.verify import relative_error
from tests.composition import ENCODINGS, MASKS, MODELS, Case, batches, check_mask, covering, every_case, model

TOLERANCE = 1e-3
SMALL = tuple(name for name in MODELS if name != "llama")
ENCODED_IN_ONNX = [*covering(SMALL)[::8], Case("mixture", "dense", "int4 minimum", "nearest", "nothing")]


@functools.cache
def captured(name: str) -> tuple[Program, Samples]:
    """A model's program, and its calibration data."""
    given = batches(name)
    program = capture(model(name), given[0])
    return program, make_samples(program, {"forward": given[0]}, given, Diagnostics())


def compile_case(case: Case, target: str) -> Artifact:
    diagnostics = Diagnostics()
    return compile_program(
        *captured(case.model), check_job(case.steps(), target, "types", None, diagnostics), diagnostics
    )[0]


def skipped(driver: Driver, name: str) -> set[str]:
    """What the passes of this name left alone."""
    return {skip.where for row in driver.ledger.passes if row.name.startswith(name) for skip in row.skips}


def check_case(case: Case) -> None:
    """Masks and grids are those that were asked for, or a remark says why not, and encoding them changes nothing."""
    program, samples = captured(case.model)
    driver = Driver(program.clone(), samples, verify="types")
    prune, encoding = MASKS[case.mask], ENCODINGS[case.encoding]
    for step in case.steps()[:-1]:
        driver.run(step)
    sites = {site.weight: driver.program.grid(site.weight) for site in find_sites(driver.program)[0]}
    for name, grid in sites.items():
        pruned = prune is not None and name not in skipped(driver, "prune")
        rounded = encoding is not None and name not in skipped(driver, "round")
        assert grid is not None or not (pruned or rounded)
        if grid is None:
            continue
        matrix = WeightView.parse(grid.view).to_matrix(driver.program.weights[name])
        assert torch.equal(grid.spec.round(matrix, grid), matrix)
        assert isinstance(grid.spec, MaskEncoding) == pruned
        inner = grid.spec.of if isinstance(grid.spec, MaskEncoding) else grid.spec
        assert inner == encoding or not rounded
        if pruned:
            assert prune is not None
            assert prune.pattern.same_pattern(grid.spec)
            check_mask(grid, matrix)
    row = driver.run(Encode())
    assert row.matches == sum(grid is not None for grid in sites.values())
    assert not row.skips
    recipe = Recipe(tuple(map(Step, case.steps())), name="mine")
    assert Recipe.from_toml(recipe.to_toml(), registry()) == recipe


@pytest.mark.parametrize("case", covering(SMALL), ids=str)
def test_masks_and_grids_go_together(case: Case) -> None:
    check_case(case)


def check_artifact(case: Case, folder: Path) -> None:
    """The target computes what the program computes, and so does what was saved."""
    artifact = compile_case(case, "onnx")
    given = bind(artifact.program, batches(case.model)[-1])
    expected, found = artifact.program.run_flat(given), artifact.run_flat(given)
    for one, other in zip(expected, found, strict=True):
        assert relative_error(one, other) < TOLERANCE
    artifact.save(folder)
    for one, other in zip(found, sparc.load(folder).run_flat(given), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("case", ENCODED_IN_ONNX, ids=str)
def test_onnx_computes_what_the_program_computes(case: Case, tmp_path: Path) -> None:
    check_artifact(case, tmp_path / "mine")


@pytest.mark.slow
@pytest.mark.parametrize("case", covering(tuple(MODELS)), ids=str)
def test_onnx_computes_what_every_pair_computes(case: Case, tmp_path: Path) -> None:
    check_artifact(case, tmp_path / "mine")


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", MODELS)
def test_everything_goes_together(name: str, mask: str) -> None:
    for case in every_case((name,)):
        if case.mask == mask and (name != "llama" or case.method != "compensate"):
            check_case(case)


ILLEGAL: dict[str, list[Pass]] = {
    "a mask after rounding": [Round(), Prune(NM(2, 4))],
    "a mask after compensation": [Prune(NM(2, 4)), Compensate(), Prune(NM(2, 4))],
    "factors after a mask": [Prune(NM(2, 4)), LowRank(rank=2)],
    "scales after a mask": [Prune(NM(2, 4)), Awq()],
    "an order after rounding": [Round(), PermuteChannels(NM(2, 4))],
    "a rotation after factors": [LowRank(rank=2), Rotate()],
    "rounding after encoding": [Round(), Encode(), Round()],
}


@pytest.mark.parametrize("name", ILLEGAL)
def test_what_would_undo_an_earlier_step_is_refused(name: str) -> None:
    with pytest.raises(PassError, match="SPARC203"):
        Recipe(tuple(map(Step, ILLEGAL[name])))
