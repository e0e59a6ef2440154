"""Measured times choose among candidates, and are kept; on a CPU, a made-up clock stands for the GPU's."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

import sparc
from sparc.codegen.triton.prior import at, candidates
from sparc.codegen.triton.problem import Problem
from sparc.codegen.triton.regimes import regimes
from sparc.codegen.triton.sites import Site, find_products
from sparc.codegen.triton.tuning import Tuner, TuningCache
from sparc.codegen.triton.weights.integer import IntegerWeight
from sparc.cost import device_of
from sparc.diag import Diagnostics
from sparc.encoding.int_grid import IntGrid
from tests.codegen.triton.running import make_case

H100 = device_of(90)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem((make_case(IntGrid(4, group=128), IntegerWeight, 1024, 1024).lowering,), "float16")


@pytest.fixture(scope="module")
def site() -> Site:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48)).half()
    artifact = sparc.compile(model, (torch.randn(3, 64).half(),), recipe="w8", target="reference", measure=False)
    return find_products(artifact.program, artifact.program.main, {})[0][0]


def test_the_clock_overrules_the_model(problem: Problem) -> None:
    wanted = candidates(problem, H100, 16)[1].configuration
    found = regimes(problem, H100, 16, 16, measure=lambda each, _: 1e-6 if each == wanted else 1e-5)
    assert [each.configuration for each in found] == [wanted]
    assert at(found[0].seconds, 16) == pytest.approx(1e-6)


def test_what_does_not_run_is_not_chosen(problem: Problem) -> None:
    found = regimes(problem, H100, 1, 64, measure=lambda each, _: 1e-5 if each is None else math.inf)
    assert [each.configuration for each in found] == [None]


def test_a_refused_kernel_is_replaced(problem: Problem) -> None:
    first = regimes(problem, H100, 16, 16)[0].configuration
    other = regimes(problem, H100, 16, 16, lambda _, each: each != first)[0].configuration
    assert other not in (first, None)


def test_every_site_is_timed_once(site: Site, tmp_path: Path) -> None:
    calls: list[int] = []

    def clock(functions: Sequence[Callable[[], object]]) -> float:
        functions[0]()
        calls.append(len(functions))
        return 3e-6

    configuration = candidates(site.problem, H100, 16)[0].configuration
    for _ in range(2):
        tuner = Tuner(TuningCache(tmp_path, "a GPU"), Diagnostics(), clock, "cpu")
        assert tuner.seconds(site, configuration, 3) == 3e-6
        assert tuner.seconds(site, None, 3) == 3e-6
        tuner.cache.write()
    assert len(calls) == 2
    assert min(calls) > 1  # weights are rotated, so that caches do not hold them
    assert TuningCache(tmp_path, "another GPU").get("x") is None


def test_a_failing_candidate_is_a_remark(site: Site, tmp_path: Path) -> None:
    def clock(functions: Sequence[Callable[[], object]]) -> float:
        raise RuntimeError("out of resources")

    diagnostics = Diagnostics()
    tuner = Tuner(TuningCache(tmp_path, "a GPU"), diagnostics, clock, "cpu")
    assert tuner.seconds(site, candidates(site.problem, H100, 16)[0].configuration, 3) == math.inf
    assert "out of resources" in next(iter(diagnostics)).why


@pytest.mark.parametrize("content", ["", "[1, 2]", '{"a": "b"}', "[" * 100_000, '{"a": 1e-6'])
def test_a_broken_cache_counts_as_empty(tmp_path: Path, content: str) -> None:
    cache = TuningCache(tmp_path, "a GPU")
    cache.put("key", 1.0)
    cache.write()
    file = next(tmp_path.iterdir())
    file.write_text(content)
    assert TuningCache(tmp_path, "a GPU").get("key") is None


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = TuningCache(tmp_path / "file", "a GPU")
    cache.put("key", 1.0)
    cache.write()
    assert cache.get("key") == 1.0


@pytest.mark.parametrize("capability", [80, 90])
def test_every_range_is_within_bounds(problem: Problem, capability: int) -> None:
    found = regimes(problem, device_of(capability))
    limits = [each.limit for each in found]
    assert limits[-1] is None
    assert limits[:-1] == sorted(limits[:-1])  # type: ignore[type-var]
    for each in found:
        if each.configuration is not None and each.configuration.split > 1:
            assert each.limit is not None
            assert each.limit * problem.rows * each.configuration.split <= 1 << 27
