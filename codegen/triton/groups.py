"""Scales of groups: how they are laid out, and where their product with the codes is taken.

Scales are stored `[groups, rows]`: the rows of a tile are neighbours, and one load serves a whole plane where a
plane lies
within a group.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import sympy
import torch
from torch import Tensor

from sparc.codegen.triton import index
from sparc.codegen.triton.tiles import Buffer, Tile

TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int16: "i16",
}


@dataclass(frozen=True)
class Groups:
    """How columns share parameters.

    Args:
        size: columns of a group, or `"channel"` or `"tensor"`.
        rows: the matrix's.
        columns: those stored, with padding.
    """

    size: int | Literal["channel", "tensor"]
    rows: int
    columns: int

    @property
    def constant(self) -> bool:
        """Whether a row has one group."""
        return not isinstance(self.size, int) or self.size >= self.columns

    @property
    def power(self) -> int | None:
        """The group's size, if it is a power of two that planes must not cross."""
        return self.size if isinstance(self.size, int) and self.size & (self.size - 1) == 0 else None

    def layout(self, parameter: Tensor, filled: float = 0) -> Tensor:
        """A parameter `[rows, groups]` (or `[1, 1]`) as the kernel reads it: `[groups, rows]`, with those of
        padding.
        """
        spread = parameter.reshape(-1, parameter.shape[-1]).expand(self.rows, parameter.shape[-1])
        wanted = 1 if self.constant else -(-self.columns // int(self.size))
        missing = wanted - spread.shape[1]
        if missing > 0:
            spread = torch.nn.functional.pad(spread, (0, missing), value=filled)
        return spread.t().contiguous()

    def load(self, tile: Tile, buffer: str, columns: sympy.Expr, indices: index.Indices) -> tuple[str, bool]:
        """An expression for a parameter at a plane's columns, in float32, and whether it differs between them.

        Args:
            tile: the tile.
            buffer: the argument's name, without suffix.
            columns: the plane's columns.
            indices: what is known of their symbols.

        Returns:
            `[block_rows]` and False, or `[block_rows, width]` and True.
        """
        name = f"{buffer}{tile.suffix}"
        if self.constant:
            return f"tl.load({name} + {tile.rows}).to(tl.float32)", False
        group = indices.divide(columns, int(self.size))
        if all(symbol.name == tile.first for symbol in group.free_symbols):
            return f"tl.load({name} + ({index.text(group)}) * {self.rows} + {tile.rows}).to(tl.float32)", False
        spread = f"({index.text(group)})[None, :] * {self.rows} + {tile.rows}[:, None]"
        return f"tl.load({name} + {spread}).to(tl.float32)", True

    def buffer(self, name: str, dtype: torch.dtype) -> Buffer:
        """The argument of a parameter."""
        return Buffer(name, TYPES[dtype])


def bits_of(groups: Groups, tensors: Mapping[str, Tensor], columns: int) -> float:
    """Bits that parameters take for one weight."""
    if groups.constant:
        return sum(tensor.element_size() * 8 / columns for tensor in tensors.values())
    return sum(tensor.element_size() * 8 / int(groups.size) for tensor in tensors.values())
