"""Weights as they are."""

from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import pad

from sparc.codegen.triton.groups import TYPES
from sparc.codegen.triton.tiles import Buffer, DecodeCost, Plane, Product, Tile, TileCode, WeightLowering


class DenseWeight(WeightLowering):
    """`codes` `[rows, columns]` in their own type, rows filled up with zeros to whole units."""

    maskable = True

    def accepts(self, product: Product) -> str | None:
        """Floating products."""
        return "a dense weight is not multiplied in 8 bits" if product in ("int8", "float8e4nv") else None

    @property
    def dtype(self) -> str:
        """The stored type, as torch names it."""
        return str(getattr(self.encoding, "dtype", "float32"))

    @property
    def unit(self) -> int:
        """64 columns, or 16 where 64 would store many that do not exist."""
        wide = self.stored_columns % 64 == 0 or self.stored_columns > 512
        return 64 if wide and not self.narrow else 16

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """The codes."""
        types = {f"{dtype}".removeprefix("torch."): name for dtype, name in TYPES.items()}
        return (Buffer("codes", types[self.dtype]),)

    def layout(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The codes, filled up."""
        return {"codes": pad(parts["codes"], (0, self.stride - self.stored_columns)).contiguous()}

    def decode(self, tile: Tile) -> TileCode:
        """One plane."""
        name, end = f"dense{tile.suffix}", tile.suffix
        columns = f"{tile.first} + tl.arange(0, {tile.block_columns})"
        lines = [f'{name} = tl.load(codes{end} + {tile.entries(self.stride)}, eviction_policy="evict_first")']
        if tile.product != self.dtype:
            lines.append(f"{name} = {name}.to(tl.{tile.product})")
        return TileCode((Plane(tuple(lines), name, columns, tile.block_columns),))

    def cost(self, product: Product) -> DecodeCost:
        """The width of the stored type; hardly an instruction, unless it is converted."""
        bits = 32 if self.dtype == "float32" else 16
        convert = 0.0 if product == self.dtype else 1.0
        return DecodeCost(bits * self.padded_columns / self.columns, 0.3 + convert, 0.1)
