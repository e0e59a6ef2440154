"""An encoding: every value is zero, or a sign and a power of two, times the scale of its row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor

from sparc import codes as diagnostic_codes
from sparc.diag import PassError
from sparc.encoding.base import ElementEncoding
from sparc.encoding.grid import Grid

_LEAST_SCALE = 2.0**-100


@dataclass(frozen=True)
class PowersOfTwo(ElementEncoding):
    """Values `±scale * 2^-e` for `e` below `levels`, and 0; four bits each, two to a byte, lowest first.

    Code 0 is zero, codes `1 + e` are positive and `8 + e` negative (Miyashita et al., 2016, arXiv:1603.01025).

    Args:
        levels: how many powers of two there are, 1 to 7.
    """

    levels: int = 7

    def __post_init__(self) -> None:
        if not 1 <= self.levels <= 7:
            raise PassError(
                diagnostic_codes.BAD_OPTION, f"PowersOfTwo has no {self.levels} levels", hint="levels is 1 to 7"
            )

    @property
    def grid_names(self) -> tuple[str, ...]:
        """One scale a row, `[..., out, 1]` in float32."""
        return ("scale",)

    def accepts(self, shape: Sequence[int]) -> str | None:
        """Any matrix that is not empty."""
        return None if len(shape) >= 2 and 0 not in shape else "it is no matrix, or empty"

    def fit(self, weight: Tensor, *, importance: Tensor | None = None, search: bool = False) -> Grid:
        """The largest magnitude of each row, raised to a power of two."""
        largest = weight.float().abs().amax(-1, keepdim=True).clamp(min=_LEAST_SCALE)
        mantissa, exponent = torch.frexp(largest)
        return Grid(self, {"scale": _power(exponent - (mantissa == 0.5).int())})

    def codes(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The nearest power in the logarithm; what is below half the least power is zero."""
        relative = weight.float().abs() / tensors["scale"]
        exponent = torch.round(-torch.log2(relative.clamp(min=_LEAST_SCALE))).clamp(0, self.levels - 1)
        code = torch.where(weight < 0, 8 + exponent, 1 + exponent)
        return torch.where(relative < 2.0**-self.levels, torch.zeros_like(code), code).to(torch.uint8)

    def values(self, codes: Tensor, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The inverse of `codes`, computed in float32."""
        negative = codes >= 8
        exponent = torch.where(negative, codes.int() - 8, codes.int() - 1)
        magnitude = _power(-exponent) * tensors["scale"]
        signed = torch.where(negative, -magnitude, magnitude)
        return torch.where(codes == 0, torch.zeros_like(signed), signed).to(dtype)

    def pack(self, codes: Tensor) -> Tensor:
        """Two codes to a byte."""
        if codes.shape[-1] % 2:
            codes = torch.nn.functional.pad(codes, (0, 1))
        return codes[..., 0::2] | (codes[..., 1::2] << 4)

    def unpack(self, packed: Tensor, length: int) -> Tensor:
        """One code to a byte."""
        pairs = torch.stack([packed & 15, packed >> 4], dim=-1)
        return pairs.reshape(*packed.shape[:-1], -1)[..., :length]

    def code_bytes(self, length: int | sympy.Expr) -> sympy.Expr:
        """Half a byte a code."""
        return sympy.ceiling(sympy.sympify(length) / 2)

    def grid_bytes(self, shape: Sequence[int | sympy.Expr]) -> sympy.Expr:
        """Four bytes a row."""
        return 4 * sympy.prod(shape[:-1])


def _power(exponent: Tensor) -> Tensor:
    """`2^exponent` in float32, exactly."""
    return torch.ldexp(torch.ones(exponent.shape), exponent)
