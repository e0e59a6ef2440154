"""`BinaryCode`: bits that become signs, of alphas that are added up."""

from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor

from sparc.codegen.triton import words
from sparc.codegen.triton.tiles import DecodeCost, Plane, Product, Tile, TileCode
from sparc.codegen.triton.weights.coded import CodedWeight
from sparc.encoding.base import Encoding, Parts
from sparc.encoding.binary_code import BinaryCode
from sparc.encoding.groups import Group


class BinaryCodeWeight(CodedWeight):
    """`offset + sum_i ±alpha_i`, from words of codes, all bits of one column in one place.

    Buffers of parameters: `alpha_0`, ..., `offset`, each `[groups, rows]`.
    """

    def __init__(self, encoding: Encoding, shape: Sequence[int], parts: Parts) -> None:
        """Args: see the class."""
        super().__init__(encoding, shape, parts)
        alphas = parts["alphas"].unbind(-1)
        self.tensors = {f"alpha_{bit}": alpha for bit, alpha in enumerate(alphas)} | {"offset": parts["offset"]}

    @property
    def bits(self) -> int:
        """The encoding's."""
        return cast(BinaryCode, self.encoding).bits

    @property
    def size(self) -> Group:
        """The encoding's."""
        return cast(BinaryCode, self.encoding).group

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Alphas and offset."""
        return self.tensors

    def accepts(self, product: Product) -> str | None:
        """Every product in 16 bits or more."""
        return "sums of alphas are not multiplied in 8 bits" if product in ("int8", "float8e4nv") else None

    def unpacked(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Codes of planes of bits; those of a stack of matrices below one another."""
        planes = parts["codes"].reshape(-1, self.bits, *parts["codes"].shape[-2:])
        return cast(BinaryCode, self.encoding).unpack(planes, self.stored_columns).flatten(0, 1)

    # code -----------------------------------------------------------------------------------------------------------
    def decode(self, tile: Tile) -> TileCode:
        """Plane by plane; what serves whole rows is read before the loop."""
        planes = tuple(self._plane(tile, plane) for plane in range(self.planes))
        before = []
        if self.groups.constant:
            before = [
                f"{name}_value{tile.suffix} = tl.load({name}{tile.suffix} + {tile.rows}).to(tl.float32)[:, None]"
                for name in self.parameters
            ]
        return TileCode(planes, tuple(before), tuple(self.load(tile)))

    def _plane(self, tile: Tile, plane: int) -> Plane:
        """Bit by bit: a sign in front of 1, times alpha, in float16 or float32."""
        base, kind = self.digits[0], "float16" if tile.product == "float16" else "float32"
        width, name = tile.block_columns * base // 16, f"plane_{plane}{tile.suffix}"
        text, columns, indices = words.plane_columns(tile, self.unit, base, plane, "position")
        found: dict[str, str] = {}
        lines: list[str] = []
        for each in self.parameters:
            loaded, varies = f"{each}_value{tile.suffix}", True
            if not self.groups.constant:
                loaded, varies = self.groups.load(tile, each, columns, indices)
            found[each] = f"{name}_{each}"
            lines.append(f"{found[each]} = ({loaded}){'' if varies else '[:, None]'}.to(tl.{kind})")
        total = found["offset"]
        for bit in range(self.bits):
            source, shift = self._place(tile, plane, bit)
            lines += words.signs(source, shift, kind, tile, f"{name}_sign", width)
            lines.append(f"{name} = {total} + {name}_sign * {found[f'alpha_{bit}']}")
            total = name
        if kind != tile.product:
            lines.append(f"{name} = {name}.to(tl.{tile.product})")
        position = f"tl.arange(0, {width})"
        placed = tuple(line.replace("position", position) for line in lines)
        return Plane(placed, name, text.replace("position", position), width)

    def _place(self, tile: Tile, plane: int, bit: int) -> tuple[str, int]:
        """The words that hold a bit of a code, and where."""
        if self.bits != 3:
            return f"codes_words{tile.suffix}", plane * self.bits + bit
        if bit == 0:
            return f"ones_words{tile.suffix}", plane
        return f"codes_words{tile.suffix}", plane * self.digits[0] + bit - 1

    def cost(self, product: Product) -> DecodeCost:
        """For each bit a shift and a mask, and a product with a sum; two weights at once in half precision."""
        if product != "float16":
            return DecodeCost(self.bits_read, 5.0 + 3.2 * self.bits, 1.0 + 2.2 * self.bits)
        issue, arithmetic = {1: (5.0, 2.3), 2: (7.3, 4.0), 3: (10.0, 4.3), 4: (10.5, 4.8)}[self.bits]
        return DecodeCost(self.bits_read, issue, arithmetic)
