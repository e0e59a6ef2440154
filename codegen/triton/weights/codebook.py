"""`Codebook`: entries of a table, which is looked up in shared memory, times a scale."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from sparc.codegen.triton import words
from sparc.codegen.triton.tiles import Buffer, DecodeCost, Product, Tile, TileCode
from sparc.codegen.triton.weights.coded import ScaledWeight
from sparc.encoding.base import Encoding, Parts
from sparc.encoding.codebook import Codebook
from sparc.encoding.groups import Group

# Slots of a weight on sm_90 at 16 tokens, in float16, for 4 and for 2 bits. Loads from a table in global memory: 9.4,
# 9.4. A gather along rows of copies of the table, which becomes shuffles: 7.2, 7.3. A tree of selections: 15.6, 5.5. A
# gather from one flat table, which becomes one load from shared memory for each weight, of as many banks as there are
# entries, so without conflicts: 4.6, 4.5. The same from a table of pairs, for 2 bits, whose 16 pairs are without
# conflicts as well: 3.7; the 256 pairs of 4 bits would share 32 banks, and take more time than two loads.
_PAIRED_BITS = 2


class CodebookWeight(ScaledWeight):
    """`table[code] * scale`, from words of codes. A further buffer: `table` float32 `[2**bits]`, one
    after another where each matrix of a batch has its own.
    """

    def __init__(self, encoding: Encoding, shape: Sequence[int], parts: Parts) -> None:
        """Args: see the class."""
        super().__init__(encoding, shape, parts)
        self.codebook = cast(Codebook, encoding)
        self.scale = parts.get("scale")

    @property
    def bits(self) -> int:
        """The encoding's."""
        return self.codebook.bits

    @property
    def size(self) -> Group:
        """The encoding's."""
        return self.codebook.columns

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Scale, if there is one."""
        return {} if self.scale is None else {"scale": self.scale}

    def accepts(self, product: Product) -> str | None:
        """Every product in 16 bits or more."""
        return "entries of a table are not multiplied in 8 bits" if product in ("int8", "float8e4nv") else None

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """Words, scale, table."""
        return (*super().buffers, Buffer("table", "fp32"))

    def layout(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The table as it is."""
        table = self.codebook.table(parts, parts["codes"]).to(torch.float32)
        return super().layout(parts) | {"table": table.reshape(-1)}

    # code -----------------------------------------------------------------------------------------------------------
    def decode(self, tile: Tile) -> TileCode:
        """The table, read before the loop; then as others with a scale."""
        end, entries = tile.suffix, 2**self.bits
        own = f" + {tile.matrix} * {entries}" if tile.matrix and "table" in self.parts else ""
        table = f"table{end}{own}"
        if self._paired(tile):
            each = f"tl.arange(0, {entries * entries})"
            bits = f".to(tl.{tile.product}).to(tl.int16, bitcast=True).to(tl.int32)"
            lines = [
                f"low_entries{end} = tl.load({table} + {each} % {entries}){bits} & 0xFFFF",
                f"high_entries{end} = tl.load({table} + {each} // {entries}){bits} << 16",
                f"entries{end} = low_entries{end} | high_entries{end}",
            ]
        else:
            lines = [f"entries{end} = tl.load({table} + tl.arange(0, {entries})).to(tl.{tile.product})"]
        return replace(super().decode(tile), before=tuple(lines))

    def _paired(self, tile: Tile) -> bool:
        return self.bits == _PAIRED_BITS and tile.product != "float32"

    def numbers(self, tile: Tile, plane: int, name: str, width: int) -> list[str]:
        """Entries, looked up one by one, or two at a time."""
        entries, rows = f"entries{tile.suffix}", tile.block_rows
        lines = [f"{name}_codes = {self.pairs(tile, plane)}"]
        if self._paired(tile):
            both = f"({name}_codes | ({name}_codes >> {16 - self.bits})) & {4**self.bits - 1}"
            lines.append(f"{name}_codes = ({both}).reshape({rows * width // 2})")
            found = f"tl.gather({entries}, {name}_codes, 0).reshape({rows}, {width // 2})"
            return [*lines, *words.from_halves(found, tile, name, width)]
        return [
            *lines,
            f"{name}_codes = tl.join({name}_codes & 0xFFFF, {name}_codes >> 16).reshape({rows * width})",
            f"{name} = tl.gather({entries}, {name}_codes, 0).reshape({rows}, {width})",
        ]

    def cost(self, product: Product) -> DecodeCost:
        """A load from shared memory for each weight, or for two; scales in the tile, of many tokens, are in it."""
        if product == "float32":
            return DecodeCost(self.bits_read, 12.0, 7.0)
        issue, arithmetic = {2: (4.5, 2.5), 3: (7.7, 4.4), 4: (5.4, 2.7)}[self.bits]
        widened = 1.5 if product == "bfloat16" and not self.groups.constant else 0.0
        return DecodeCost(self.bits_read, issue + widened, arithmetic)
