"""Every encoding in every regime, in Triton's interpreter, against float64; sizes are odd, so that there are tails."""

import pytest

from sparc.codegen.triton.problem import Configuration
from sparc.codegen.triton.weights.dense import DenseWeight
from sparc.codegen.triton.weights.integer import IntegerWeight
from sparc.encoding.base import Encoding
from sparc.encoding.dense import Dense
from sparc.encoding.int_grid import IntGrid
from tests.codegen.triton.running import TOLERANCE, LoweringType, make_case, relative, run_product

REGIMES = {
    "gemv": (Configuration(1, 16), 1),
    "gemv split": (Configuration(1, 16, split=3), 1),
    "skinny": (Configuration(16, 32), 5),
    "skinny split": (Configuration(16, 32, split=2), 3),
    "skinny atomic": (Configuration(16, 32, split=2, deterministic=False), 3),
    "gemm": (Configuration(64, 32), 67),
}
ENCODINGS: list[tuple[Encoding, LoweringType]] = [
    (Dense("float16"), DenseWeight),
    (Dense("float32"), DenseWeight),
    (IntGrid(4, group=32, scale_dtype="float16"), IntegerWeight),
    (IntGrid(4, group=32, symmetric=False), IntegerWeight),
    (IntGrid(4, group=48, symmetric=False, zero="minimum"), IntegerWeight),
    (IntGrid(4), IntegerWeight),
    (IntGrid(8), IntegerWeight),
    (IntGrid(8, group="tensor", symmetric=False), IntegerWeight),
    (IntGrid(8, group=64), IntegerWeight),
    (IntGrid(3, group=64), IntegerWeight),
    (IntGrid(2, group=64, symmetric=False), IntegerWeight),
]


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize(("encoding", "lowering"), ENCODINGS, ids=[str(encoding) for encoding, _ in ENCODINGS])
def test_float16_products_are_right(encoding: Encoding, lowering: LoweringType, regime: str) -> None:
    configuration, tokens = REGIMES[regime]
    case = make_case(encoding, lowering, 45, 200)
    found, exact, _ = run_product(case, configuration, tokens)
    assert relative(found, exact) < TOLERANCE["float16"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("encoding", "lowering"), ENCODINGS[1:], ids=[str(encoding) for encoding, _ in ENCODINGS[1:]])
def test_other_types_are_right(encoding: Encoding, lowering: LoweringType, dtype: str) -> None:
    case = make_case(encoding, lowering, 45, 200)
    found, exact, _ = run_product(case, Configuration(16, 32, split=2), 5, dtype)
    assert relative(found, exact) < TOLERANCE[dtype]
