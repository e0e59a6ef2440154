"""Runs a generated kernel in Triton's interpreter and compares it with float64."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparc.codegen.triton.kernel import Kernel
from sparc.codegen.triton.launch import interpret_problem
from sparc.codegen.triton.problem import Configuration, Epilogue, Problem, Prologue
from sparc.codegen.triton.tiles import WeightLowering
from sparc.encoding.base import Encoding, Parts

# Half of what the last place of the output is worth, and what sums of products in these types add to it.
TOLERANCE = {"float16": 2e-3, "bfloat16": 1.2e-2, "float32": 2e-5}

LoweringType = Callable[[Encoding, tuple[int, int], Parts], WeightLowering]


@dataclass
class Case:
    """A weight on an encoding's grid, ready to be multiplied."""

    encoding: Encoding
    lowering: WeightLowering
    dense: Tensor  # float64 `[rows, columns]`: what the parts mean
    parts: Parts


@functools.cache
def make_case(encoding: Encoding, lowering: LoweringType, rows: int, columns: int, *, seed: int = 0) -> Case:
    """A random weight `[rows, columns]`, rounded and encoded, once for all who ask for it."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    grid = encoding.fit(weight)
    parts = encoding.encode(encoding.round(weight, grid), grid)
    dense = encoding.decode(parts, (rows, columns), torch.float32).double()
    return Case(encoding, lowering(encoding, (rows, columns), parts), dense, parts)


def fitting(case: Case, configuration: Configuration) -> Configuration:
    """The configuration with a block of columns and a split that the weight allows."""
    weight = case.lowering
    columns = min(max(configuration.block_columns, weight.unit), weight.greatest)
    while columns > weight.unit and weight.padded_columns % columns:
        columns //= 2
    steps = weight.padded_columns // columns
    split = max(each for each in range(1, configuration.split + 1) if steps % each == 0)
    return replace(
        configuration, block_columns=columns, split=split, block_rows=weight.block_rows or configuration.block_rows
    )


def run_product(
    case: Case,
    configuration: Configuration,
    tokens: int,
    dtype: str = "float16",
    prologue: Prologue | None = None,
) -> tuple[Tensor, Tensor, Kernel]:
    """The kernel's result and the exact one, `[tokens, rows]` in float64, and the kernel.

    The exact one is of the activation as the prologue quantizes it; it knows no normalisation.
    """
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, case.lowering.columns, generator=generator).to(getattr(torch, dtype))
    y = torch.full((tokens, case.lowering.rows), torch.nan, dtype=x.dtype)
    problem = Problem((case.lowering,), dtype, prologue or Prologue(), Epilogue(dtype=dtype))
    buffers = case.lowering.layout(case.parts)
    tensors = [x, *(buffers[buffer.name] for buffer in case.lowering.buffers)]
    kernel = interpret_problem(problem, fitting(case, configuration), tensors, y, tokens)
    return y.double(), quantized(x, problem.prologue.quantized) @ case.dense.T, kernel


def quantized(x: Tensor, kind: str) -> Tensor:
    """An activation in 8 bits, with a scale for each token, in float64; empty `kind`: as it is."""
    if not kind:
        return x.double()
    scale = x.float().abs().amax(-1, keepdim=True) / {"int8": 127, "float8e4nv": 448}[kind]
    numbers = x.float() / torch.where(scale > 0, scale, 1)
    numbers = numbers.round() if kind == "int8" else numbers.to(torch.float8_e4m3fn)
    return numbers.double() * scale.double()


def relative(found: Tensor, exact: Tensor) -> float:
    """The greatest error, relative to the greatest value; NaN counts as infinite."""
    return float((found - exact).abs().nan_to_num(nan=torch.inf).max() / exact.abs().max())
