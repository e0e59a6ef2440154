"""4-bit floats in small blocks, each with a scale of 8 bits: MXFP4 and NVFP4."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor

from sparc.encoding.bits import pack_bits, unpack_bits
from sparc.encoding.float8 import E4M3_MAX, e4m3_codes, e4m3_numbers
from sparc.encoding.groups import Group, group_count
from sparc.encoding.scaled import FACTORS, ScaledEncoding

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX = 6.0
_E2M1_EXPONENT = 2  # of 4 and 6
_E8M0_BIAS, _E8M0_MAX = 127, 254  # 255 is NaN
_E4M3_MIN = 2.0**-9
_LEAST_TENSOR_SCALE = 2.0**-117  # times the least E4M3 scale it is still a normal float32
_GREATEST_TENSOR_SCALE = torch.finfo(torch.bfloat16).max / (E4M3_MAX * E2M1_MAX)


def e2m1_codes(numbers: Tensor) -> Tensor:
    """The 4-bit patterns of the nearest E2M1 floats, half to even, saturating; negative zero is written as zero.

    OCP Microscaling Formats Specification 1.0, section 5.3.3: the sign is bit 3, the magnitudes are `E2M1`.

    Args:
        numbers: floating, not NaN.

    Returns:
        uint8, in the same shape.
    """
    magnitude = numbers.abs().clamp_(max=E2M1_MAX)
    step = 0.5 + 0.5 * (magnitude >= 2) + (magnitude >= 4)
    halves = (magnitude / step).round_().mul_(step * 2).to(torch.int32)
    order = torch.zeros(2 * int(E2M1_MAX) + 1, dtype=torch.uint8, device=numbers.device)
    for code, each in enumerate(E2M1):
        order[int(2 * each)] = code
    codes = order[halves]
    return codes + 8 * ((numbers < 0) & (codes > 0)).to(torch.uint8)


def e2m1_numbers(codes: Tensor) -> Tensor:
    """The float32 numbers of E2M1 patterns, uint8 below 16."""
    table = torch.tensor([*E2M1, *(-each for each in E2M1)], device=codes.device)
    return table[codes.to(torch.int32)]


@dataclass(frozen=True)
class _Float4(ScaledEncoding):
    """E2M1 floats, two a byte, the first one low, and a scale of one byte per block of columns."""

    def nearest(self, numbers: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """E2M1 patterns."""
        return e2m1_codes(numbers)

    def numbers(self, codes: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """E2M1 floats."""
        return e2m1_numbers(codes)

    def pack(self, codes: Tensor) -> Tensor:
        """Two a byte, the first one low."""
        return pack_bits(codes, 4)

    def unpack(self, packed: Tensor, length: int) -> Tensor:
        """The inverse of `pack`."""
        return unpack_bits(packed, 4, length)

    def code_bytes(self, length: int | sympy.Expr) -> sympy.Expr:
        """`ceil(length / 2)`."""
        return sympy.ceiling(sympy.sympify(length) / 2)


@dataclass(frozen=True)
class MXFP4(_Float4):
    """E2M1 floats times a power of two per 32 columns; the last block of a row may be shorter.

    OCP Microscaling Formats Specification 1.0, sections 5.2 and 6.3: the scale is `2^(floor(log2 max |w|) - 2)`, stored
    as its exponent plus 127, uint8; it is 1 where all is 0. Magnitudes between 6 and 8 scales saturate, unless a search
    finds the next scale better.
    """

    @property
    def columns(self) -> Group:
        """32."""
        return 32

    @property
    def grid_names(self) -> tuple[str, ...]:
        """Scale: biased exponents."""
        return ("scale",)

    def scales(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """`2^(exponent - 127)`, made of its bits, because not every device's power of two is exact."""
        exponent = tensors["scale"].to(torch.int32)
        bits = torch.where(exponent > 0, exponent << 23, 1 << 22)  # 2^-127 is subnormal
        return bits.view(torch.float32)

    def covering(self, magnitude: Tensor) -> dict[str, Tensor]:
        """The floor rule of the specification."""
        exponent = torch.frexp(magnitude).exponent - 1 - _E2M1_EXPONENT + _E8M0_BIAS
        exponent = torch.where(magnitude > 0, exponent.clamp(0, _E8M0_MAX), _E8M0_BIAS)
        return {"scale": exponent.to(torch.uint8)}

    def candidates(self, magnitude: Tensor, start: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """The next scale, which clips nothing, and the one below."""
        exponent = start["scale"].to(torch.int32)
        for step in (1, -1):
            yield (exponent + step).clamp(0, _E8M0_MAX).to(torch.uint8)

    def grid_bytes(self, shape: Sequence[int | sympy.Expr]) -> sympy.Expr:
        """A byte per block."""
        return group_count(shape, self.columns)


@dataclass(frozen=True)
class NVFP4(_Float4):
    """E2M1 floats times an E4M3 scale per 16 columns and a float32 scale per matrix of a batch.

    As in NVIDIA's NVFP4 (TensorRT Model Optimizer, Transformer Engine): `tensor_scale = max |W| / (448 * 6)`, and the
    scale of a block is `max |w| / 6 / tensor_scale`, stored as an E4M3 bit pattern, uint8, and never 0. The last block
    of a row may be shorter.
    """

    @property
    def columns(self) -> Group:
        """16."""
        return 16

    @property
    def grid_names(self) -> tuple[str, ...]:
        """Scale `[..., out, blocks]`, and tensor scale `[..., 1, 1]`."""
        return ("scale", "tensor_scale")

    def scales(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The product of both, rounded to float32."""
        return e4m3_numbers(tensors["scale"]) * tensors["tensor_scale"]

    def covering(self, magnitude: Tensor) -> dict[str, Tensor]:
        """The greatest magnitude of the matrix becomes `448 * 6`; the tensor scale of zeros is 1."""
        whole = magnitude.amax(dim=(-2, -1), keepdim=True) / (E4M3_MAX * E2M1_MAX)
        whole = torch.where(whole > 0, whole.clamp(_LEAST_TENSOR_SCALE, _GREATEST_TENSOR_SCALE), 1)
        return {"scale": self._block_scale(magnitude, whole), "tensor_scale": whole}

    def candidates(self, magnitude: Tensor, start: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """Other block scales; the tensor scale stays."""
        for factor in FACTORS:
            yield self._block_scale(magnitude * factor, start["tensor_scale"])

    def _block_scale(self, magnitude: Tensor, tensor_scale: Tensor) -> Tensor:
        return e4m3_codes((magnitude / E2M1_MAX / tensor_scale).clamp(min=_E4M3_MIN))

    def grid_bytes(self, shape: Sequence[int | sympy.Expr]) -> sympy.Expr:
        """A byte per block and 4 per matrix."""
        return group_count(shape, self.columns) + 4 * sympy.prod(shape[:-2])
