"""`Blocks`: kept blocks one after another, and for every row of blocks the list of those it has."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

from torch import Tensor

from sparc.codegen.triton.tiles import Buffer, DecodeCost, Loop, LoweringType, Product, Tile, TileCode, WeightLowering
from sparc.encoding.base import Encoding, Parts
from sparc.encoding.blocks import Blocks

LEAST_EDGE, GREATEST_ROWS = 16, 256
_INDEX_BITS = 32
_LEAST_OF_8_BITS = 32  # columns that a tensor core multiplies at once
# What a step takes beside decoding, all threads together: finding the block, and addresses that follow from it.
_STEP_ISSUE, _STEP_ARITHMETIC = 6144, 2048


class BlockSparseWeight(WeightLowering):
    """A mask of blocks around the lowering of its codes: a tile is a block, a step of the loop is a kept block.

    The blocks are the A operand, so that their rows are those of a tensor core's product.

    Buffers: those of the inner lowering, its codes being the blocks' rows `[kept * rows of a block, columns of a
    block]`; `pointers`, int32 `[rows of blocks + 1]`; `indices`, int32 `[kept]`.
    """

    def __init__(self, encoding: Encoding, shape: Sequence[int], parts: Parts, inner_of: LoweringType) -> None:
        """Args: see the class; `inner_of` makes the lowering of the encoding inside."""
        super().__init__(encoding, shape, parts)
        self.mask = cast(Blocks, encoding)
        self.edges = self.mask.edges((self.rows, self.columns))
        self.kept = int(parts["indices"].numel())
        inner_parts = {name: parts[name] for name in self.mask.of.part_names}
        self.inner = inner_of(self.mask.of, (self.rows, self.padded_columns), inner_parts)
        self.inner.stored_columns = self.unit
        self.inner.masked = True
        self.forbidden = self.inner.forbidden

    def accepts(self, product: Product) -> str | None:
        """What the inner lowering accepts, in blocks that are tiles."""
        rows, columns = self.edges
        if "all" in self.mask.size:
            return "whole rows or columns are not blocks that a tile holds"
        if rows & (rows - 1) or not LEAST_EDGE <= rows <= GREATEST_ROWS:
            return f"{rows} rows of a block are not a power of two between {LEAST_EDGE} and {GREATEST_ROWS}"
        if columns & (columns - 1) or columns < LEAST_EDGE:
            return f"{columns} columns of a block are not a power of two of at least {LEAST_EDGE}"
        if not self.inner.maskable:
            return f"{self.mask.of} is not stored in blocks"
        if columns % self.inner.unit:
            return f"{columns} columns of a block are fewer than the {self.inner.unit} of a tile of {self.mask.of}"
        width = min(columns, self.inner.greatest) // self.inner.planes
        if product in ("int8", "float8e4nv") and width < _LEAST_OF_8_BITS:
            return (
                f"{columns} columns of a block give tensor cores {width} at once, and {_LEAST_OF_8_BITS} are the least"
            )
        return self.inner.accepts(product)

    # layout ---------------------------------------------------------------------------------------------------------
    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """Those of the blocks, then the list."""
        return (*self.inner.buffers, Buffer("pointers", "i32"), Buffer("indices", "i32"))

    def layout(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The blocks below one another."""
        inner = {name: parts[name] for name in self.mask.of.part_names}
        inner["codes"] = inner["codes"].flatten(0, 1)
        return self.inner.layout(inner) | {name: parts[name].contiguous() for name in self.mask.mask_names}

    @property
    def unit(self) -> int:
        """A block's columns."""
        return self.edges[1]

    @property
    def greatest(self) -> int:
        """A block's columns."""
        return self.edges[1]

    @property
    def block_rows(self) -> int:
        """A block's rows."""
        return self.edges[0]

    # code -----------------------------------------------------------------------------------------------------------
    def loop(self, tile: Tile) -> Loop:
        """The blocks of a row of blocks."""
        end = tile.suffix
        wide = ".to(tl.int64)" if self.kept * self.block_rows * self.unit >= 1 << 31 else ""
        return Loop(
            f"count{end}",
            (
                f"block{end} = begin{end} + step",
                f"{tile.first} = tl.load(indices{end} + block{end}) * {self.unit}",
                f"block_rows{end} = block{end}{wide} * {self.block_rows} + tl.arange(0, {self.block_rows})",
            ),
            (
                f"begin{end} = tl.load(pointers{end} + rows_block)",
                f"count{end} = tl.load(pointers{end} + rows_block + 1) - begin{end}",
            ),
            static=False,
        )

    def decode(self, tile: Tile) -> TileCode:
        """The inner lowering's, whose codes are read from the block; by pieces where it decodes no wider ones."""
        stored = replace(tile, stored_rows=f"block_rows{tile.suffix}", stored_first="0")
        if self.unit <= self.inner.greatest:
            return self.inner.decode(stored)
        pieces = [self._piece(stored, start) for start in range(0, self.unit, self.inner.greatest)]
        return replace(
            pieces[0],
            setup=tuple(line for piece in pieces for line in piece.setup),
            planes=tuple(plane for piece in pieces for plane in piece.planes),
        )

    def _piece(self, tile: Tile, start: int) -> TileCode:
        """A piece's code; its names are used again by the next one, so that it is read with its first plane."""
        first = f"first_{start}{tile.suffix}"
        code = self.inner.decode(replace(tile, first=first, block_columns=self.inner.greatest, stored_first=str(start)))
        plane = replace(code.planes[0], lines=(*code.setup, *code.planes[0].lines))
        return replace(code, setup=(f"{first} = {tile.first} + {start}",), planes=(plane, *code.planes[1:]))

    def cost(self, product: Product) -> DecodeCost:
        """The inner lowering's for what is kept, blocks at a ragged edge being whole, and a step's by block."""
        inner, block = self.inner.cost(product), self.block_rows * self.unit
        return DecodeCost(
            bits=inner.bits + _INDEX_BITS / block,
            issue=inner.issue + _STEP_ISSUE / block,
            arithmetic=inner.arithmetic + _STEP_ARITHMETIC / block,
            density=inner.density * self.kept * block / (self.rows * self.columns),
        )
