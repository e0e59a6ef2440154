"""What the GPU benchmark multiplies with: every encoding on random weights, and the problems kernels are made for."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparc.codegen.triton.lowerings import find_lowering
from sparc.codegen.triton.problem import Epilogue, Problem, Prologue
from sparc.codegen.triton.tiles import WeightLowering
from sparc.encoding.base import Encoding, Parts
from sparc.encoding.binary_code import BinaryCode
from sparc.encoding.blocks import Blocks
from sparc.encoding.codebook import Codebook
from sparc.encoding.dense import Dense
from sparc.encoding.float8 import Float8
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.microscaling import MXFP4, NVFP4
from sparc.encoding.nm import NM

_INT4 = IntGrid(4, group=128, scale_dtype="float16")
_INT8 = IntGrid(8, scale_dtype="float16")
_HALF = Dense("float16")
EPSILON = 1e-5


@dataclass(frozen=True)
class Case:
    """An encoding to measure.

    Args:
        name: what to call it.
        encoding: the encoding.
        density: of the blocks, the share that is kept.
        dtype: of activations.
    """

    name: str
    encoding: Encoding
    density: float = 1.0
    dtype: str = "float16"


# The most wanted first: what a run has no time for is at the end.
CASES: tuple[Case, ...] = (
    Case("int4 g128", _INT4),
    Case("int8", _INT8),
    Case("fp8", Float8(scale_dtype="float16")),
    Case("2:4 fp16", NM(2, 4, _HALF)),
    Case("blocks 75%", Blocks((64, 64), _HALF), 0.25),
    Case("blocks 90%", Blocks((64, 64), _HALF), 0.1),
    Case("fp16", _HALF),
    Case("int3 g128", IntGrid(3, group=128, scale_dtype="float16")),
    Case("NF4", Codebook("nf4", scale_dtype="float16")),
    Case("MXFP4", MXFP4()),
    Case("NVFP4", NVFP4()),
    Case("int2 g128", IntGrid(2, group=128, scale_dtype="float16")),
    Case("2:4 int4", NM(2, 4, _INT4)),
    Case("2:4 int8", NM(2, 4, _INT8)),
    Case("blocks 50%", Blocks((64, 64), _HALF), 0.5),
    Case("binary 3", BinaryCode(3, scale_dtype="float16")),
    Case("bf16", Dense("bfloat16"), dtype="bfloat16"),
)


@dataclass(frozen=True)
class EncodedMatrix:
    """A random matrix, encoded.

    Args:
        case: its encoding.
        shape: rows and columns.
        parts: the stored tensors.
        lowering: what generates its code.
    """

    case: Case
    shape: tuple[int, int]
    parts: Parts
    lowering: WeightLowering

    def dense(self, dtype: torch.dtype) -> Tensor:
        """What the parts mean, `[rows, columns]`."""
        return self.case.encoding.decode(self.parts, self.shape, torch.float32).to(dtype)

    def buffers(self) -> list[Tensor]:
        """The tensors as kernels read them."""
        laid = self.lowering.layout(self.parts)
        return [laid[buffer.name] for buffer in self.lowering.buffers]

    @property
    def nbytes(self) -> int:
        """Of the stored tensors."""
        return sum(part.nbytes for part in self.parts.values())


def encode(case: Case, shape: tuple[int, int], device: str, seed: int = 0) -> EncodedMatrix | str:
    """A random matrix `[rows, columns]`, of standard deviation 1 / sqrt(columns), or why there is none."""
    refused = case.encoding.accepts(shape)
    if refused:
        return refused
    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.randn(shape, generator=generator, device=device) * shape[1] ** -0.5
    parts = _parts(case, weight)
    lowering = find_lowering(case.encoding, shape, parts)
    if isinstance(lowering, str):
        return lowering
    why = lowering.accepts(case.dtype)  # type: ignore[arg-type]
    return why if why else EncodedMatrix(case, shape, parts, lowering)


def _parts(case: Case, weight: Tensor) -> Parts:
    encoding = case.encoding
    if isinstance(encoding, Blocks):
        grid = encoding.fit_masked(weight, encoding.select(weight, case.density))
    else:
        grid = encoding.fit(weight)
    return encoding.encode(encoding.round(weight, grid), grid)


def can_pair(case: Case) -> bool:
    """Whether one kernel can walk over two matrices: two that keep different blocks have no columns in common."""
    return not isinstance(case.encoding, Blocks)


def make_problem(matrices: Sequence[EncodedMatrix], norm: bool) -> Problem:
    """The product with one matrix, or the gated one of two: `silu(x @ a.T) * (x @ b.T)`.

    Args:
        matrices: one or two.
        norm: whether a normalisation by the root mean square, with a gain in the activation's dtype, comes before.
    """
    dtype = matrices[0].case.dtype
    prologue = Prologue("rms_norm", EPSILON, gain=True, dtype=dtype) if norm else Prologue()
    gated = len(matrices) == 2
    lines = ("gated = product * tl.sigmoid(product) * product_1",) if gated else ()
    epilogue = Epilogue(lines=lines, result="gated" if gated else "product", dtype=dtype)
    return Problem(tuple(each.lowering for each in matrices), dtype, prologue, epilogue)


def normalise(x: Tensor, gain: Tensor) -> Tensor:
    """The normalisation of `make_problem`, in float64, `[tokens, columns]`."""
    wide = x.double()
    return wide * (wide.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * gain.double()


def exact(x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """The product, or the gated one, of float64 tensors."""
    products = [x @ each.T for each in matrices]
    return products[0] if len(products) == 1 else torch.nn.functional.silu(products[0]) * products[1]
