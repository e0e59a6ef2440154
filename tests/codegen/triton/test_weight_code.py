"""The machine code of every way to decode a weight, for an H100, without one: nothing spilled, converted or promised in
vain."""

from collections.abc import Iterator

import pytest
from triton import knobs

from sparc.codegen.triton.cubin import report, violations
from sparc.codegen.triton.generate import generate
from sparc.codegen.triton.lowerings import find_lowering
from sparc.codegen.triton.problem import Configuration, Epilogue, Problem, Prologue
from sparc.codegen.triton.tiles import Product, WeightLowering
from sparc.encoding.base import Encoding
from sparc.encoding.binary_code import BinaryCode
from sparc.encoding.codebook import Codebook
from sparc.encoding.float8 import Float8
from sparc.encoding.microscaling import MXFP4, NVFP4
from tests.codegen.triton.running import fitting, make_case

ROWS, COLUMNS = 256, 4096
SKINNY, MANY = Configuration(16, 64, 512), Configuration(64, 128, 128)
CODE: list[tuple[Encoding, Configuration, Product]] = [
    (Float8(), SKINNY, "float16"),
    (Float8(group=128), MANY, "float16"),
    (Float8(), MANY, "bfloat16"),
    (Float8(), SKINNY, "float8e4nv"),
    (Float8(group=128), MANY, "float8e4nv"),
    (MXFP4(), SKINNY, "float16"),
    (MXFP4(), MANY, "bfloat16"),
    (NVFP4(), SKINNY, "bfloat16"),
    (NVFP4(), MANY, "float16"),
    (Codebook("nf4"), SKINNY, "float16"),
    (Codebook("nf4"), MANY, "float16"),
    (Codebook("kmeans", 3, 128), MANY, "float16"),
    (Codebook("kmeans", 2, "none"), SKINNY, "float16"),
    (BinaryCode(1), SKINNY, "float16"),
    (BinaryCode(2), SKINNY, "float16"),
    (BinaryCode(3), SKINNY, "float16"),
    (BinaryCode(4), MANY, "float16"),
]


@pytest.fixture(scope="module", autouse=True)
def _fresh_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


@pytest.mark.parametrize(
    ("encoding", "configuration", "product"),
    CODE,
    ids=[f"{encoding}-{configuration.block_tokens}-{product}" for encoding, configuration, product in CODE],
)
def test_decoding_takes_what_its_cost_says(encoding: Encoding, configuration: Configuration, product: Product) -> None:
    case = make_case(encoding, lowering_of, ROWS, COLUMNS)
    dtype = "float16" if product == "float8e4nv" else product
    prologue = Prologue(quantized=product if product == "float8e4nv" else "")
    problem = Problem((case.lowering,), dtype, prologue, Epilogue(dtype=dtype))
    kernel = generate(problem, fitting(case, configuration))
    found, cost = report(kernel, 90), case.lowering.cost(product)
    assert violations(kernel, found) == []
    assert found.tensor_core.keys() == {"QGMMA" if product == "float8e4nv" else "HGMMA"}
    assert not [name for name in found.instructions if name.split(".")[0] in ("I2F", "F2F", "I2FP")]
    assert found.slots is not None
    assert 0.5 * cost.issue < found.slots.issue < cost.issue
    assert 0.5 * cost.arithmetic < found.slots.arithmetic < cost.arithmetic


def lowering_of(encoding: Encoding, shape: tuple[int, int], parts: dict) -> WeightLowering:
    found = find_lowering(encoding, shape, parts)
    assert isinstance(found, WeightLowering), found
    return found
