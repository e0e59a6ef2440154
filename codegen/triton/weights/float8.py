"""`Float8`: E4M3 floats, whose bits are moved into wider floats, or which are multiplied as they are."""

from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor

from sparc.codegen.triton import words
from sparc.codegen.triton.tiles import DecodeCost, Product, Tile
from sparc.codegen.triton.weights.coded import ScaledWeight
from sparc.encoding.base import Encoding, Parts
from sparc.encoding.float8 import Float8
from sparc.encoding.groups import Group

_MANTISSA = 3
_LEAST_WIDTH = 32  # columns that a product of 8-bit floats takes


class Float8Weight(ScaledWeight):
    """`number * scale`, from words of bytes."""

    forbidden: tuple[str, ...] = ("I2F", "F2F")

    def __init__(self, encoding: Encoding, shape: Sequence[int], parts: Parts) -> None:
        """Args: see the class."""
        super().__init__(encoding, shape, parts)
        self.scale = parts["scale"]

    @property
    def bits(self) -> int:
        """8."""
        return 8

    @property
    def size(self) -> Group:
        """The encoding's."""
        return cast(Float8, self.encoding).group

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Scale."""
        return {"scale": self.scale}

    def accepts(self, product: Product) -> str | None:
        """Every floating product; 8-bit ones where groups are as wide as one."""
        if product == "int8":
            return "floats are not multiplied in integers"
        if product == "float8e4nv" and not self.groups.constant and (self.groups.power or 0) < _LEAST_WIDTH:
            return f"groups of {self.size} do not fill a product of {_LEAST_WIDTH} columns"
        return None

    def factor(self, product: Product) -> float:
        """256 for float16; with wider exponents the tile is multiplied by it, lest sums of products lose bits."""
        return words.small_float_factor(8, _MANTISSA, product) if product == "float16" else 1.0

    def numbers(self, tile: Tile, plane: int, name: str, width: int) -> list[str]:
        """The bits, moved; with wider exponents multiplied by the power of two that is missing."""
        source = f"codes_words{tile.suffix}"
        if tile.product == "float8e4nv":
            return words.bytes_of(source, plane, tile, name, width)
        lines = words.small_floats(source, 8 * plane, 8, _MANTISSA, tile, name, width)
        if tile.product == "float16":
            return lines
        return [*lines, f"{name} = {name} * {words.small_float_factor(8, _MANTISSA, tile.product)!r}"]

    def cost(self, product: Product) -> DecodeCost:
        """Two shifts and two masks for two numbers; scales of groups multiply every number of many tokens."""
        grouped = not self.groups.constant
        issue, arithmetic = {
            "float16": (4.6, 2.5) if grouped else (3.0, 1.5),
            "bfloat16": (6.8, 2.7) if grouped else (3.5, 1.5),
            "float32": (12.0, 5.0),
        }.get(product, (5.3, 1.0) if grouped else (4.0, 1.0))
        return DecodeCost(self.bits_read, issue, arithmetic)
