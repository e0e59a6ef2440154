"""Binary-coded matrices: sums of ±1 matrices, each with a scale per group."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import sympy
import torch
from torch import Tensor

from sparc.encoding.base import ElementEncoding, saturate
from sparc.encoding.binary_search import binary_search, levels, nearest_level
from sparc.encoding.bits import pack_bits, unpack_bits
from sparc.encoding.grid import Grid
from sparc.encoding.groups import (
    Group,
    alone,
    bad_option,
    check_group,
    group_at,
    group_count,
    grouped,
    ungrouped,
    why_no_matrix,
)
from sparc.encoding.int_grid import IntGrid


@dataclass(frozen=True)
class BinaryCode(ElementEncoding):
    """`offset + sum_i ±alpha_i`: bit i of a code says whether alpha_i is added (1) or subtracted (0).

    The format of nuQmm and LUT-GEMM (Park et al. 2022, section 3). Parts: `codes`, a plane of bits for each alpha,
    `[..., bits, out, ceil(reduce / 8)]`, packed as `sparc.encoding.bits` says; `alphas`, `[..., out, groups, bits]`;
    `offset`, `[..., out, groups]`.

    Args:
        bits: how many ±1 matrices, 1 to 4.
        group: how many consecutive columns share alphas and an offset; `"channel"` for a whole row, `"tensor"` for
            everything. The last group of a row may be shorter.
        scale_dtype: the dtype of alphas and offsets. Values are always computed in float32.
    """

    shown = ("bits",)

    bits: int = 3
    group: Group = 128
    scale_dtype: Literal["float32", "float16"] = "float32"

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 1 <= self.bits <= 4:
            raise bad_option(f"BinaryCode has no {self.bits!r}-bit codes", "bits is 1, 2, 3 or 4")
        check_group(self, self.group)
        if self.scale_dtype not in ("float32", "float16"):
            raise bad_option(f"BinaryCode has no scale_dtype={self.scale_dtype!r}", '"float32" or "float16"')

    @property
    def grid_names(self) -> tuple[str, ...]:
        """Alphas and offset."""
        return ("alphas", "offset")

    def accepts(self, shape: Sequence[int]) -> str | None:
        """Any matrix with at least one element."""
        return why_no_matrix(shape)

    # fitting --------------------------------------------------------------------------------------------------------
    def fit(self, weight: Tensor, *, importance: Tensor | None = None, search: bool = False) -> Grid:
        """Alphas, descending and not negative, and offset by `sparc.encoding.binary_search`.

        It starts from greedy residuals; with `search` also from evenly spaced values, and each group keeps the better.
        """
        h = torch.ones(()) if importance is None else importance.float()
        numbers = grouped(weight.float().nan_to_num(), self.group)
        alphas, offset = binary_search(
            numbers, grouped(h.expand(weight.shape), self.group, fill="zero"), self.bits, evenly=search
        )
        return Grid(self, {"alphas": self._stored(alphas), "offset": self._stored(offset)})

    @classmethod
    def from_int_grid(cls, grid: Grid) -> Grid:
        """The binary-coded grid of the same values as a uniform one of at most 4 bits.

        With codes q of b bits, `scale * (q - zero)` is `offset + sum ±alpha_i`, where `alpha_i = scale * 2^i / 2` and
        `offset = sum alpha_i - scale * zero` (Park et al. 2022, section 3.2). Exact but for float32 rounding, of which
        there is none if the grid has no minimum and scales of half precision.

        Args:
            grid: of an `IntGrid`; the result has its view.

        Raises:
            PassError: SPARC209 when the grid is no integer grid, or has 8 bits.
        """
        spec, tensors = grid.spec, grid.tensors
        if not isinstance(spec, IntGrid) or spec.bits > 4:
            raise bad_option(f"a grid of {spec} has no binary code", "use an IntGrid of 2, 3 or 4 bits")
        scale = tensors["scale"].double()
        alphas = torch.stack([scale * (2**bit / 2) for bit in reversed(range(spec.bits))], dim=-1)
        zero = tensors["zero"].double() if "zero" in tensors else -spec.low
        offset = alphas.sum(-1) - scale * zero + (tensors["minimum"].double() if "minimum" in tensors else 0)
        made = cls(spec.bits, spec.group)
        return replace(grid, spec=made, tensors={"alphas": alphas.float(), "offset": offset.float()})

    def at_column(self, grid: Grid, column: int) -> Grid:
        """The column's alphas and offset."""
        alphas = group_at(grid.tensors["alphas"], self.group, column, axis=-2)
        offset = group_at(grid.tensors["offset"], self.group, column)
        return Grid(replace(self, group=alone(self.group)), {"alphas": alphas, "offset": offset})

    def _stored(self, numbers: Tensor) -> Tensor:
        """In the stored dtype, cut where a sum of them could overflow."""
        greatest = torch.finfo(torch.bfloat16).max / (self.bits + 1)
        return saturate(numbers.clamp(-greatest, greatest), getattr(torch, self.scale_dtype))

    # codes ----------------------------------------------------------------------------------------------------------
    def codes(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The code of the nearest sum; of equals, the least sum and then the least code. NaN is taken for 0."""
        numbers = grouped(weight.float().nan_to_num(), self.group)
        return ungrouped(nearest_level(levels(tensors["alphas"], tensors["offset"]), numbers), weight.shape, self.group)

    def values(self, codes: Tensor, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The sums in float32, then cast; the cast saturates."""
        sums = levels(tensors["alphas"], tensors["offset"])
        found = sums.gather(-1, grouped(codes, self.group).to(torch.int64))
        return saturate(ungrouped(found, codes.shape, self.group), dtype)

    # storage --------------------------------------------------------------------------------------------------------
    def pack(self, codes: Tensor) -> Tensor:
        """Codes `[..., out, n]` as planes `[..., bits, out, ceil(n / 8)]`."""
        return pack_bits((codes.unsqueeze(-3) >> self._shifts(codes)) & 1, 1)

    def unpack(self, packed: Tensor, length: int) -> Tensor:
        """The inverse of `pack`."""
        return (unpack_bits(packed, 1, length) << self._shifts(packed)).sum(-3, dtype=torch.uint8)

    def _shifts(self, like: Tensor) -> Tensor:
        return torch.arange(self.bits, dtype=torch.uint8, device=like.device).reshape(-1, 1, 1)

    def code_bytes(self, length: int | sympy.Expr) -> sympy.Expr:
        """`bits * ceil(length / 8)`."""
        return self.bits * sympy.ceiling(sympy.sympify(length) / 8)

    def grid_bytes(self, shape: Sequence[int | sympy.Expr]) -> sympy.Expr:
        """Alphas and the offset of every group."""
        return group_count(shape, self.group) * (self.bits + 1) * getattr(torch, self.scale_dtype).itemsize
