"""The identity encoding: a weight as it is. What masks are composed around when nothing is rounded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import sympy
import torch
from torch import Tensor

from sparc import codes as diagnostic_codes
from sparc.diag import PassError
from sparc.encoding.base import ElementEncoding, saturate
from sparc.encoding.grid import Grid


@dataclass(frozen=True)
class Dense(ElementEncoding):
    """Every element is its own code.

    Args:
        dtype: the stored dtype; what it cannot hold saturates.
    """

    dtype: Literal["float64", "float32", "float16", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in ("float64", "float32", "float16", "bfloat16"):
            raise PassError(
                diagnostic_codes.BAD_OPTION,
                f"Dense has no dtype {self.dtype!r}",
                hint='"float32", "float16" or "bfloat16"',
            )

    @property
    def grid_names(self) -> tuple[str, ...]:
        """None: a dense weight has no parameters."""
        return ()

    def accepts(self, shape: Sequence[int]) -> str | None:
        """Any matrix."""
        return None if len(shape) >= 2 else f"a tensor of rank {len(shape)} is no matrix"

    def fit(self, weight: Tensor, *, importance: Tensor | None = None, search: bool = False) -> Grid:
        """The grid of all numbers."""
        return Grid(self)

    def at_column(self, grid: Grid, column: int) -> Grid:
        """The grid of all numbers."""
        return grid

    def codes(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The elements, in the stored dtype."""
        return saturate(weight, getattr(torch, self.dtype))

    def values(self, codes: Tensor, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The elements; a tensor of its own."""
        return saturate(codes, dtype).clone() if codes.dtype == dtype else saturate(codes, dtype)

    def pack(self, codes: Tensor) -> Tensor:
        """Unchanged."""
        return codes

    def unpack(self, packed: Tensor, length: int) -> Tensor:
        """Unchanged."""
        return packed

    def code_bytes(self, length: int | sympy.Expr) -> sympy.Expr:
        """The dtype's size per element."""
        return sympy.sympify(length) * getattr(torch, self.dtype).itemsize

    def grid_bytes(self, shape: Sequence[int | sympy.Expr]) -> sympy.Expr:
        """Nothing."""
        return sympy.Integer(0)
