"""The source of some kernels, as files that a person can read."""

import pytest

from sparc.codegen.triton.generate import generate
from sparc.codegen.triton.problem import Configuration, Epilogue, EpilogueInput, Problem, Prologue
from sparc.codegen.triton.tiles import WeightLowering
from sparc.codegen.triton.weights.binary_code import BinaryCodeWeight
from sparc.codegen.triton.weights.dense import DenseWeight
from sparc.codegen.triton.weights.integer import IntegerWeight
from sparc.encoding.base import Encoding
from sparc.encoding.binary_code import BinaryCode
from sparc.encoding.dense import Dense
from sparc.encoding.int_grid import IntGrid
from tests.codegen.triton.running import LoweringType, make_case
from tests.conftest import Golden


def weight(encoding: Encoding, lowering: LoweringType, rows: int, columns: int) -> WeightLowering:
    return make_case(encoding, lowering, rows, columns).lowering


INT4 = IntGrid(4, group=128, scale_dtype="float16")
RESIDUAL = Epilogue((EpilogueInput("operand_0", "float16", "full"),), (), "product + operand_0_value")
GATED = Epilogue((), ("value_0 = product * tl.sigmoid(product)",), "value_0 * product_1")
CASES = {
    "binary_code_lookup": (
        Problem((weight(BinaryCode(2), BinaryCodeWeight, 120, 512),), "float16", epilogue=RESIDUAL),
        Configuration(1, 128, 256, form="lookup"),
    ),
    "dense_float16_one_token": (
        Problem((weight(Dense("float16"), DenseWeight, 96, 256),), "float16", Prologue("rms_norm", 1e-5, gain=True)),
        Configuration(1, 16, 256),
    ),
    "int4_gated_split": (
        Problem((weight(INT4, IntegerWeight, 96, 1024),) * 2, "float16", epilogue=GATED),
        Configuration(16, 64, 512, split=2, num_stages=4),
    ),
    "int4_many_tokens": (
        Problem((weight(INT4, IntegerWeight, 128, 512),), "float16", epilogue=RESIDUAL),
        Configuration(128, 128, 512, num_warps=8),
    ),
    "int8_quantized_activation": (
        Problem((weight(IntGrid(8), IntegerWeight, 128, 256),), "float16", Prologue(quantized="int8")),
        Configuration(64, 64, 128),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_sources(name: str, golden: Golden) -> None:
    problem, configuration = CASES[name]
    golden(f"kernels/{name}.py.txt", generate(problem, configuration).source)
