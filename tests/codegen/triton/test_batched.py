"""Products with a batch of matrices, in Triton's interpreter, against float64; sizes are odd, so there are tails."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from sparc.codegen.triton.decoding import decoding_grid, generate_decoding
from sparc.codegen.triton.interpret import interpret
from sparc.codegen.triton.launch import interpret_problem
from sparc.codegen.triton.lowerings import find_lowering
from sparc.codegen.triton.problem import Access, Configuration, Epilogue, EpilogueInput, Problem, Prologue
from sparc.codegen.triton.site_weight import SiteWeight
from sparc.codegen.triton.tiles import WeightLowering
from sparc.encoding.base import Encoding
from sparc.encoding.binary_code import BinaryCode
from sparc.encoding.blocks import Blocks
from sparc.encoding.codebook import Codebook
from sparc.encoding.dense import Dense
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.microscaling import MXFP4, NVFP4
from sparc.encoding.nm import NM
from sparc.encoding.view import WeightView
from tests.codegen.triton.running import TOLERANCE, Case, fitting, quantized, relative

BATCH, ROWS, COLUMNS = 3, 45, 200
ENCODINGS: list[Encoding] = [
    Dense("float16"),
    IntGrid(4, group=32, symmetric=False),
    IntGrid(8),
    IntGrid(8, group="tensor"),
    IntGrid(3, group=64),
    Codebook("nf4"),
    Codebook("kmeans", 3, 48),
    MXFP4(),
    NVFP4(),
    BinaryCode(2, 48),
    NM(2, 4, of=IntGrid(4, group=64)),
    NM(2, 4, of=BinaryCode(2, 64)),
    Blocks(size=(32, 64), of=IntGrid(8)),
]
REGIMES = {
    "gemv": (Configuration(1, 16), 1),
    "gemv split": (Configuration(1, 16, split=3), 1),
    "skinny": (Configuration(16, 32), 3),
    "skinny split": (Configuration(16, 32, split=2), 17),
    "gemm": (Configuration(64, 32), 70),
}


def make_batch(encoding: Encoding, seed: int = 0) -> Case:
    """Random matrices `[BATCH, ROWS, COLUMNS]` of different sizes, rounded and encoded; the case's parts are those of
    one matrix, its dense weight is the batch.
    """
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor([1.0, 0.1, 3.0]).reshape(BATCH, 1, 1)
    weight = size * torch.randn(BATCH, ROWS, COLUMNS, generator=generator)
    grid = encoding.fit(weight)
    parts = encoding.encode(encoding.round(weight, grid), grid)
    source = fx.Graph().placeholder("weight")
    site = SiteWeight(("weight",), encoding, (BATCH, ROWS, COLUMNS), parts, source, WeightView("transposed"))
    lowering = find_lowering(encoding, site.matrix_shape, site.matrix_parts)
    assert isinstance(lowering, WeightLowering), lowering
    dense = encoding.decode(parts, (BATCH, ROWS, COLUMNS), torch.float32).double()
    return Case(encoding, lowering, dense, site.matrix_parts)


def buffers(case: Case) -> list[Tensor]:
    laid = case.lowering.layout(case.parts)
    return [laid[buffer.name] for buffer in case.lowering.buffers]


def run(cases: list[Case], configuration: Configuration, problem: Problem, x: Tensor, *operands: Tensor) -> Tensor:
    """The kernel's result `[BATCH, tokens, ROWS]`; what it leaves unwritten is NaN."""
    y = torch.full((BATCH, x.shape[-2], ROWS), torch.nan, dtype=torch.float16)
    tensors = [x, *(buffer for case in cases for buffer in buffers(case)), *operands]
    interpret_problem(problem, fitting(cases[0], configuration), tensors, y, x.shape[-2])
    return y.double()


def activation(tokens: int, *, shared: bool = False) -> Tensor:
    shape = (tokens, COLUMNS) if shared else (BATCH, tokens, COLUMNS)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).half()


def agrees(found: Tensor, exact: Tensor, tolerance: float = TOLERANCE["float16"]) -> bool:
    """Matrix by matrix, since their sizes differ."""
    return all(relative(a, b) < tolerance for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_products_are_right(encoding: Encoding, regime: str) -> None:
    (configuration, tokens), case = REGIMES[regime], make_batch(encoding)
    x = activation(tokens)
    found = run([case], configuration, Problem((case.lowering,), "float16", access=Access("batched", batch=BATCH)), x)
    assert agrees(found, x.double() @ case.dense.mT)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_decoded_weights_are_right(encoding: Encoding) -> None:
    case = make_batch(encoding)
    dense = torch.zeros(BATCH * ROWS, COLUMNS, dtype=torch.float32)
    kernel = generate_decoding(case.lowering, "float32", BATCH)
    interpret(kernel, decoding_grid(case.lowering, BATCH), [*buffers(case), dense])
    assert agrees(dense.view(BATCH, ROWS, COLUMNS).double(), case.dense, 1e-5)


def test_a_batch_may_share_one_activation() -> None:
    case, x = make_batch(IntGrid(4, group=32)), activation(17, shared=True)
    problem = Problem((case.lowering,), "float16", access=Access("batched", batch=BATCH, shared=True))
    for configuration, tokens in (REGIMES["gemv"], REGIMES["skinny split"], REGIMES["gemm"]):
        x = activation(tokens, shared=True)
        assert agrees(run([case], configuration, problem, x), x.double() @ case.dense.mT)


def test_split_sums_are_added_with_atomics() -> None:
    case, x = make_batch(IntGrid(8)), activation(17)
    problem = Problem((case.lowering,), "float16", access=Access("batched", batch=BATCH))
    found = run([case], Configuration(16, 32, split=2, deterministic=False), problem, x)
    assert agrees(found, x.double() @ case.dense.mT)


OPERANDS: dict[Any, tuple[int, ...]] = {"feature": (BATCH, 1, ROWS), "token": (BATCH, -1, 1), "full": (BATCH, -1, ROWS)}
AFTER: dict[Any, Callable[..., Tensor]] = {
    "feature": lambda y, other, value: y + value,
    "token": lambda y, other, value: y * value + other,
    "full": lambda y, other, value: y * other + value,
}
LINES = {
    "feature": "product + v_value",
    "token": "product * v_value + product_1",
    "full": "product * product_1 + v_value",
}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("regime", ["gemv split", "skinny split", "gemm"])
@pytest.mark.parametrize("kind", OPERANDS)
def test_epilogues_are_right(kind: Any, regime: str, shared: bool) -> None:
    (configuration, tokens), cases = REGIMES[regime], [make_batch(IntGrid(8), seed) for seed in (0, 1)]
    x = activation(tokens, shared=shared)
    shape = [tokens if size == -1 else size for size in OPERANDS[kind]]
    value = torch.randn(shape, generator=torch.Generator().manual_seed(2)).half()
    after = Epilogue((EpilogueInput("v", "float16", kind),), (), LINES[kind])
    access = Access("batched", batch=BATCH, shared=shared)
    problem = Problem(tuple(case.lowering for case in cases), "float16", epilogue=after, access=access)
    exact = AFTER[kind](*(x.double() @ case.dense.mT for case in cases), value.double())
    assert agrees(run(cases, configuration, problem, x, value), exact)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("regime", ["skinny split", "gemm"])
def test_activations_are_quantized_token_by_token(regime: str, shared: bool) -> None:
    (configuration, tokens), case = REGIMES[regime], make_batch(IntGrid(8))
    x = activation(tokens, shared=shared)
    access = Access("batched", batch=BATCH, shared=shared)
    problem = Problem((case.lowering,), "float16", Prologue(quantized="int8"), access=access)
    found = run([case], configuration, problem, x)
    assert agrees(found, quantized(x, "int8") @ case.dense.mT)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("regime", ["gemv split", "skinny split"])
def test_a_normalisation_reads_its_own_tokens(regime: str, shared: bool) -> None:
    (configuration, tokens), case = REGIMES[regime], make_batch(IntGrid(8))
    x = activation(tokens, shared=shared) * torch.arange(1, tokens + 1).unsqueeze(-1)
    access = Access("batched", batch=BATCH, shared=shared)
    problem = Problem((case.lowering,), "float16", Prologue("rms_norm", 1e-3), access=access)
    normalised = F.rms_norm(x.double(), (COLUMNS,), eps=1e-3).half().double()
    assert agrees(run([case], configuration, problem, x), normalised @ case.dense.mT)
