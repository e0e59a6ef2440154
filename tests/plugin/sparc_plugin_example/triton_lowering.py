"""Triton for PowersOfTwo: codes in words, turned into numbers in a tile's registers; sparc composes the rest."""

from collections.abc import Mapping
from typing import cast

from torch import Tensor

from sparc.codegen.triton.tiles import DecodeCost, Product, Tile
from sparc.codegen.triton.weights.coded import ScaledWeight
from sparc_plugin_example.powers_of_two import PowersOfTwo


class PowersOfTwoWeight(ScaledWeight):
    """`±2^-e * scale`: four bits a code, one scale a row."""

    forbidden: tuple[str, ...] = ()

    @property
    def bits(self) -> int:
        """4."""
        return 4

    @property
    def size(self) -> str:  # type: ignore[override]
        """One scale a row."""
        return "channel"

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The scale."""
        return {"scale": self.parts["scale"]}

    def accepts(self, product: Product) -> str | None:
        """Floating products."""
        return "powers of two are not multiplied in 8 bits" if product in ("int8", "float8e4nv") else None

    def unpacked(self, parts: Mapping[str, Tensor]) -> Tensor:
        """One code to a byte."""
        return cast(PowersOfTwo, self.encoding).unpack(parts["codes"], self.stored_columns)

    def numbers(self, tile: Tile, plane: int, name: str, width: int) -> list[str]:
        """Code 0 is zero, codes `1 + e` are positive and `8 + e` negative."""
        return [
            f"{name}_pairs = {self.pairs(tile, plane)}",
            f"{name}_code = tl.join({name}_pairs & 0xF, ({name}_pairs >> 16) & 0xF).reshape({tile.block_rows}, "
            f"{width})",
            f"{name}_power = tl.exp2(tl.where({name}_code >= 8, 8 - {name}_code, 1 - {name}_code).to(tl.float32))",
            f"{name}_signed = tl.where({name}_code >= 8, -{name}_power, {name}_power)",
            f"{name} = tl.where({name}_code == 0, 0.0, {name}_signed).to(tl.{tile.product})",
        ]

    def cost(self, product: Product) -> DecodeCost:
        """Selections and an exponential for each weight."""
        return DecodeCost(self.bits_read, 12.0, 6.0)
