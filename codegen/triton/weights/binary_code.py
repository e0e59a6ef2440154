"""`BinaryCode`: bits that become signs, of alphas that are added up."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparc.codegen.triton import lookup, words
from sparc.codegen.triton.tiles import Buffer, DecodeCost, Plane, Product, Tile, TileCode
from sparc.codegen.triton.weights.coded import CodedWeight
from sparc.encoding.base import Encoding, Parts
from sparc.encoding.binary_code import BinaryCode
from sparc.encoding.groups import Group


class BinaryCodeWeight(CodedWeight):
    """`offset + sum_i ±alpha_i`, from words of signs, or where there is a mask, of codes.

    Buffers: `codes` int32 `[rows, bits, padded columns / 32]`, words of one bit of each code, unless there is a mask;
    `alpha_0`, ..., `offset`, each `[groups, rows]`.
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

    @property
    def digits(self) -> tuple[int, ...]:
        """Of words of signs, one; see the class."""
        return super().digits if self.masked else (1,)

    @property
    def unit(self) -> int:
        """Of words of signs, the columns of a lookup's step."""
        return super().unit if self.masked else lookup.COLUMNS

    @property
    def run(self) -> int | None:
        """How many neighbours of a plane are neighbours in the matrix: so few that a byte's columns share a group."""
        if self.masked or self._span is None:
            return None
        return min(self._span, lookup.CHUNK * words.LEAST_WIDTH) // lookup.CHUNK

    @property
    def _span(self) -> int | None:
        """The greatest power of two that divides groups, up to a unit; None where it is less than a byte's columns."""
        if self.groups.constant:
            return self.unit
        found = min(int(self.size) & -int(self.size), self.unit)
        return found if found >= words.LEAST_WIDTH else None

    def accepts(self, product: Product) -> str | None:
        """Every product in 16 bits or more."""
        return "sums of alphas are not multiplied in 8 bits" if product in ("int8", "float8e4nv") else None

    def unpacked(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Codes of planes of bits; those of a stack of matrices below one another."""
        planes = parts["codes"].reshape(-1, self.bits, *parts["codes"].shape[-2:])
        return cast(BinaryCode, self.encoding).unpack(planes, self.stored_columns).flatten(0, 1)

    # layout ---------------------------------------------------------------------------------------------------------
    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """Words, then the parameters."""
        return tuple(each for each in super().buffers if self.masked or each.name != "ones")

    def layout(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Words of signs, bit by bit; a padded column has parameters of 0."""
        if self.masked:
            return super().layout(parts)
        codes = pad(self.unpacked(parts), (0, self.stride - self.columns))
        codes = codes if self.run is None else words.in_runs(codes, self.unit, self.run)
        signs = [words.pack((codes >> bit) & 1, 1, self.unit) for bit in range(self.bits)]
        parameters = {name: self.groups.layout(each) for name, each in self.parameters.items()}
        return {"codes": torch.stack(signs, 1).contiguous(), **parameters}

    # code -----------------------------------------------------------------------------------------------------------
    def decode(self, tile: Tile) -> TileCode:
        """Plane by plane; what serves whole rows is read before the loop."""
        planes = tuple(self._plane(tile, plane) for plane in range(self.planes))
        return TileCode(planes, self._constants(tile), tuple(self.load(tile)))

    def _constants(self, tile: Tile) -> tuple[str, ...]:
        """Code that reads what serves whole rows."""
        end = tile.suffix
        return tuple(
            f"{name}_value{end} = tl.load({name}{end} + {tile.rows}).to(tl.float32)[:, None]"
            for name in self.parameters
            if self.groups.constant
        )

    def load(self, tile: Tile) -> list[str]:
        """Code that reads the tile's words; those of signs into `signs_0`, ..."""
        if self.masked:
            return super().load(tile)
        end, stored = tile.suffix, self.stride // 32
        places = tile.entries(self.bits * stored, 32)
        return [
            f'signs_{bit}{end} = tl.load(codes{end} + {bit * stored} + {places}, eviction_policy="evict_first")'
            for bit in range(self.bits)
        ]

    def _plane(self, tile: Tile, plane: int) -> Plane:
        """Bit by bit: a sign in front of 1, times alpha, in float16 or float32."""
        base, kind = self.digits[0], "float16" if tile.product == "float16" else "float32"
        width, name = tile.block_columns * base // 16, f"plane_{plane}{tile.suffix}"
        text, columns, indices = words.plane_columns(tile, self.unit, base, plane, "position", self.run)
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
        if not self.masked:
            return f"signs_{bit}{tile.suffix}", plane
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

    # lookup ---------------------------------------------------------------------------------------------------------
    @property
    def pieces(self) -> int:
        """Of a step's columns, those whose sums have other parameters."""
        if self.groups.constant or self._span == lookup.COLUMNS:
            return 1
        return lookup.COLUMNS // cast(int, self._span)

    def lookup(self, tile: Tile) -> TileCode:
        """`sum_i alpha_i * sum of entries + offset * sum of the activation`, by pieces of a group."""
        end, run, pieces = tile.suffix, cast(int, self.run), self.pieces
        name = f"looked_up{end}"
        lines = [lookup.total(f"total{end}", pieces)]
        if not self.groups.constant:
            lines += self._parameters_of_pieces(tile)
        lines.append(f"{name} = offset_value{end} * total{end}[None, :]")
        signs = [f"signs_{bit}{end}" for bit in range(self.bits)]
        factors = [f"alpha_{bit}_value{end}" for bit in range(self.bits)]
        lines += lookup.add(name, signs, factors, tile.block_rows, pieces)
        plane = Plane(tuple(lines), name, lookup.columns(tile.first, run), pieces)
        return TileCode((plane,), self._constants(tile), tuple(self.load(tile)))

    def _parameters_of_pieces(self, tile: Tile) -> list[str]:
        end, pieces, span = tile.suffix, self.pieces, cast(int, self._span)
        piece = f"tl.arange(0, {pieces})"
        start = f" + {piece} % 2 * {lookup.COLUMNS // 2} + {piece} // 2 * {span}" if pieces > 1 else f" + {piece}"
        places = f"(({tile.first}{start}) // {self.size})[None, :] * {self.rows} + {tile.rows}[:, None]"
        return [
            f"places{end} = {places}",
            *(f"{each}_value{end} = tl.load({each}{end} + places{end}).to(tl.float32)" for each in self.parameters),
        ]

    def lookup_cost(self, product: Product, block_rows: int) -> DecodeCost | None:
        """For each bit, and an eighth of a weight, a key, an entry and a sum; for all rows of a tile, the tables."""
        if self.masked or self._span is None or self.accepts(product):
            return None
        wide = 1.0 + 60.0 / block_rows if product == "float32" else 0.0
        parameters = 2.0 * (self.bits + 1) * self.pieces / lookup.COLUMNS
        issue = 0.5 + 0.66 * self.bits + parameters + 30.0 / block_rows + wide
        arithmetic = 0.1 + 0.27 * self.bits + wide / 2
        return DecodeCost(self.bits_read, issue, arithmetic, shared=lookup.shared_accesses(self.bits, block_rows))
