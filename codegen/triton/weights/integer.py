"""`IntGrid`: codes in words, scales and zero points in groups."""

from collections.abc import Mapping, Sequence
from typing import cast

import sympy
import torch
from torch import Tensor
from torch.nn.functional import pad

from sparc.codegen.triton import words
from sparc.codegen.triton.groups import Groups, bits_of
from sparc.codegen.triton.index import Indices
from sparc.codegen.triton.tiles import Buffer, DecodeCost, Plane, Product, Tile, TileCode, WeightLowering
from sparc.encoding.base import Encoding, Parts
from sparc.encoding.int_grid import IntGrid


class IntegerWeight(WeightLowering):
    """`(code - zero) * scale` or `code * scale + minimum`, from words of unsigned codes (`sparc.codegen.triton.words`).

    Buffers: `codes` int32 `[rows, padded columns * bits / 32]`; `scale`, and `zero` or `minimum`, `[groups, rows]`.
    """

    forbidden = ("I2F",)
    maskable = True

    def __init__(self, encoding: Encoding, shape: Sequence[int], parts: Parts) -> None:
        """Args: see the class."""
        super().__init__(encoding, shape, parts)
        self.grid = cast(IntGrid, encoding)
        self.parameters = {name: parts[name] for name in self.grid.grid_names}

    @property
    def digits(self) -> tuple[int, ...]:
        """The powers of two that a code's bits are stored as."""
        return (2, 1) if self.grid.bits == 3 else (self.grid.bits,)

    @property
    def unit(self) -> int:
        """Columns of a unit of words."""
        power = Groups(self.grid.group, self.rows, self.columns).power
        return words.unit_of(self.stored_columns, self.digits[0], words.LEAST_WIDTH if self.narrow else power)

    @property
    def planes(self) -> int:
        """Codes in half a word."""
        return 16 // self.digits[0]

    @property
    def greatest(self) -> int:
        """As many columns as let one scale serve a plane."""
        power = self.groups.power
        return super().greatest if self.groups.constant or power is None else max(self.unit, power)

    @property
    def groups(self) -> Groups:
        """How scales are shared."""
        return Groups(self.grid.group, self.rows, self.padded_columns)

    def accepts(self, product: Product) -> str | None:
        """Every floating product; 8-bit ones where the codes fit after the zero point is taken off."""
        if product == "float8e4nv":
            return "integers are not multiplied as 8-bit floats"
        if product == "int8" and self.grid.zero == "minimum" and not self.grid.symmetric:
            return "a floating minimum is not multiplied in integers"
        if product == "int8" and self.grid.bits == 8 and not self.grid.symmetric:
            return "8-bit codes less their zero point do not fit into 8 bits"
        if product == "int8" and not self.groups.constant and (self.groups.power or 0) < words.LEAST_WIDTH:
            return f"groups of {self.grid.group} do not fill a product of {words.LEAST_WIDTH} columns"
        return None

    # layout ---------------------------------------------------------------------------------------------------------
    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """Words, then the parameters."""
        kinds = {2: "i32", 1: "i16"} if len(self.digits) == 2 else {self.digits[0]: "i32"}
        names = ("codes", "ones")
        found = [Buffer(name, kinds[digit]) for name, digit in zip(names, self.digits, strict=False)]
        return (*found, *(self.groups.buffer(name, tensor.dtype) for name, tensor in self.parameters.items()))

    def layout(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Unsigned codes in words; a padded column has code 0 and scale 0."""
        codes = self.grid.unpack(parts["codes"], self.stored_columns).to(torch.int16) - self.grid.low
        codes = pad(codes.to(torch.uint8), (0, self.stride - self.stored_columns))
        found = {"codes": words.pack(codes >> (self.grid.bits - self.digits[0]), self.digits[0], self.unit)}
        if len(self.digits) == 2:
            found["ones"] = words.pack_ones(codes & 1, self.unit)
        return found | {name: self.groups.layout(parts[name]) for name in self.parameters}

    # code -----------------------------------------------------------------------------------------------------------
    def decode(self, tile: Tile) -> TileCode:
        """Two codes at a time, with the scale of the group where one serves the plane."""
        base = self.digits[0]
        setup = words.load_words(tile, "codes", self.stride, base)
        if len(self.digits) == 2:
            setup += words.load_ones(tile, "ones", self.stride)
        planes = tuple(self._plane(tile, plane) for plane in range(16 // base))
        if self.groups.constant and self._after(tile):
            return TileCode(
                planes, setup=tuple(setup), scale=f"tl.load(scale{tile.suffix} + {tile.rows}).to(tl.float32)"
            )
        return TileCode(planes, setup=tuple(setup))

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
        lines += words.to_numbers(self._pairs(tile, plane), offset, tile, self.grid.bits, name, width)
        scale, more = self._scaled(tile, name, expression, indices)
        text = columns.replace("position", position)
        return Plane(tuple(line.replace("position", position) for line in [*lines, *more]), name, text, width, scale)

    def _pairs(self, tile: Tile, plane: int) -> str:
        base, end = self.digits[0], tile.suffix
        pairs = words.shifted(f"codes_words{end}", plane * base, 2**base - 1)
        return pairs if len(self.digits) == 1 else f"(({pairs} << 1) | {words.shifted(f'ones_words{end}', plane, 1)})"

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
        elif tile.product == "float16":
            return "", [*lines, f"{name} = {name} * {name}_scale.to(tl.float16)"]
        else:
            wide = f"{name}.to(tl.float32) * {name}_scale"
        return "", [*lines, f"{name} = ({wide}).to(tl.{tile.product})"]

    def cost(self, product: Product) -> DecodeCost:
        """A shift, a mask and a subtraction for two codes; more where the numbers must be widened."""
        cheap = product == "float16" or (product == "bfloat16" and self.grid.bits <= 4)
        stored = self.grid.bits * self.padded_columns / self.columns
        bits = stored + bits_of(self.groups, self.parameters, self.columns)
        return DecodeCost(bits, 3.0 if cheap else 6.0, 1.2 if cheap else 4.0)
