"""What the lowerings of codes in words share: one code of 1, 2, 3, 4 or 8 bits for every element."""

from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import ClassVar, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparc.codegen.triton import words
from sparc.codegen.triton.groups import Groups, bits_of
from sparc.codegen.triton.tiles import Buffer, Plane, Product, Tile, TileCode, WeightLowering
from sparc.encoding.base import ElementEncoding
from sparc.encoding.groups import Group


class CodedWeight(WeightLowering):
    """Codes in words (`sparc.codegen.triton.words`), and parameters that groups of columns share.

    Buffers: `codes` int32 `[rows, padded columns * bits / 32]`, of 3 bits the upper two; `ones` int16 `[rows, padded
    columns / 16]`, their lowest ones; the parameters, `[groups, rows]`.

    Class attributes: `greatest_unit` and `greatest_width`, columns of a unit and of a plane, so that a step of 64
    tokens
    fits into registers and shared memory.
    """

    greatest_unit: ClassVar[int] = 256
    greatest_width: ClassVar[int] = 64
    forbidden: tuple[str, ...] = ("I2F",)
    maskable: ClassVar[bool] = True

    @property
    @abstractmethod
    def bits(self) -> int:
        """Of a code."""

    @property
    @abstractmethod
    def size(self) -> Group:
        """How many columns share parameters."""

    @property
    @abstractmethod
    def parameters(self) -> Mapping[str, Tensor]:
        """What groups share, `[rows, groups]` or `[1, 1]`, by the names of their buffers."""

    @property
    def digits(self) -> tuple[int, ...]:
        """The powers of two that a code's bits are stored as."""
        return (2, 1) if self.bits == 3 else (self.bits,)

    @property
    def unit(self) -> int:
        """Columns of a unit of words."""
        power = Groups(self.size, self.rows, self.columns).power
        widest = min(
            power or self.greatest_width, self.greatest_width, max(self.greatest_unit // self.planes, words.LEAST_WIDTH)
        )
        if self.narrow:
            return words.unit_of(self.stored_columns, self.digits[0], words.LEAST_WIDTH)
        # Codes of 8 bits may be multiplied as they are.
        least = min(words.LEAST_WIDTH_OF_BYTES, max(widest, words.LEAST_WIDTH)) if self.bits == 8 else words.LEAST_WIDTH
        return words.unit_of(self.stored_columns, self.digits[0], widest, least)

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
        """How parameters are shared."""
        return Groups(self.size, self.rows, self.padded_columns)

    @cached_property
    def half_scales(self) -> bool:
        """Whether every scale is a normal number in half precision, so that tiles may be scaled in it."""
        scale = self.parameters.get("scale", torch.zeros(1)).float().abs()
        limits = torch.finfo(torch.float16)
        return bool(((scale == 0) | ((scale >= limits.tiny) & (scale <= limits.max))).all())

    def key(self) -> str:
        """The encoding, and whether its scales fit half precision."""
        return f"{self.encoding}{'' if self.half_scales else ' with scales beyond half precision'}"

    @property
    def bits_read(self) -> float:
        """Bits of a weight, padding and parameters included."""
        parameters = bits_of(self.groups, self.parameters, self.columns)
        return self.bits * self.padded_columns / self.columns + parameters

    # layout ---------------------------------------------------------------------------------------------------------
    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """Words, then the parameters."""
        codes = [Buffer("codes", "i32")] + [Buffer("ones", "i16")] * (self.bits == 3)
        return (*codes, *(self.groups.buffer(name, tensor.dtype) for name, tensor in self.parameters.items()))

    def unpacked(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The codes, uint8 `[stored rows, stored columns]`."""
        return cast(ElementEncoding, self.encoding).unpack(parts["codes"], self.stored_columns)

    def layout(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Words of codes; a padded column has code 0 and parameters of 0."""
        codes = pad(self.unpacked(parts).to(torch.uint8), (0, self.stride - self.stored_columns))
        found = {"codes": words.pack(codes >> (self.bits - self.digits[0]), self.digits[0], self.unit)}
        if self.bits == 3:
            found["ones"] = words.pack_ones(codes & 1, self.unit)
        return found | {name: self.groups.layout(each) for name, each in self.parameters.items()}

    # code -----------------------------------------------------------------------------------------------------------
    def load(self, tile: Tile) -> list[str]:
        """Code that reads the tile's words."""
        lines = words.load_words(tile, "codes", self.stride, self.digits[0])
        return lines if self.bits != 3 else [*lines, *words.load_ones(tile, "ones", self.stride)]

    def pairs(self, tile: Tile, plane: int) -> str:
        """An expression for two neighbouring codes of a plane, in the halves of an int32."""
        base, end = self.digits[0], tile.suffix
        pairs = words.shifted(f"codes_words{end}", plane * base, 2**base - 1)
        return pairs if self.bits != 3 else f"(({pairs} << 1) | {words.shifted(f'ones_words{end}', plane, 1)})"


class ScaledWeight(CodedWeight):
    """`number(code) * scale`, where groups share a scale, or there is none."""

    @abstractmethod
    def numbers(self, tile: Tile, plane: int, name: str, width: int) -> list[str]:
        """Code that defines `name`, `[block_rows, width]` in the product's type: the plane's numbers over `factor`."""

    def factor(self, product: Product) -> float:
        """A power of two that scales are multiplied by, since numbers are divided by it."""
        return 1.0

    def decode(self, tile: Tile) -> TileCode:
        """Plane by plane, with the scale of the group where one serves the plane."""
        setup = tuple(self.load(tile))
        planes = tuple(self._plane(tile, plane) for plane in range(self.planes))
        if not self.groups.constant:
            return TileCode(planes, setup=setup)
        factor = self.factor(tile.product)
        if "scale" in self.parameters:
            scale = self._times(f"tl.load(scale{tile.suffix} + {tile.rows}).to(tl.float32)", factor)
        else:
            scale = "" if factor == 1 else f"tl.full(({tile.block_rows},), {factor!r}, tl.float32)"
        return TileCode(planes, setup=setup, scale=scale)

    def _plane(self, tile: Tile, plane: int) -> Plane:
        base = self.digits[0]
        width = tile.block_columns * base // 16
        name = f"plane_{plane}{tile.suffix}"
        text, columns, indices = words.plane_columns(tile, self.unit, base, plane, "position")
        lines, scale = self.numbers(tile, plane, name, width), ""
        if not self.groups.constant:
            loaded, varies = self.groups.load(tile, "scale", columns, indices)
            lines.append(f"{name}_scale = {self._times(loaded, self.factor(tile.product))}")
            if varies or tile.scaled == "tile":
                lines.append(self._scaled(tile, name, "" if varies else "[:, None]"))
            else:
                scale = f"{name}_scale"
        position = f"tl.arange(0, {width})"
        return Plane(
            tuple(line.replace("position", position) for line in lines),
            name,
            text.replace("position", position),
            width,
            scale,
        )

    def _scaled(self, tile: Tile, name: str, spread: str) -> str:
        scale = f"{name}_scale{spread}"
        if tile.product == "float16" and self.half_scales:
            return f"{name} = {name} * {scale}.to(tl.float16)"
        return f"{name} = ({name}.to(tl.float32) * {scale}).to(tl.{tile.product})"

    def _times(self, scale: str, factor: float) -> str:
        return scale if factor == 1 else f"{scale} * {factor!r}"
