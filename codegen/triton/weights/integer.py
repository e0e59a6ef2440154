"""`IntGrid`: codes in words, scales and zero points in groups."""

from collections.abc import Mapping, Sequence
from typing import cast

import sympy
import torch
from torch import Tensor

from sparc.codegen.triton import words
from sparc.codegen.triton.index import Indices
from sparc.codegen.triton.tiles import DecodeCost, Plane, Product, Tile, TileCode
from sparc.codegen.triton.weights.coded import CodedWeight
from sparc.encoding.base import Encoding, Parts
from sparc.encoding.groups import Group
from sparc.encoding.int_grid import IntGrid


class IntegerWeight(CodedWeight):
    """`(code - zero) * scale` or `code * scale + minimum`, from words of unsigned codes (`sparc.codegen.triton.words`).

    The parameters are `scale`, and `zero` or `minimum`.
    """

    def __init__(self, encoding: Encoding, shape: Sequence[int], parts: Parts) -> None:
        """Args: see the class."""
        super().__init__(encoding, shape, parts)
        self.grid = cast(IntGrid, encoding)

    @property
    def bits(self) -> int:
        """The grid's."""
        return self.grid.bits

    @property
    def size(self) -> Group:
        """The grid's."""
        return self.grid.group

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Scale, and zero point or minimum; zero points as numbers in half precision, which need no conversion."""
        named = {name: self.parts[name] for name in self.grid.grid_names}
        return named | ({"zero": named["zero"].to(torch.float16)} if "zero" in named else {})

    def accepts(self, product: Product) -> str | None:
        """Every floating product; 8-bit ones where the codes fit after the zero point is taken off."""
        if product == "float8e4nv":
            return "integers are not multiplied as 8-bit floats"
        if product == "int8" and self.grid.zero == "minimum" and not self.grid.symmetric:
            return "a floating minimum is not multiplied in integers"
        if product == "int8" and self.grid.bits == 8 and not self.grid.symmetric:
            return "8-bit codes less their zero point do not fit into 8 bits"
        least = words.LEAST_WIDTH_OF_BYTES
        if product == "int8" and not self.groups.constant and (self.groups.power or 0) < least:
            return f"groups of {self.grid.group} do not fill a product of {least} columns"
        if product == "int8" and not self.narrow and self.unit * self.digits[0] // 16 < least:
            return f"{self.columns} columns of {self.grid.bits} bits do not fill products of {least} columns"
        return None

    def unpacked(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The codes, from 0."""
        return self.grid.unpack(parts["codes"], self.stored_columns).to(torch.int16) - self.grid.low

    @property
    def integer_sums(self) -> bool:
        """Where a row has one scale."""
        return self.groups.constant

    def row_sums(self) -> Tensor:
        """Of codes less their zero points, where a row has one scale."""
        if not self.integer_sums:
            return super().row_sums()
        numbers = self.grid.unpack(self.parts["codes"], self.columns).to(torch.int32)
        zero = 0 if self.grid.symmetric else self.parts["zero"].to(torch.int32)
        return (numbers - zero).sum(1, dtype=torch.int32)

    # code -----------------------------------------------------------------------------------------------------------
    def decode(self, tile: Tile) -> TileCode:
        """Two codes at a time, with the scale of the group where one serves the plane."""
        setup = tuple(self.load(tile))
        planes = tuple(self._plane(tile, plane) for plane in range(self.planes))
        if self.groups.constant and self._after(tile):
            return TileCode(planes, setup=setup, scale=f"tl.load(scale{tile.suffix} + {tile.rows}).to(tl.float32)")
        return TileCode(planes, setup=setup)

    def _after(self, tile: Tile) -> bool:
        """Whether the scale may multiply the product: nothing is added to it."""
        return self.grid.symmetric or self.grid.zero == "integer"

    def _plane(self, tile: Tile, plane: int) -> Plane:
        base, end = self.digits[0], tile.suffix
        width = tile.block_columns * base // 16
        name, position = f"plane_{plane}{end}", f"tl.arange(0, {width})"
        columns, expression, indices = words.plane_columns(tile, self.unit, base, plane, "position")
        lines: list[str] = []
        offset = str(-self.grid.low)
        if not self.grid.symmetric and self.grid.zero == "integer":
            loaded, varies = self.groups.load(tile, "zero", expression, indices)
            lines.append(f"{name}_zero = {loaded}{'' if varies else '[:, None]'}")
            offset = f"{name}_zero"
        elif not self.grid.symmetric:
            offset = "0"
        lines += words.to_numbers(self.pairs(tile, plane), offset, tile, self.grid.bits, name, width)
        scale, more = self._scaled(tile, name, expression, indices)
        text = columns.replace("position", position)
        return Plane(tuple(line.replace("position", position) for line in [*lines, *more]), name, text, width, scale)

    def _scaled(self, tile: Tile, name: str, columns: sympy.Expr, indices: Indices) -> tuple[str, list[str]]:
        """The scale that multiplies the product, or the lines that multiply the tile."""
        if self.groups.constant and self._after(tile):
            return "", []
        scale, varies = self.groups.load(tile, "scale", columns, indices)
        if not varies and self._after(tile) and tile.scaled == "product":
            return f"{name}_scale", [f"{name}_scale = {scale}"]
        spread = "" if varies else "[:, None]"
        lines = [f"{name}_scale = {scale}{spread}"]
        if "minimum" in self.parameters:
            minimum, _ = self.groups.load(tile, "minimum", columns, indices)
            wide = f"{name}.to(tl.float32) * {name}_scale + {minimum}{spread}"
        elif tile.product == "float16" and self.half_scales:
            return "", [*lines, f"{name} = {name} * {name}_scale.to(tl.float16)"]
        else:
            wide = f"{name}.to(tl.float32) * {name}_scale"
        return "", [*lines, f"{name} = ({wide}).to(tl.{tile.product})"]

    def cost(self, product: Product) -> DecodeCost:
        """A shift, a mask and a subtraction for two codes, more where the numbers must be widened; and the loads of
        what
        groups share, once for each plane and row.
        """
        cheap = product == "float16" or (product == "bfloat16" and self.grid.bits <= 4)
        width = self.unit * self.digits[0] / 16
        shared = 0.0 if self.groups.constant else len(self.parameters) / width
        more = 1.5 if self.bits == 3 else 0.0  # two loads and their sum
        issue, arithmetic = (2.4, 1.3) if cheap else (6.0, 4.0)
        return DecodeCost(self.bits_read, issue + more + 40 * shared, arithmetic + more + 25 * shared)
