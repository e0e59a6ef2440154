"""Activations in 8 bits, in Triton's interpreter, against float64 of what they were rounded to."""

import pytest

from sparc.codegen.triton.problem import Prologue
from sparc.codegen.triton.weights.float8 import Float8Weight
from sparc.codegen.triton.weights.integer import IntegerWeight
from sparc.encoding.float8 import Float8
from sparc.encoding.int_grid import IntGrid
from tests.codegen.triton.running import TOLERANCE, make_case, relative, run_product
from tests.codegen.triton.test_products import REGIMES

TILES = ["skinny", "skinny split", "gemm"]


@pytest.mark.parametrize("regime", TILES)
@pytest.mark.parametrize("group", ["channel", 32, 128])
@pytest.mark.parametrize("bits", [8, 4])
def test_integers_times_integers_are_right(bits: int, group: int, regime: str) -> None:
    case = make_case(IntGrid(bits, group=group), IntegerWeight, 45, 200)
    configuration, tokens = REGIMES[regime]
    found, exact, _ = run_product(case, configuration, tokens, prologue=Prologue(quantized="int8"))
    assert relative(found, exact) < TOLERANCE["float16"]


def test_integers_less_a_zero_point_are_right() -> None:
    case = make_case(IntGrid(4, group=64, symmetric=False), IntegerWeight, 45, 200)
    found, exact, _ = run_product(case, *REGIMES["skinny"], prologue=Prologue(quantized="int8"))
    assert relative(found, exact) < TOLERANCE["float16"]


@pytest.mark.parametrize("regime", TILES)
@pytest.mark.parametrize("group", ["channel", "tensor", 32, 128])
def test_floats_times_floats_are_right(group: int, regime: str) -> None:
    case = make_case(Float8(group=group), Float8Weight, 45, 200)
    configuration, tokens = REGIMES[regime]
    found, exact, _ = run_product(case, configuration, tokens, prologue=Prologue(quantized="float8e4nv"))
    assert relative(found, exact) < TOLERANCE["float16"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["int8", "float8e4nv"])
def test_activations_of_other_types_are_right(kind: str, dtype: str) -> None:
    encoding, lowering = {"int8": (IntGrid(8), IntegerWeight), "float8e4nv": (Float8(), Float8Weight)}[kind]
    case = make_case(encoding, lowering, 45, 200)
    found, exact, _ = run_product(case, *REGIMES["skinny"], dtype, prologue=Prologue(quantized=kind))
    assert relative(found, exact) < TOLERANCE[dtype]
