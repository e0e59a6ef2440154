"""Runs of rows with stacked matrices on the target `cuda`: no kernel is generated, and the program runs anyway."""

import pytest
import torch

import sparc
from sparc import codes
from tests.codegen.triton.test_target import QUICK, agrees, emission
from tests.mixtures import DYNAMIC, ROUTES, Mixture, inputs


@pytest.fixture(scope="module")
def artifact() -> sparc.Artifact:
    given = inputs("an expert without tokens")
    return sparc.compile(
        Mixture().half(), (given[0].half(), given[1]), recipe="w4", target="cuda:sm_90", dynamic=DYNAMIC, options=QUICK
    )


def test_stacked_matrices_are_kept_dense_and_said_to_be(artifact: sparc.Artifact) -> None:
    assert emission(artifact).kernels["up"].operator == "dense, torch"
    assert emission(artifact).kernels["up"].resident_bytes == Mixture().half().up.nbytes
    said = [each for each in artifact.diagnostics if each.code is codes.LEFT_TO_TORCH]
    assert [each.what for each in said] == [f"{name} is decoded once and kept dense" for name in ("up", "down")]


@pytest.mark.parametrize("route", ROUTES)
def test_it_computes_what_its_program_computes(artifact: sparc.Artifact, route: str) -> None:
    x, experts = inputs(route)
    agrees(artifact, x.half(), experts)
    assert torch.isfinite(artifact(x.half(), experts)).all()
