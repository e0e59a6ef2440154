"""Mixtures of experts by QMoE: what it is given, and what it is not."""

import pytest
import torch
from torch import Tensor

from sparc.capture import capture
from sparc.codegen.onnx.check import check_model
from sparc.encoding.base import Encoding
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.nm import NM
from sparc.program import Program
from sparc.target import KernelUse
from tests.codegen.emitting import assert_agrees, emit, operators
from tests.codegen.encoding import encode_weights
from tests.mixtures import EXPERTS, WIDTH, Clamped, Routed

TAKEN = [IntGrid(8), IntGrid(4, 32), IntGrid(4, 32, symmetric=False), IntGrid(4, 16), IntGrid(4, 16, symmetric=False)]
LEFT: list[Encoding] = [
    IntGrid(8, "tensor"),
    IntGrid(8, 32),
    IntGrid(8, symmetric=False),
    IntGrid(4),
    IntGrid(4, 64),
    IntGrid(4, 16, symmetric=False, zero="minimum"),
    IntGrid(4, 16, scale_dtype="float16"),
    IntGrid(2, 16),
    NM(2, 4, of=IntGrid(8)),
]


def tokens(count: int) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(3))


def program(grid: Encoding, twist: str = "", kind: type[Routed] = Routed) -> Program:
    captured = capture(kind(twist), (tokens(5),), dynamic={"x": {0: "tokens"}})
    return encode_weights(captured, grid, only="grouped")


def agrees(chosen: Program, flavour: str = "cpu") -> list[str]:
    emission = emit(chosen, flavour)
    check_model(emission.models["forward"])
    for count in (1, 7, 33):
        assert_agrees(chosen, emission, [tokens(count)], 1e-5)
    same = torch.ones(7, 1) * tokens(1)  # every token goes to the same two experts
    assert_agrees(chosen, emission, [same], 1e-5)
    return operators(emission)


@pytest.mark.parametrize("kind", [Routed, Clamped])
@pytest.mark.parametrize("grid", TAKEN, ids=str)
def test_one_operator_computes_it(grid: IntGrid, kind: type[Routed]) -> None:
    names = agrees(program(grid, kind=kind))
    assert names.count("QMoE") == 1
    assert not {"Split", "MatMulNBits", "TopK"} & set(names[names.index("ScatterElements") :])


@pytest.mark.parametrize("grid", LEFT, ids=str)
def test_what_it_would_round_or_does_not_know_is_left(grid: Encoding) -> None:
    assert "QMoE" not in agrees(program(grid))


@pytest.mark.parametrize("flavour", ["portable", "cuda"])
def test_other_flavours_do_without(flavour: str) -> None:
    assert "QMoE" not in agrees(program(IntGrid(8)), flavour)


@pytest.mark.parametrize(
    ("kind", "twist"),
    [(Routed, "activation"), (Routed, "halves"), (Routed, "return"), (Routed, "repeated"), (Clamped, "bounds")],
)
def test_what_looks_like_a_mixture_is_none(kind: type[Routed], twist: str) -> None:
    assert "QMoE" not in agrees(program(IntGrid(8), twist, kind))


def test_codes_stay_in_memory() -> None:
    kernels = emit(program(IntGrid(8))).kernels
    assert kernels == {
        "up": KernelUse("QMoE", EXPERTS * 64 * (WIDTH + 4)),
        "down": KernelUse("QMoE", EXPERTS * WIDTH * (32 + 4)),
    }
