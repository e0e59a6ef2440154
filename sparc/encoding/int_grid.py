"""Integer grids: `code * scale`, `(code - zero) * scale` or `code * scale + minimum`, per tensor, channel or group."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import sympy
import torch
from torch import Tensor

from sparc.encoding.base import ElementEncoding, saturate
from sparc.encoding.bits import pack_bits, unpack_bits
from sparc.encoding.clip_search import clip_search
from sparc.encoding.grid import Grid
from sparc.encoding.groups import (
    Group,
    ScaleDtype,
    alone,
    bad_option,
    check_group,
    check_scale_dtype,
    column,
    group_at,
    group_count,
    grouped,
    stored_scale,
    ungrouped,
    why_no_matrix,
)


@dataclass(frozen=True)
class IntGrid(ElementEncoding):
    """Evenly spaced values.

    Args:
        bits: 2, 3, 4 or 8.
        group: how many consecutive columns share a scale; `"channel"` for a whole row (for an activation: a token),
            `"tensor"` for everything. The last group of a row may be shorter.
        symmetric: codes are signed and zero is code 0. Otherwise codes are unsigned.
        zero: for asymmetric grids, `"integer"` (a zero point of the codes' dtype; zero is representable) or `"minimum"`
            (the range's floating minimum; zero need not be representable).
        scale_dtype: the dtype of scales and floating minima. Values are always computed in float32.
    """

    shown = ("bits",)

    bits: int = 8
    group: Group = "channel"
    symmetric: bool = True
    zero: Literal["integer", "minimum"] = "integer"
    scale_dtype: ScaleDtype = "float32"

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in (2, 3, 4, 8):
            raise bad_option(f"IntGrid has no {self.bits!r}-bit codes", "bits is 2, 3, 4 or 8")
        check_group(self, self.group)
        if not isinstance(self.symmetric, bool):
            raise bad_option(f"IntGrid cannot be symmetric={self.symmetric!r}", "True or False")
        if self.zero not in ("integer", "minimum"):
            raise bad_option(f"IntGrid has no zero={self.zero!r}", '"integer" or "minimum"')
        check_scale_dtype(self, self.scale_dtype)
        if self.symmetric and self.zero == "minimum":
            raise bad_option("a symmetric IntGrid has no minimum", "add symmetric=False")

    # shapes ---------------------------------------------------------------------------------------------------------
    @property
    def low(self) -> int:
        """The least code."""
        return -(2 ** (self.bits - 1)) if self.symmetric else 0

    @property
    def high(self) -> int:
        """The greatest code."""
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    @property
    def code_dtype(self) -> torch.dtype:
        """int8 for symmetric grids, uint8 otherwise."""
        return torch.int8 if self.symmetric else torch.uint8

    @property
    def grid_names(self) -> tuple[str, ...]:
        """Scale, and zero point or minimum when asymmetric."""
        if self.symmetric:
            return ("scale",)
        return ("scale", "zero") if self.zero == "integer" else ("scale", "minimum")

    def accepts(self, shape: Sequence[int]) -> str | None:
        """Any matrix with at least one element."""
        return why_no_matrix(shape)

    # fitting --------------------------------------------------------------------------------------------------------
    def fit(self, weight: Tensor, *, importance: Tensor | None = None, search: bool = False) -> Grid:
        """Cover each group's range (min-max), or look for less squared error (`sparc.encoding.clip_search`).

        Min-max finds a grid again, to float rounding, from weights that lie on it and use its outermost codes: both, or
        if it is symmetric, `2^(bits-1) - 1` with either sign and not `-2^(bits-1)`. Weights rounded to a min-max grid
        do, but for one case: an integer zero point whose exact value ends in .5. The search also finds 2- to 4-bit
        grids of which only inner codes are used.
        """
        groups = grouped(weight.float(), self.group)
        if importance is None or bool((importance != 0).all()):
            low, high = groups.amin(-1), groups.amax(-1)
        else:
            ignored = grouped((importance == 0).expand(weight.shape), self.group)
            low = groups.masked_fill(ignored, torch.inf).amin(-1)
            high = groups.masked_fill(ignored, -torch.inf).amax(-1)
            low, high = low.masked_fill(low > high, 0), high.masked_fill(low > high, 0)
        grid = self.from_range(low, high)
        return clip_search(self, weight, grid, (low, high), importance) if search else grid

    def from_range(self, low: Tensor, high: Tensor) -> Grid:
        """The grid that covers `[low, high]`, tensors of shape `[..., out, groups]`; scales of empty ranges are 1.

        Symmetric: `scale = max(|low|, |high|) / (2^(bits-1) - 1)`. Otherwise `scale = (high - low) / (2^bits - 1)`;
        with an integer zero point the range is first widened to include 0, and `zero = round(-low / scale)`; else
        `minimum = low`.
        """
        if self.symmetric:
            return Grid(self, {"scale": self.stored_scale(torch.maximum(low.abs(), high.abs()) / self.high)})
        if self.zero == "minimum":
            minimum = self.stored_minimum(low)
            return Grid(self, {"scale": self.stored_scale((high - minimum.float()) / self.high), "minimum": minimum})
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = self.stored_scale((high - low) / self.high)
        return Grid(self, {"scale": scale, "zero": self.stored_zero(-low / scale.float())})

    def stored_scale(self, scale: Tensor) -> Tensor:
        """Scales as stored (`sparc.encoding.groups`)."""
        return stored_scale(scale, self.scale_dtype, max(-self.low, self.high + 1))

    def stored_minimum(self, minimum: Tensor) -> Tensor:
        """Minima as stored."""
        return saturate(minimum, getattr(torch, self.scale_dtype))

    def stored_zero(self, zero: Tensor) -> Tensor:
        """Zero points as stored: rounded, and cut to the codes."""
        return torch.round(zero).clamp(self.low, self.high).to(self.code_dtype)

    def at_column(self, grid: Grid, column: int) -> Grid:
        """The column's scales and zero points or minima."""
        tensors = {name: group_at(tensor, self.group, column) for name, tensor in grid.tensors.items()}
        return Grid(replace(self, group=alone(self.group)), tensors)

    # codes ----------------------------------------------------------------------------------------------------------
    def codes(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """`round(w / scale) + zero` or `round((w - minimum) / scale)`, half to even, clamped; computed in float32."""
        numbers = grouped(weight.float(), self.group)
        if "minimum" in tensors:
            numbers = numbers - column(tensors["minimum"])
        numbers = (numbers / column(tensors["scale"])).round_()
        if "zero" in tensors:
            numbers.add_(column(tensors["zero"]))
        return ungrouped(numbers.clamp_(self.low, self.high).to(self.code_dtype), weight.shape, self.group)

    def values(self, codes: Tensor, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """`(code - zero) * scale` or `code * scale + minimum`, in float32, then cast; the cast saturates."""
        numbers = grouped(codes.float(), self.group)
        if "zero" in tensors:
            numbers.sub_(column(tensors["zero"]))
        numbers.mul_(column(tensors["scale"]))
        if "minimum" in tensors:
            numbers.add_(column(tensors["minimum"]))
        return saturate(ungrouped(numbers, codes.shape, self.group), dtype)

    def round(self, weight: Tensor, grid: Grid) -> Tensor:
        """The values of the nearest codes; once is enough where zero is a code and floats are far denser than codes."""
        if "minimum" in grid.tensors or weight.dtype.itemsize < 4:
            return super().round(weight, grid)
        return self.values(self.codes(weight, grid.tensors), grid.tensors, weight.dtype)

    # storage --------------------------------------------------------------------------------------------------------
    def pack(self, codes: Tensor) -> Tensor:
        """8-bit codes as they are; narrower ones as `pack_bits` says, signed codes offset to unsigned."""
        return codes if self.bits == 8 else pack_bits((codes.to(torch.int16) - self.low).to(torch.uint8), self.bits)

    def unpack(self, packed: Tensor, length: int) -> Tensor:
        """The inverse of `pack`."""
        if self.bits == 8:
            return packed
        return (unpack_bits(packed, self.bits, length).to(torch.int16) + self.low).to(self.code_dtype)

    def code_bytes(self, length: int | sympy.Expr) -> sympy.Expr:
        """`ceil(length * bits / 8)`."""
        return sympy.ceiling(sympy.sympify(length) * self.bits / 8)

    def grid_bytes(self, shape: Sequence[int | sympy.Expr]) -> sympy.Expr:
        """Scales and zero points or minima of every group."""
        scale_bytes = 4 if self.scale_dtype == "float32" else 2
        each = scale_bytes + (0 if self.symmetric else 1 if self.zero == "integer" else scale_bytes)
        return group_count(shape, self.group) * each
