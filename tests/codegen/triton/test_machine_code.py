"""Kernels at the sizes of a language model keep their promises as machine code for an A100 and an H100."""

import functools

import pytest
import torch

from sparc.codegen.triton.accept import fits
from sparc.codegen.triton.chips import CAPABILITIES
from sparc.codegen.triton.cubin import report, violations
from sparc.codegen.triton.generate import generate
from sparc.codegen.triton.kernel import Kernel
from sparc.codegen.triton.lowerings import find_lowering
from sparc.codegen.triton.prior import SKINNY, bare, candidates
from sparc.codegen.triton.problem import Epilogue, EpilogueInput, Problem, Prologue
from sparc.codegen.triton.tiles import WeightLowering
from sparc.cost import device_of
from sparc.encoding.base import Encoding
from sparc.encoding.binary_code import BinaryCode
from sparc.encoding.blocks import Blocks
from sparc.encoding.codebook import Codebook
from sparc.encoding.dense import Dense
from sparc.encoding.float8 import Float8
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.microscaling import MXFP4, NVFP4
from sparc.encoding.nm import NM

ROWS, COLUMNS = 512, 4096  # columns decide the code; rows only how many programs there are
INT4 = IntGrid(4, group=128, scale_dtype="float16")
HALF = Dense("float16")
ENCODINGS: list[Encoding] = [
    HALF,
    INT4,
    IntGrid(4, group=32, symmetric=False),
    IntGrid(8),
    Float8(),
    Blocks((64, 64), of=HALF),
    Blocks((64, 64), of=INT4),
    Blocks((64, 64), of=IntGrid(8)),
    NM(2, 4, of=HALF),
    NM(2, 4, of=IntGrid(8)),
    NM(2, 4, of=INT4),
    IntGrid(3, group=128),
    IntGrid(2, group=128),
    MXFP4(),
    NVFP4(),
    Codebook("nf4"),
    BinaryCode(3),
]
PLAIN = Epilogue()
SURROUNDED = Epilogue((EpilogueInput("r", "float16", "full"),), ("a = product * tl.sigmoid(product)",), "a + r_value")
RMS = Prologue("rms_norm", 1e-5, gain=True)


@functools.cache
def lowering(encoding: Encoding) -> WeightLowering:
    torch.manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS)
    if isinstance(encoding, BinaryCode):  # whose fit takes long, and whose values the code does not depend on
        weight = weight[:, :128].repeat(1, COLUMNS // 128)[:64].repeat(ROWS // 64, 1)
    grid = encoding.fit(weight)
    found = find_lowering(encoding, (ROWS, COLUMNS), encoding.encode(encoding.round(weight, grid), grid))
    assert isinstance(found, WeightLowering), found
    return found


@pytest.fixture(scope="module", params=ENCODINGS, ids=str)
def weight(request: pytest.FixtureRequest) -> WeightLowering:
    return lowering(request.param)


def first(problem: Problem, tokens: int, capability: int) -> Kernel | None:
    """The kernel of the model's first choice for a height of tiles that fits the chip."""
    own = bare(problem) if tokens > SKINNY else problem
    kernels = (generate(own, each.configuration) for each in candidates(problem, device_of(capability), tokens))
    return next((kernel for kernel in kernels if fits(kernel, capability)), None)


def check(problem: Problem, tokens: int, capability: int) -> None:
    """Up to 16 tokens there is a kernel for every encoding; tiles of many tokens need not fit an A100."""
    kernel = first(problem, tokens, capability)
    assert kernel is not None or (tokens > SKINNY and capability == 80)
    assert kernel is None or violations(kernel, report(kernel, capability)) == []


def test_four_bits_outrun_an_h100s_memory() -> None:
    problem = Problem((lowering(INT4),), "float16")
    kernel = first(problem, 16, 90)
    assert kernel is not None
    found = report(kernel, 90)
    assert found.slots is not None
    assert found.slots.ceiling >= 3.0
    assert found.slots.conversion == 0
    assert found.tensor_core["HGMMA"] > 0
    assert violations(kernel, found) == []


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_a_surrounded_product_of_four_bits(tokens: int, capability: int) -> None:
    check(Problem((lowering(INT4),), "float16", RMS, SURROUNDED), tokens, capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("surrounded", [False, True], ids=["plain", "surrounded"])
@pytest.mark.parametrize("tokens", [1, 8, 16, 64, 128])
def test_every_encoding(weight: WeightLowering, tokens: int, surrounded: bool, capability: int) -> None:
    around = (RMS, SURROUNDED) if surrounded else (Prologue(), PLAIN)
    check(Problem((weight,), "float16", *around), tokens, capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_chip_that_can_be_named_has_a_kernel(capability: int) -> None:
    assert device_of(capability).capability == capability
    assert first(Problem((lowering(IntGrid(8)),), "float16"), 16, capability) is not None
