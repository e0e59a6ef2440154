"""Masks around other encodings in every regime, in Triton's interpreter, against float64."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sparc.codegen.triton.cubin import report, violations
from sparc.codegen.triton.generate import generate
from sparc.codegen.triton.launch import interpret_problem
from sparc.codegen.triton.lowerings import find_lowering
from sparc.codegen.triton.problem import Configuration, Epilogue, Problem, Prologue
from sparc.codegen.triton.tiles import Product, WeightLowering
from sparc.codegen.triton.weights.dense import DenseWeight
from sparc.encoding.base import ElementEncoding, Encoding
from sparc.encoding.blocks import Blocks, Edge
from sparc.encoding.dense import Dense
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.mask import MaskEncoding
from sparc.encoding.nm import NM
from sparc.encoding.unstructured import Unstructured
from tests.codegen.triton.running import TOLERANCE, Case, relative, run_product
from tests.codegen.triton.test_products import REGIMES

SPLIT = Configuration(16, 32, split=2)
ROWS, COLUMNS = 70, 200  # ragged in both directions, for every size of a block below


def masked(encoding: MaskEncoding, mask: Tensor, rows: int = ROWS, columns: int = COLUMNS) -> Case:
    """A random weight `[rows, columns]` with this mask."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    grid = encoding.fit_masked(weight, mask)
    parts = encoding.encode(encoding.round(weight, grid), grid)
    lowering = find_lowering(encoding, (rows, columns), parts)
    assert isinstance(lowering, WeightLowering), lowering
    return Case(encoding, lowering, encoding.decode(parts, (rows, columns), torch.float32).double(), parts)


def some_blocks(size: tuple[int, int], rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    """A mask with as many blocks in a row of blocks as its index says, the last ones; so the first row has none."""
    of_rows, of_columns = -(-rows // size[0]), -(-columns // size[1])
    column = torch.arange(of_columns)
    return column >= of_columns - torch.arange(of_rows)[:, None]


BLOCKS: list[tuple[tuple[int, int], ElementEncoding]] = [
    ((32, 64), Dense("float16")),
    ((16, 16), Dense("float16")),
    ((32, 64), IntGrid(4, group=32, scale_dtype="float16")),
    ((16, 128), IntGrid(4, group=32, symmetric=False)),
    ((32, 64), IntGrid(4, group=128)),
    ((32, 64), IntGrid(4, group=48, symmetric=False, zero="minimum")),
    ((16, 64), IntGrid(8)),
    ((64, 32), IntGrid(8, group="tensor", symmetric=False)),
    ((16, 128), IntGrid(3, group=64)),
    ((32, 128), IntGrid(2, group=64, symmetric=False)),
]


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize(("size", "inner"), BLOCKS, ids=str)
def test_products_of_blocks_are_right(size: tuple[int, int], inner: ElementEncoding, regime: str) -> None:
    configuration, tokens = REGIMES[regime]
    case = masked(Blocks(size, inner), some_blocks(size))
    found, exact, _ = run_product(case, configuration, tokens)
    assert relative(found, exact) < TOLERANCE["float16"]


DTYPES = ("bfloat16", "float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [Dense("float32"), IntGrid(4, group=32), IntGrid(8)], ids=str)
def test_blocks_in_other_types_are_right(inner: ElementEncoding, dtype: str) -> None:
    case = masked(Blocks((32, 64), inner), some_blocks((32, 64)))
    found, exact, _ = run_product(case, SPLIT, 5, dtype)
    assert relative(found, exact) < TOLERANCE[dtype]


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("kept", ["all", "one", "none"])
def test_any_number_of_blocks_may_be_kept(kept: str, tokens: int) -> None:
    mask = torch.full((3, 4), kept == "all")
    mask[2, 1] = kept != "none"
    case = masked(Blocks((32, 64), IntGrid(4, group=32)), mask)
    found, exact, _ = run_product(case, SPLIT if tokens > 1 else Configuration(1, 32), tokens)
    assert bool((found[:, exact.abs().amax(0) == 0] == 0).all())
    assert float((found - exact).abs().max()) <= TOLERANCE["float16"] * float(exact.abs().max())


@pytest.mark.parametrize(
    ("size", "inner", "product", "told"),
    [
        ((48, 64), Dense(), "float16", "48 rows"),
        ((512, 64), Dense(), "float16", "512 rows"),
        ((64, 48), Dense(), "float16", "48 columns"),
        ((64, 8), Dense(), "float16", "8 columns"),
        ((64, 32), IntGrid(4), "float16", "fewer than the 64"),
        ((64, 64), IntGrid(4), "int8", "32 are the least"),
        ((64, 64), Dense(), "int8", "dense"),
    ],
)
def test_blocks_that_are_no_tiles_are_refused(
    size: tuple[int, int], inner: ElementEncoding, product: Product, told: str
) -> None:
    rows, columns = 512, 256
    case = masked(Blocks(size, inner), some_blocks(size, rows, columns), rows, columns)
    assert told in (case.lowering.accepts(product) or "")


@pytest.mark.parametrize("size", [(1, "all"), ("all", 1), (64, "all")])
def test_whole_rows_and_columns_are_no_tiles(size: tuple[Edge, Edge]) -> None:
    encoding = Blocks(size, IntGrid(8))
    kept = torch.ones(-(-512 // encoding.edges((512, 256))[0]), -(-256 // encoding.edges((512, 256))[1]))
    case = masked(encoding, kept.bool(), 512, 256)
    assert case.lowering.accepts("float16") == "whole rows or columns are not blocks that a tile holds"


def test_any_elements_have_no_kernel() -> None:
    weight = torch.randn(4, 8)
    encoding = Unstructured(IntGrid(8))
    parts = encoding.encode(weight, encoding.fit(weight))
    assert find_lowering(encoding, (4, 8), parts) == f"no kernel decodes {encoding}"


# N of M --------------------------------------------------------------------------------------------------------------
PATTERNS: list[tuple[tuple[int, int], ElementEncoding]] = [
    ((2, 4), Dense("float16")),
    ((1, 2), Dense("float32")),
    ((3, 16), Dense("float16")),
    ((2, 4), IntGrid(4, group=64, scale_dtype="float16")),
    ((2, 4), IntGrid(4, group=40, symmetric=False)),
    ((2, 4), IntGrid(8)),
    ((1, 2), IntGrid(8, group="tensor")),
    ((1, 4), IntGrid(4, group=64, symmetric=False, zero="minimum")),
    ((4, 8), IntGrid(2, group=64)),
    ((2, 4), IntGrid(3)),
]


def structured(
    pattern: tuple[int, int], inner: ElementEncoding, rows: int = 33, columns: int = 208, *, seed: int = 1
) -> Case:
    """A random weight of this pattern."""
    encoding = NM(*pattern, inner)
    mask = encoding.select(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))
    return masked(encoding, mask, rows, columns)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize(("pattern", "inner"), PATTERNS, ids=str)
def test_structured_products_are_right(pattern: tuple[int, int], inner: ElementEncoding, regime: str) -> None:
    configuration, tokens = REGIMES[regime]
    found, exact, _ = run_product(structured(pattern, inner), configuration, tokens)
    assert relative(found, exact) < TOLERANCE["float16"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [Dense("float32"), IntGrid(4, group=32), IntGrid(8)], ids=str)
def test_structured_products_in_other_types_are_right(inner: ElementEncoding, dtype: str) -> None:
    found, exact, _ = run_product(structured((2, 4), inner), SPLIT, 5, dtype)
    assert relative(found, exact) < TOLERANCE[dtype]


@pytest.mark.parametrize("tokens", [1, 5])
def test_two_structured_weights_share_a_kernel(tokens: int) -> None:
    first, second = (structured((2, 4), IntGrid(4, group=64), seed=seed) for seed in (1, 2))
    x = torch.randn(tokens, 208, generator=torch.Generator().manual_seed(3)).half()
    y = torch.full((tokens, 33), torch.nan, dtype=torch.float16)
    problem = Problem((first.lowering, second.lowering), "float16", epilogue=Epilogue(result="product * product_1"))
    tensors = [case.lowering.layout(case.parts)[b.name] for case in (first, second) for b in case.lowering.buffers]
    interpret_problem(problem, Configuration(16 if tokens > 1 else 1, 16, 256), [x, *tensors], y, tokens)
    exact = (x.double() @ first.dense.T) * (x.double() @ second.dense.T)
    assert relative(y.double(), exact) < TOLERANCE["float16"]


@pytest.mark.parametrize("tokens", [1, 5])
def test_quantized_activations_meet_structured_codes(tokens: int) -> None:
    case = structured((2, 4), IntGrid(4))
    prologue = Prologue(quantized="int8")
    found, exact, _ = run_product(case, SPLIT if tokens > 1 else Configuration(1, 32), tokens, prologue=prologue)
    # A token's rounding to 127 steps is off by half a step at most, in every column.
    step = 4.5 / 127
    assert float((found - exact).abs().max()) < step / 2 * float(case.dense.abs().sum(1).max())
    assert relative(found, exact) < 0.02


@pytest.mark.parametrize(
    ("pattern", "inner", "told"),
    [
        ((2, 6), Dense(), "6 columns"),
        ((2, 32), Dense(), "32 columns"),
        ((2, 8), IntGrid(4, group=12), "groups of 12"),
    ],
)
def test_patterns_without_a_form_are_refused(pattern: tuple[int, int], inner: ElementEncoding, told: str) -> None:
    assert told in (structured(pattern, inner, 8, 96).lowering.accepts("float16") or "")


# what is promised ----------------------------------------------------------------------------------------------------
INNER = [Dense("float16"), IntGrid(8, scale_dtype="float16"), IntGrid(4, group=128, scale_dtype="float16")]


@pytest.mark.parametrize("inner", INNER, ids=str)
@pytest.mark.parametrize("mask", ["blocks", "structured"])
def test_bits_are_those_of_the_buffers(mask: str, inner: ElementEncoding) -> None:
    if mask == "blocks":
        case = masked(Blocks((64, 64), inner), torch.ones(8, 8, dtype=torch.bool), 512, 512)
    else:
        case = structured((2, 4), inner, 512, 512)
    buffers = case.lowering.layout(case.parts)
    stored = sum(buffers[buffer.name].nbytes for buffer in case.lowering.buffers if buffer.name != "pointers")
    cost = case.lowering.cost("float16")
    assert cost.bits == pytest.approx(stored * 8 / 512**2)
    assert cost.density == 1


def test_the_density_is_what_is_read() -> None:
    case = masked(Blocks((32, 64), Dense("float16")), some_blocks((32, 64)))
    assert case.lowering.cost("float16").density == pytest.approx((0 + 1 + 2) * 32 * 64 / (ROWS * COLUMNS))


@pytest.mark.parametrize("block_tokens", [16, 64])
@pytest.mark.parametrize("inner", [INNER[0], INNER[2]], ids=str)
@pytest.mark.parametrize("mask", ["blocks", "structured"])
def test_tensor_cores_multiply_without_spills(mask: str, inner: ElementEncoding, block_tokens: int) -> None:
    blocks = mask == "blocks"
    size = (512, 512)
    case = (
        masked(Blocks((64, 64), inner), torch.eye(8, dtype=torch.bool), *size)
        if blocks
        else structured((2, 4), inner, *size)
    )
    kernel = generate(Problem((case.lowering,), "float16"), Configuration(block_tokens, 64, 64 if blocks else 256))
    found = report(kernel, 90)
    assert violations(kernel, found) == []
    assert any(kind.startswith("HGMMA") for kind in found.tensor_core)


@dataclass(frozen=True)
class Unknown(Dense):
    """An encoding that no table has."""


@pytest.mark.parametrize("encoding", [Unknown("float16"), NM(of=Unknown("float16"))], ids=str)
def test_an_encoding_without_a_kernel_is_named_and_an_extension_adds_one(encoding: Encoding) -> None:
    weight = torch.randn(4, 8)
    parts = encoding.encode(weight, encoding.fit(weight))
    assert find_lowering(encoding, (4, 8), parts) == f"no kernel decodes {Unknown('float16')}"
    found = find_lowering(encoding, (4, 8), parts, {"Unknown": DenseWeight})
    assert isinstance(found, WeightLowering)
    assert found.accepts("float16") is None
