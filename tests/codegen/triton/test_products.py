"""Every encoding in every regime, in Triton's interpreter, against float64; sizes are odd, so that there are tails."""

import pytest
import torch

from sparc.codegen.triton.lowerings import find_lowering
from sparc.codegen.triton.problem import Configuration
from sparc.codegen.triton.tiles import WeightLowering
from sparc.codegen.triton.weights.binary_code import BinaryCodeWeight
from sparc.codegen.triton.weights.codebook import CodebookWeight
from sparc.codegen.triton.weights.dense import DenseWeight
from sparc.codegen.triton.weights.float8 import Float8Weight
from sparc.codegen.triton.weights.integer import IntegerWeight
from sparc.codegen.triton.weights.microscaling import MXFP4Weight, NVFP4Weight
from sparc.encoding.base import Encoding
from sparc.encoding.binary_code import BinaryCode
from sparc.encoding.blocks import Blocks
from sparc.encoding.codebook import Codebook
from sparc.encoding.dense import Dense
from sparc.encoding.float8 import Float8
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.mask import MaskEncoding
from sparc.encoding.microscaling import MXFP4, NVFP4
from sparc.encoding.nm import NM
from tests.codegen.triton.running import TOLERANCE, Case, LoweringType, make_case, relative, run_product

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
    (Float8(), Float8Weight),
    (Float8(group=64, scale_dtype="float16"), Float8Weight),
    (Float8(group=48), Float8Weight),
    (MXFP4(), MXFP4Weight),
    (NVFP4(), NVFP4Weight),
    (Codebook("nf4"), CodebookWeight),
    (Codebook("kmeans", 3, 48), CodebookWeight),
    (Codebook("kmeans", 2, "none"), CodebookWeight),
    (BinaryCode(1, 64), BinaryCodeWeight),
    (BinaryCode(2, 48), BinaryCodeWeight),
    (BinaryCode(3), BinaryCodeWeight),
    (BinaryCode(4, "channel", "float16"), BinaryCodeWeight),
]

CASES = [
    pytest.param(encoding, lowering, regime, id=f"{encoding}-{regime}", marks=() if quick else pytest.mark.slow)
    for encoding, lowering in ENCODINGS
    for regime in REGIMES
    for quick in [regime in ("gemv split", "skinny split", "gemm") or encoding == IntGrid(4, group=32, symmetric=False)]
]
"""Every encoding in every regime; whole sums and atomics beside split sums only for one encoding in quick runs."""

BLOCKS_OF_FLOATS: list[tuple[Encoding, LoweringType]] = [(MXFP4(), MXFP4Weight), (NVFP4(), NVFP4Weight)]


@pytest.mark.parametrize(("encoding", "lowering", "regime"), CASES)
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


@pytest.mark.parametrize("regime", ["skinny", "gemm"])
@pytest.mark.parametrize("size", [1e-3, 40.0])
@pytest.mark.parametrize(("encoding", "lowering"), [(Float8(group=32), Float8Weight), *BLOCKS_OF_FLOATS], ids=str)
def test_scales_may_be_small_or_great(encoding: Encoding, lowering: LoweringType, size: float, regime: str) -> None:
    """A power of two that decoding leaves to the scales overflows in no type; rows of zeros and small blocks stay."""
    generator = torch.Generator().manual_seed(0)
    weight = size * torch.randn(45, 200, generator=generator)
    weight[7] = 0
    weight[:, 64:96] *= 2.0**-9
    grid = encoding.fit(weight)
    parts = encoding.encode(encoding.round(weight, grid), grid)
    dense = encoding.decode(parts, (45, 200), torch.float32).double()
    case = Case(encoding, lowering(encoding, (45, 200), parts), dense, parts)
    configuration, tokens = REGIMES[regime]
    for dtype in ("float16", "bfloat16"):
        found, exact, _ = run_product(case, configuration, tokens, dtype)
        assert relative(found, exact) < TOLERANCE[dtype]
        assert not found[:, 7].any()


@pytest.mark.parametrize(
    "encoding",
    [
        Blocks(size=(32, 64), of=Float8(group=64)),
        NM(2, 4, of=Float8(group=64)),
        Blocks(size=(32, 64), of=Codebook("nf4")),
        NM(2, 4, of=Codebook("kmeans", 2, "none")),
        Blocks(size=(32, 64), of=BinaryCode(4)),
        NM(2, 4, of=BinaryCode(2, 64)),
    ],
    ids=str,
)
def test_masks_compose_with_codes(encoding: MaskEncoding) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(70, 200, generator=generator)
    if isinstance(encoding, NM):
        mask = (torch.rand(70, 50, 4, generator=generator).argsort(-1) < 2).reshape(70, 200)
    else:
        mask = torch.rand(3, 4, generator=generator) < 0.5
    grid = encoding.fit_masked(weight, mask)
    parts = encoding.encode(encoding.round(weight, grid), grid)
    lowering = find_lowering(encoding, (70, 200), parts)
    assert isinstance(lowering, WeightLowering), lowering
    case = Case(encoding, lowering, encoding.decode(parts, (70, 200), torch.float32).double(), parts)
    found, exact, _ = run_product(case, *REGIMES["skinny"])
    assert relative(found, exact) < TOLERANCE["float16"]
