"""Integer grids: `code * scale`, `(code - zero) * scale` or `code * scale + minimum`, per tensor, per channel or per group."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import sympy
import torch
from torch import Tensor

from sparc import codes as diagnostic_codes
from sparc.diag import PassError
from sparc.encoding.base import ElementEncoding
from sparc.encoding.grid import Grid

_SEARCH_STEPS = 80
_SEARCH_SHRINK = 0.01


@dataclass(frozen=True)
class IntGrid(ElementEncoding):
    """Evenly spaced values.

    Args:
        bits: 2, 4 or 8.
        group: how many consecutive columns share a scale; `"channel"` for a whole row (for an activation: a token), `"tensor"` for
            everything. The last group of a row may be shorter.
        symmetric: codes are signed and zero is code 0. Otherwise codes are unsigned.
        zero: for asymmetric grids, `"integer"` (a zero point of the codes' dtype; zero is representable) or `"minimum"` (the
            range's floating minimum; zero need not be representable).
        scale_dtype: the dtype of scales and floating minima. Values are always computed in float32.
    """

    bits: int = 8
    group: int | Literal["channel", "tensor"] = "channel"
    symmetric: bool = True
    zero: Literal["integer", "minimum"] = "integer"
    scale_dtype: Literal["float32", "float16", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise PassError(diagnostic_codes.BAD_OPTION, f"IntGrid has no {self.bits}-bit codes", hint="bits is 2, 4 or 8")
        named = self.group in ("channel", "tensor")
        if not named and (not isinstance(self.group, int) or isinstance(self.group, bool) or self.group < 2):
            raise PassError(diagnostic_codes.BAD_OPTION, f"IntGrid cannot group by {self.group!r}", hint='a number ≥ 2, "channel" or "tensor"')
        if self.zero not in ("integer", "minimum") or self.scale_dtype not in ("float32", "float16", "bfloat16"):
            raise PassError(diagnostic_codes.BAD_OPTION, f"IntGrid has no zero={self.zero!r}, scale_dtype={self.scale_dtype!r}")

    # shapes -----------------------------------------------------------------------------------------------------------
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
        if len(shape) < 2:
            return f"a tensor of rank {len(shape)} is no matrix"
        return "it is empty" if math.prod(shape) == 0 else None

    def _grouped(self, matrix: Tensor) -> Tensor:
        """`[..., out, reduce]` as `[..., out, groups, group]`; a short last group is filled with its own last value."""
        if self.group == "tensor":
            return matrix.reshape(*[1] * (matrix.ndim - 1), 1, -1)
        if self.group == "channel":
            return matrix.unsqueeze(-2)
        short = -matrix.shape[-1] % self.group
        if short:
            matrix = torch.cat([matrix, matrix[..., -1:].expand(*matrix.shape[:-1], short)], dim=-1)
        return matrix.reshape(*matrix.shape[:-1], -1, self.group)

    def _spread(self, per_group: Tensor, like: Tensor) -> Tensor:
        """A grid tensor `[..., out, groups]` broadcast to every column of `like`."""
        if isinstance(self.group, int):
            return per_group.repeat_interleave(self.group, dim=-1)[..., : like.shape[-1]]
        return per_group

    # fitting ----------------------------------------------------------------------------------------------------------
    def fit(self, weight: Tensor, *, importance: Tensor | None = None, search: bool = False) -> Grid:
        """Cover each group's range (min-max), or shrink it to minimise the squared error (a search over 80 clips of 1%).

        The search follows GPTQ's `mse` option with exponent 2 and optional column importance.
        """
        groups = self._grouped(weight.float())
        low, high = groups.amin(-1), groups.amax(-1)
        grid = self.from_range(low, high)
        if not search:
            return grid
        weights = None
        if importance is not None:
            weights = self._grouped(importance.float().expand(weight.shape).contiguous())
        best = dict(grid.tensors)
        best_error = self._error(weight, grid, weights)
        for step in range(1, _SEARCH_STEPS):
            shrink = 1 - step * _SEARCH_SHRINK
            candidate = self.from_range(low * shrink, high * shrink)
            error = self._error(weight, candidate, weights)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best = {name: torch.where(better, candidate.tensors[name], best[name]) for name in best}
        return Grid(self, best)

    def from_range(self, low: Tensor, high: Tensor) -> Grid:
        """The grid that covers `[low, high]`, tensors of shape `[..., out, groups]`; scales of empty ranges are 1.

        Symmetric: `scale = max(|low|, |high|) / (2^(bits-1) - 1)`. With an integer zero point the range is first widened to
        include 0: `scale = (high - low) / (2^bits - 1)`, `zero = round(-low / scale)`. With a minimum: `minimum = low`.
        """
        dtype = getattr(torch, self.scale_dtype)
        if self.symmetric:
            scale = torch.maximum(low.abs(), high.abs()) / self.high
            return Grid(self, {"scale": _positive(scale, dtype)})
        if self.zero == "integer":
            low, high = low.clamp(max=0), high.clamp(min=0)
        scale = _positive((high - low) / self.high, dtype)
        if self.zero == "minimum":
            return Grid(self, {"scale": scale, "minimum": low.to(dtype)})
        zero = torch.round(-low / scale.float()).clamp(self.low, self.high).to(self.code_dtype)
        return Grid(self, {"scale": scale, "zero": zero})

    def _error(self, weight: Tensor, grid: Grid, weights: Tensor | None) -> Tensor:
        difference = self._grouped((self.round(weight.float(), grid) - weight.float()).square())
        return (difference if weights is None else difference * weights).sum(-1)

    # codes ------------------------------------------------------------------------------------------------------------
    def codes(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """`round(w / scale) + zero`, clamped, half to even; computed in float32."""
        scaled = weight.float()
        if "minimum" in tensors:
            scaled = scaled - self._spread(tensors["minimum"].float(), weight)
        scaled = torch.round(scaled / self._spread(tensors["scale"].float(), weight))
        if "zero" in tensors:
            scaled = scaled + self._spread(tensors["zero"].float(), weight)
        return scaled.clamp(self.low, self.high).to(self.code_dtype)

    def values(self, codes: Tensor, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """`(code - zero) * scale` or `code * scale + minimum`, in float32, then cast."""
        numbers = codes.float()
        if "zero" in tensors:
            numbers = numbers - self._spread(tensors["zero"].float(), codes)
        numbers = numbers * self._spread(tensors["scale"].float(), codes)
        if "minimum" in tensors:
            numbers = numbers + self._spread(tensors["minimum"].float(), codes)
        return numbers.to(dtype)

    # storage ----------------------------------------------------------------------------------------------------------
    def pack(self, codes: Tensor) -> Tensor:
        """8-bit codes as they are; narrower ones several to a byte, first code lowest, signed codes offset to unsigned."""
        if self.bits == 8:
            return codes
        per_byte = 8 // self.bits
        unsigned = (codes.to(torch.int16) - self.low).to(torch.uint8)
        short = -codes.shape[-1] % per_byte
        if short:
            unsigned = torch.nn.functional.pad(unsigned, (0, short))
        lanes = unsigned.reshape(*unsigned.shape[:-1], -1, per_byte)
        packed = lanes[..., 0].clone()
        for lane in range(1, per_byte):
            packed |= lanes[..., lane] << (self.bits * lane)
        return packed

    def unpack(self, packed: Tensor, length: int) -> Tensor:
        """The inverse of `pack`."""
        if self.bits == 8:
            return packed
        lanes = [(packed >> (self.bits * lane)) & (2**self.bits - 1) for lane in range(8 // self.bits)]
        unsigned = torch.stack(lanes, dim=-1).reshape(*packed.shape[:-1], -1)[..., :length]
        return (unsigned.to(torch.int16) + self.low).to(self.code_dtype)

    def code_bytes(self, length: int | sympy.Expr) -> sympy.Expr:
        """`ceil(length * bits / 8)`."""
        return sympy.ceiling(sympy.sympify(length) * self.bits / 8)

    def grid_bytes(self, shape: Sequence[int | sympy.Expr]) -> sympy.Expr:
        """Scales and zero points or minima of every group."""
        scale_bytes = 4 if self.scale_dtype == "float32" else 2
        each = scale_bytes + (0 if self.symmetric else 1 if self.zero == "integer" else scale_bytes)
        if self.group == "tensor":
            return sympy.Integer(each)
        groups = 1 if self.group == "channel" else sympy.ceiling(sympy.sympify(shape[-1]) / self.group)
        return sympy.prod(shape[:-1]) * groups * each


def _positive(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in their stored dtype; where they vanish there, 1 (every value of such a group rounds to the same code)."""
    stored = scale.to(dtype)
    return torch.where((stored > 0) & torch.isfinite(stored), stored, torch.ones_like(stored))
