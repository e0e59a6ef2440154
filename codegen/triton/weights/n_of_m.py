"""`NM`: the kept codes, sorted by their turn in a group, and the groups' masks; registers spread a tile out again.

The i-th kept codes of all groups are a matrix `[rows, groups]` of their own, which the lowering of the codes decodes as
any other; the n of them lie below one another. A group's mask has a bit for each of its columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparc.codegen.triton import words
from sparc.codegen.triton.tiles import Buffer, DecodeCost, LoweringType, Plane, Product, Tile, TileCode, WeightLowering
from sparc.encoding.base import Encoding, Parts
from sparc.encoding.nm import NM

GREATEST_GROUP = 16
_HALVES: tuple[Product, ...] = ("float16", "bfloat16")  # two in a word


class StructuredWeight(WeightLowering):
    """A mask of n in every m columns around the lowering of its codes.

    Buffers: those of the inner lowering, its codes `[n * rows, groups]`; `mask`, int32 `[rows, groups * m / 32]`: the
    groups' masks as codes of m bits in words (`sparc.codegen.triton.words`), with planes as wide as the inner ones.
    """

    def __init__(self, encoding: Encoding, shape: Sequence[int], parts: Parts, inner_of: LoweringType) -> None:
        """Args: see the class; `inner_of` makes the lowering of the encoding inside."""
        super().__init__(encoding, shape, parts)
        self.mask = cast(NM, encoding)
        self.inner_encoding = self._of_groups()
        inner_parts = {name: parts[name] for name in self.mask.of.part_names}
        self.inner = inner_of(self.inner_encoding, (self.rows, self.columns // self.mask.m), inner_parts)
        self.inner.masked = self.inner.narrow = True
        self.inner = inner_of(self.inner_encoding, (self.rows, self.groups), inner_parts)
        self.inner.masked = self.inner.narrow = True
        self.forbidden = self.inner.forbidden

    def _of_groups(self) -> Encoding:
        """The inner encoding for a matrix that has a column for every group: m times fewer share a scale."""
        group, m = getattr(self.mask.of, "group", None), self.mask.m
        of: Any = self.mask.of
        return cast(Encoding, replace(of, group=group // m)) if isinstance(group, int) and group % m == 0 else of

    def accepts(self, product: Product) -> str | None:
        """What the inner lowering accepts, in groups of 2, 4, 8 or 16."""
        m, group = self.mask.m, getattr(self.mask.of, "group", None)
        if m & (m - 1) or m > GREATEST_GROUP:
            return f"{m} columns of a group are not a power of two up to {GREATEST_GROUP}"
        if isinstance(group, int) and group % m:
            return f"groups of {group} that share a scale are not whole groups of {m}"
        return self.inner.accepts(product) if self.inner.maskable else f"{self.mask.of} is not stored by groups"

    # layout ---------------------------------------------------------------------------------------------------------
    @property
    def width(self) -> int:
        """Groups of a plane."""
        return self.inner.unit // self.inner.planes

    @property
    def mask_unit(self) -> int:
        """Groups whose masks are in one row of words."""
        return self.width * 16 // self.mask.m

    @property
    def unit_groups(self) -> int:
        """Groups of a unit: whole units of codes and of masks."""
        return max(self.inner.unit, self.mask_unit)

    @property
    def groups(self) -> int:
        """Groups that are stored of a row."""
        return -(-self.columns // self.unit) * self.unit_groups

    @property
    def unit(self) -> int:
        """Columns of a unit of groups."""
        return self.mask.m * self.unit_groups

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """Those of the codes, then the masks."""
        return (*self.inner.buffers, Buffer("mask", "i32"))

    def layout(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Codes by their turn, masks in words."""
        of, n, m = self.mask.of, self.mask.n, self.mask.m
        kept = of.unpack(parts["codes"], self.columns // m * n).flatten(0, -2)
        turns = kept.unflatten(-1, (-1, n)).permute(2, 0, 1).flatten(0, 1)
        inner = {name: parts[name] for name in of.part_names}
        inner["codes"] = of.pack(pad(turns, (0, self.groups - turns.shape[-1])))
        mask = pad(self.mask.mask(parts, (self.rows, self.columns)), (0, self.padded_columns - self.columns))
        masks = (mask.unflatten(-1, (-1, m)).to(torch.int32) << torch.arange(m, device=mask.device)).sum(-1)
        return self.inner.layout(inner) | {"mask": words.pack(masks, m, self.mask_unit)}

    # code -----------------------------------------------------------------------------------------------------------
    def decode(self, tile: Tile) -> TileCode:
        """Inner unit by inner unit, plane by plane."""
        end, groups = tile.suffix, tile.block_columns // self.mask.m
        aliases = [
            f"{buffer.name}{end}_turn_{turn} = {buffer.name}{end}"
            for buffer in self.inner.buffers
            for turn in range(self.mask.n)
        ]
        starts = range(0, groups, self.width)
        setup = [f"{_first(tile, start)} = {tile.first} // {self.mask.m} + {start}" for start in starts]
        units = {start: self._turns(tile, start) for start in range(0, groups, self.inner.unit)}
        planes = [self._plane(tile, start, units[start // self.inner.unit * self.inner.unit]) for start in starts]
        before = (*aliases, *(line for code in units[0] for line in code.before))
        return TileCode(tuple(planes), before, tuple(setup), units[0][0].scale)

    def _turns(self, tile: Tile, start: int) -> list[TileCode]:
        """The inner code of each turn, for the inner unit that starts there."""
        inner = replace(tile, first=_first(tile, start), block_columns=self.inner.unit)
        return [
            self.inner.decode(
                replace(inner, suffix=f"{tile.suffix}_turn_{turn}", stored_rows=f"({tile.rows} + {turn * self.rows})")
            )
            for turn in range(self.mask.n)
        ]

    def _plane(self, tile: Tile, start: int, codes: Sequence[TileCode]) -> Plane:
        """An inner plane, spread out; the names of a unit are used again by the next one."""
        m, first = self.mask.m, _first(tile, start)
        number = start % self.inner.unit // self.width
        inner = [code.planes[number] for code in codes]
        lines = [] if number else [line for code in codes for line in code.setup]
        if start % self.mask_unit == 0:
            unit = replace(tile, first=first, block_columns=self.mask_unit)
            lines += words.load_words(unit, "mask", self.groups, m)
        lines += [line for plane in inner for line in plane.lines]
        spread = self._spread_pairs if tile.product in _HALVES else self._spread
        lines += spread(tile, start % self.mask_unit // self.width * m, [plane.value for plane in inner])
        columns = f"{first} * {m} + tl.arange(0, {m * self.width})"
        return Plane(tuple(lines), f"spread{tile.suffix}", columns, m * self.width, inner[0].scale)

    def _spread(self, tile: Tile, shift: int, values: Sequence[str]) -> list[str]:
        """The columns, first to last: one whose bit is set takes the next value, another is 0; then interleaved."""
        end, m = tile.suffix, self.mask.m
        queue = [f"next_{turn}{end}" for turn in range(len(values))]
        halves = f"tl.join(mask_words{end} & 0xFFFF, (mask_words{end} >> 16) & 0xFFFF)"
        lines = [f"masks{end} = {halves}.reshape({tile.block_rows}, {self.width})"]
        lines += [f"{name} = {value}" for name, value in zip(queue, values, strict=True)]
        for column in range(m):
            lines.append(f"kept{end} = (masks{end} & {1 << shift + column}) != 0")
            lines.append(f"column_{column}{end} = tl.where(kept{end}, {queue[0]}, tl.zeros_like({queue[0]}))")
            lines += [f"{name} = tl.where(kept{end}, {after}, {name})" for name, after in pairwise(queue)]
        return [*lines, self._interleaved(tile, [f"column_{column}{end}" for column in range(m)])]

    def _spread_pairs(self, tile: Tile, shift: int, values: Sequence[str]) -> list[str]:
        """The same for two neighbouring groups at once, whose values of 16 bits are the halves of words."""
        end, m = tile.suffix, self.mask.m
        queue = [f"next_{turn}{end}" for turn in range(len(values))]
        lines = []
        for name, value in zip(queue, values, strict=True):
            lines += [
                f"low{end}, high{end} = tl.split({value}.reshape({tile.block_rows}, {self.width // 2}, 2))",
                f"low{end} = low{end}.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF",
                f"{name} = low{end} | (high{end}.to(tl.int16, bitcast=True).to(tl.int32) << 16)",
            ]
        for column in range(m):
            # One bit of each half, times sixteen ones.
            lines.append(f"kept{end} = ((mask_words{end} >> {shift + column}) & 0x00010001) * 0xFFFF")
            lines.append(f"pair{end} = {queue[0]} & kept{end}")
            half = f".to(tl.int16).to(tl.{tile.product}, bitcast=True)"
            lines.append(f"low_{column}{end} = (pair{end} & 0xFFFF){half}")
            lines.append(f"high_{column}{end} = (pair{end} >> 16){half}")
            lines += [f"{name} = ({after} & kept{end}) | ({name} & ~kept{end})" for name, after in pairwise(queue)]
        return [
            *lines,
            self._interleaved(tile, [f"{half}_{column}{end}" for half in ("low", "high") for column in range(m)]),
        ]

    def _interleaved(self, tile: Tile, names: list[str]) -> str:
        """The tile whose columns are in turn of each name, `[block_rows, width]` or half of it: joined by twos."""
        while len(names) > 1:
            half = len(names) // 2
            names = [f"tl.join({names[index]}, {names[index + half]})" for index in range(half)]
        return f"spread{tile.suffix} = {names[0]}.reshape({tile.block_rows}, {self.mask.m * self.width})"

    def cost(self, product: Product) -> DecodeCost:
        """Half of what the inner lowering takes for every column, half for every kept one; then for every column a
        test, n selections, and interleaving, for two at once where they are halves of a word.
        """
        n, m = self.mask.n, self.mask.m
        inner = self.inner.cost(product)
        code_bits = float(self.mask.of.code_bytes(self.columns)) * 8 / self.columns
        filled = self.padded_columns / self.columns
        bits = (n * code_bits + m) / m * filled + (inner.bits - code_bits) / m
        issue, arithmetic = (3.0 + n / 2, 1.75 + n / 2) if product in _HALVES else (4.0 + 2 * n, 3.5 + n)
        share = (1 + n / m) / 2
        return DecodeCost(bits, inner.issue * share + issue, inner.arithmetic * share + arithmetic)


def _first(tile: Tile, start: int) -> str:
    """The name of a group of the tile."""
    return f"group_{start}{tile.suffix}"
