"""8-bit floats with a scale: more range and fewer steps than 8-bit integers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import sympy
import torch
from torch import Tensor

from sparc.encoding.groups import Group, ScaleDtype, alone, check_group, check_scale_dtype, group_count, stored_scale
from sparc.encoding.scaled import ScaledEncoding

E4M3_MAX = 448.0


def e4m3_codes(numbers: Tensor) -> Tensor:
    """The uint8 bit patterns of the nearest E4M3 floats, half to even; what is greater than 448 saturates.

    Micikevicius et al. 2022, "FP8 Formats for Deep Learning", section 3: no infinities, one NaN, greatest number 448.

    Args:
        numbers: floating, not NaN.
    """
    # clamped first: what the cast makes of too great a number, 448 or NaN, depends on torch's version and the device
    return numbers.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def e4m3_numbers(codes: Tensor) -> Tensor:
    """The float32 numbers of E4M3 bit patterns, uint8."""
    return codes.view(torch.float8_e4m3fn).float()


@dataclass(frozen=True)
class Float8(ScaledEncoding):
    """E4M3 floats times a scale: `scale = max |w| / 448`. Codes are bit patterns, uint8.

    Args:
        group: how many consecutive columns share a scale; `"channel"` for a whole row (for an activation: a token),
            `"tensor"` for everything. The last group of a row may be shorter.
        scale_dtype: the dtype of scales. Values are always computed in float32.
    """

    group: Group = "channel"
    scale_dtype: ScaleDtype = "float32"

    def __post_init__(self) -> None:
        check_group(self, self.group)
        check_scale_dtype(self, self.scale_dtype)

    @property
    def columns(self) -> Group:
        """`group`."""
        return self.group

    @property
    def grid_names(self) -> tuple[str, ...]:
        """Scale."""
        return ("scale",)

    def ungrouped(self) -> Self:
        """One scale a row."""
        return replace(self, group=alone(self.group))

    def nearest(self, numbers: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """E4M3 bit patterns."""
        return e4m3_codes(numbers)

    def numbers(self, codes: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """E4M3 floats."""
        return e4m3_numbers(codes)

    def scales(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The scales, widened."""
        return tensors["scale"].float()

    def covering(self, magnitude: Tensor) -> dict[str, Tensor]:
        """The greatest magnitude becomes 448; scales of empty ranges are 1."""
        return {"scale": stored_scale(magnitude / E4M3_MAX, self.scale_dtype, E4M3_MAX)}

    def pack(self, codes: Tensor) -> Tensor:
        """Unchanged."""
        return codes

    def unpack(self, packed: Tensor, length: int) -> Tensor:
        """Unchanged."""
        return packed

    def code_bytes(self, length: int | sympy.Expr) -> sympy.Expr:
        """One each."""
        return sympy.sympify(length)

    def grid_bytes(self, shape: Sequence[int | sympy.Expr]) -> sympy.Expr:
        """Scales of every group."""
        return group_count(shape, self.group) * getattr(torch, self.scale_dtype).itemsize
