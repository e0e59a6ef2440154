"""What comes before and after a product: every kind of prologue and epilogue, in every regime, against float64."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparc.codegen.triton.launch import interpret_problem
from sparc.codegen.triton.problem import Access, Configuration, Epilogue, EpilogueInput, Problem, Prologue, Window
from sparc.codegen.triton.weights.dense import DenseWeight
from sparc.codegen.triton.weights.integer import IntegerWeight
from sparc.encoding.base import Encoding
from sparc.encoding.dense import Dense
from sparc.encoding.int_grid import IntGrid
from tests.codegen.triton.running import TOLERANCE, Case, LoweringType, fitting, make_case, relative

ROWS, COLUMNS = 45, 200
REGIMES = {
    "gemv": (Configuration(1, 16), 1),
    "gemv split": (Configuration(1, 16, split=3), 1),
    "skinny split": (Configuration(16, 32, split=2), 5),
    "skinny atomic": (Configuration(16, 32, split=2, deterministic=False), 19),
    "gemm": (Configuration(64, 32), 67),
}
ENCODINGS: list[tuple[Encoding, LoweringType]] = [
    (Dense("float16"), DenseWeight),
    (IntGrid(4, group=32, symmetric=False), IntegerWeight),
    (IntGrid(8), IntegerWeight),
]
WEIGHTS = pytest.mark.parametrize(("encoding", "lowering"), ENCODINGS, ids=[str(each[0]) for each in ENCODINGS])


@dataclass(frozen=True)
class After:
    """An epilogue, what it reads by kind, and what it means."""

    epilogue: Epilogue
    meaning: Callable[..., Tensor]
    anchors: int = 1


def epilogue(lines: list[str], *inputs: EpilogueInput, dtype: str = "float16") -> Epilogue:
    return Epilogue(inputs, tuple(lines[:-1]), lines[-1], dtype)


def reads(name: str, kind: Any, dtype: str = "float16") -> EpilogueInput:
    return EpilogueInput(name, dtype, kind)


AFTER = {
    "bias and gelu": After(
        epilogue(["a = product + b_value", "0.5 * a * (1.0 + tl.erf(a * 0.7071067811865476))"], reads("b", "feature")),
        lambda y, b: F.gelu(y + b),
    ),
    "residual sum": After(epilogue(["product + r_value"], reads("r", "full")), lambda y, r: y + r),
    "two in one": After(
        epilogue(["product * tl.sigmoid(product) * product_1"]), lambda y, other: F.silu(y) * other, anchors=2
    ),
    "two with biases": After(
        epilogue(["(product + b_value) * (product_1 + c_value)"], reads("b", "feature"), reads("c", "feature")),
        lambda y, other, b, c: (y + b) * (other + c),
        anchors=2,
    ),
    "scaled by token": After(epilogue(["product * t_value"], reads("t", "token", "float32")), lambda y, t: y * t),
    "scaled by a number": After(epilogue(["product * s_value"], reads("s", "scalar", "float32")), lambda y, s: y * s),
    "cast": After(epilogue(["product"], dtype="float32"), lambda y: y),
}


def operand(each: EpilogueInput, tokens: int, generator: torch.Generator) -> Tensor:
    shape = {"feature": (ROWS,), "full": (tokens, ROWS), "token": (tokens, 1), "scalar": (1,)}[each.kind]
    return torch.randn(shape, generator=generator).to(getattr(torch, each.dtype))


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("kind", AFTER)
@WEIGHTS
def test_epilogues_are_right(encoding: Encoding, lowering: LoweringType, kind: str, regime: str) -> None:
    after, (configuration, tokens) = AFTER[kind], REGIMES[regime]
    cases = [make_case(encoding, lowering, ROWS, COLUMNS, seed=seed) for seed in range(after.anchors)]
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(tokens, COLUMNS, generator=generator).half()
    operands = [operand(each, tokens, generator) for each in after.epilogue.inputs]
    problem = Problem(tuple(case.lowering for case in cases), "float16", epilogue=after.epilogue)
    y = torch.full((tokens, ROWS), torch.nan, dtype=getattr(torch, after.epilogue.dtype))
    run(problem, cases, configuration, [x, *weights(cases), *operands], y, tokens)
    exact = after.meaning(*(x.double() @ case.dense.T for case in cases), *(each.double() for each in operands))
    assert relative(y.double(), exact) < TOLERANCE["float16"]


PROLOGUES = {
    "rms norm": Prologue("rms_norm", 1e-5, gain=True),
    "rms norm without gain": Prologue("rms_norm", 1e-2),
    "layer norm": Prologue("layer_norm", 1e-5, gain=True, bias=True, dtype="float32"),
}


def normalised(prologue: Prologue, x: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
    """In float64, rounded once to half precision as the program does."""
    x = x.double()
    if prologue.kind == "layer_norm":
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + prologue.epsilon).sqrt()
    x = x * gain.double() if gain is not None else x
    return (x + bias.double() if bias is not None else x).half().double()


@pytest.mark.parametrize("regime", ["gemv split", "skinny split"])
@pytest.mark.parametrize("kind", PROLOGUES)
@WEIGHTS
def test_prologues_are_right(encoding: Encoding, lowering: LoweringType, kind: str, regime: str) -> None:
    prologue, (configuration, tokens) = PROLOGUES[kind], REGIMES[regime]
    case = make_case(encoding, lowering, ROWS, COLUMNS)
    generator = torch.Generator().manual_seed(3)
    x = (torch.randn(tokens, COLUMNS, generator=generator) * 3 + 1).half()
    dtype = getattr(torch, prologue.dtype)
    gain = torch.rand(COLUMNS, generator=generator).to(dtype) + 0.5 if prologue.gain else None
    bias = torch.randn(COLUMNS, generator=generator).to(dtype) if prologue.bias else None
    problem = Problem((case.lowering,), "float16", prologue)
    y = torch.full((tokens, ROWS), torch.nan, dtype=torch.float16)
    run(
        problem,
        [case],
        configuration,
        [x, *weights([case]), *(each for each in (gain, bias) if each is not None)],
        y,
        tokens,
    )
    assert relative(y.double(), normalised(prologue, x, gain, bias) @ case.dense.T) < TOLERANCE["float16"]


@pytest.mark.parametrize("block_tokens", [16, 64])
@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "kernel"), [(1, 1, 1, 3), (2, 0, 1, 3), (1, 2, 2, 3), (3, (0, 2), 1, (1, 5))]
)
def test_windows_are_right(block_tokens: int, stride: int, padding: Any, dilation: int, kernel: Any) -> None:
    generator = torch.Generator().manual_seed(4)
    image = torch.randn(2, 6, 9, 11, generator=generator).half()
    size = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    case = make_case(IntGrid(8), IntegerWeight, 20, 6 * size[0] * size[1])
    exact = F.conv2d(image.double(), case.dense.view(20, 6, *size), None, stride, padding, dilation)
    pads = padding if isinstance(padding, tuple) else (padding, padding)
    output = (int(exact.shape[2]), int(exact.shape[3]))
    window = Window(6, (9, 11), output, size, (stride, stride), pads, (dilation, dilation))
    positions = output[0] * output[1]
    residual = EpilogueInput("r", "float16", "full")
    added = torch.randn(exact.shape, generator=generator).half()
    after = Epilogue((residual,), (), "product + r_value")
    problem = Problem((case.lowering,), "float16", epilogue=after, access=Access("window", positions, window))
    y = torch.full(exact.shape, torch.nan, dtype=torch.float16)
    run(problem, [case], Configuration(block_tokens, 16), [image, *weights([case]), added], y, 2 * positions)
    assert relative(y.double(), exact + added.double()) < TOLERANCE["float16"]


def weights(cases: list[Case]) -> list[Tensor]:
    laid = [case.lowering.layout(case.parts) for case in cases]
    return [each[buffer.name] for case, each in zip(cases, laid, strict=True) for buffer in case.lowering.buffers]


def run(
    problem: Problem, cases: list[Case], configuration: Configuration, tensors: list[Tensor], y: Tensor, tokens: int
) -> None:
    interpret_problem(problem, fitting(cases[0], configuration), tensors, y, tokens)


def test_scales_below_half_precision_keep_their_digits() -> None:
    encoding = IntGrid(8, group=32)
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(5)) * 1e-4
    grid = encoding.fit(weight)
    parts = encoding.encode(encoding.round(weight, grid), grid)
    lowering = IntegerWeight(encoding, (16, 64), parts)
    assert not lowering.half_scales
    x = torch.randn(33, 64, generator=torch.Generator().manual_seed(6)).half()
    y = torch.empty(33, 16)
    problem = Problem((lowering,), "float16", epilogue=Epilogue(dtype="float32"))
    laid = lowering.layout(parts)
    interpret_problem(problem, Configuration(32, 16, 64), [x, laid["codes"], laid["scale"]], y, 33)
    exact = x.double() @ encoding.decode(parts, (16, 64), torch.float64).T
    assert relative(y.double(), exact) < TOLERANCE["float16"]
