"""`MXFP4` and `NVFP4`: E2M1 floats whose bits are moved into wider floats, and a byte of scale for each block.

A number times the scale of its block has few enough bits to be exact in every type that tiles are multiplied in; so the
tile is scaled, and blocks may be narrower than products. What powers of two the type's exponents do not reach, and the
scale of the whole matrix, multiply the sums.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparc.codegen.triton import words
from sparc.codegen.triton.tiles import Buffer, DecodeCost, Plane, Product, Tile, TileCode
from sparc.codegen.triton.weights.coded import CodedWeight
from sparc.encoding.groups import Group

_BITS, _MANTISSA = 4, 1
_PLANES = 4  # of a unit; each has blocks of its own
_WIDTH = 32  # the greatest of a plane, so that a step of many tokens fits into registers
_GREATEST_EXPONENT = 254


class _MicroscalingWeight(CodedWeight):
    """`number * scale * whole`, from words of nibbles.

    Buffers: `codes`, as `CodedWeight` says; `scale` int32 `[rows, padded columns / (4 * block)]`, byte `p` of a word
    being the scale of a block in plane `p`; `whole` float32 `[1]`, or one for each matrix.

    Class attribute: `by_matrix`, whether each matrix of a batch has a `whole` of its own.
    """

    by_matrix: ClassVar[bool] = False

    forbidden: tuple[str, ...] = ("I2F", "F2F")
    # A mask's lowering asks for tiles of kept columns, whose blocks are not those of the scales.
    maskable = False

    @property
    def bits(self) -> int:
        """4."""
        return _BITS

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """None that `Groups` lays out."""
        return {}

    @property
    def block(self) -> int:
        """Columns that share a byte."""
        return int(self.size)

    @property
    def unit(self) -> int:
        """Columns of a unit of words, whose planes are whole blocks."""
        return max(words.unit_of(self.columns, _BITS, _WIDTH), _PLANES * self.block)

    @property
    def greatest(self) -> int:
        """No limit."""
        return 1 << 16

    def accepts(self, product: Product) -> str | None:
        """Every product in 16 bits or more."""
        return "4-bit floats are not multiplied in 8 bits" if product in ("int8", "float8e4nv") else None

    # layout ---------------------------------------------------------------------------------------------------------
    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """Words, scales, the whole's scale."""
        return (Buffer("codes", "i32"), Buffer("scale", "i32"), Buffer("whole", "fp32"))

    def layout(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Four scales in a word; those of padding are 0."""
        scale, whole = self.scales(parts)
        scale = pad(scale, (0, self.padded_columns // self.block - scale.shape[-1]))
        planes = scale.reshape(self.rows, -1, _PLANES, self.unit // _PLANES // self.block).to(torch.int32)
        shift = torch.arange(_PLANES, device=scale.device).reshape(_PLANES, 1) * 8
        scale_words = (planes << shift).sum(2, dtype=torch.int32).reshape(self.rows, -1)
        return super().layout(parts) | {"scale": scale_words, "whole": whole.reshape(-1)}

    @abstractmethod
    def scales(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The blocks' bytes, uint8 `[rows, blocks]`, and the scale of the whole, or of each matrix, in float32."""

    # code -----------------------------------------------------------------------------------------------------------
    def decode(self, tile: Tile) -> TileCode:
        """Four planes, each scaled by a byte of the words of scales."""
        end, each = tile.suffix, _PLANES * self.block
        places = f"{tile.rows}[:, None] * {self.padded_columns // each}"
        places += f" + ({tile.first} // {each} + tl.arange(0, {tile.block_columns // each}))[None, :]"
        setup = [*self.load(tile), f"scale_words{end} = tl.load(scale{end} + {places})"]
        factor = self.sums_factor(tile.product)
        own = f" + {tile.matrix}" if tile.matrix and self.by_matrix else ""
        whole = f"tl.full(({tile.block_rows},), {factor!r}, tl.float32) * tl.load(whole{end}{own})"
        return TileCode(tuple(self._plane(tile, plane) for plane in range(_PLANES)), setup=tuple(setup), scale=whole)

    def _plane(self, tile: Tile, plane: int) -> Plane:
        width, end = tile.block_columns // _PLANES, tile.suffix
        name, blocks = f"plane_{plane}{end}", width // self.block
        byte = f"((scale_words{end} >> {8 * plane}) & 0xFF)"
        lines = [
            *words.small_floats(f"codes_words{end}", _BITS * plane, _BITS, _MANTISSA, tile, name, width),
            f"{name}_scale = {self.scale_of(byte, tile.product)}",
            f"{name}_scale = tl.broadcast_to({name}_scale[:, :, None], ({tile.block_rows}, {blocks}, {self.block}))",
            f"{name} = {name} * {name}_scale.reshape({tile.block_rows}, {width})",
        ]
        text, _, _ = words.plane_columns(tile, self.unit, _BITS, plane, "position")
        return Plane(tuple(lines), name, text.replace("position", f"tl.arange(0, {width})"), width)

    @abstractmethod
    def scale_of(self, byte: str, product: Product) -> str:
        """An expression for a byte's scale in the product's type, a power of two times what the block's scale is."""

    @abstractmethod
    def sums_factor(self, product: Product) -> float:
        """The power of two that is missing in the sums, since neither numbers nor scales have it."""

    def cost(self, product: Product) -> DecodeCost:
        """Two shifts, two masks and a product for two numbers."""
        bits = (_BITS + 8 / self.block) * self.padded_columns / self.columns
        issue, arithmetic = (14.0, 6.0) if product == "float32" else (5.6, 3.1)
        return DecodeCost(bits, issue, arithmetic)


class MXFP4Weight(_MicroscalingWeight):
    """Powers of two, whose exponents are stored relative to the matrix's greatest."""

    @property
    def size(self) -> Group:
        """32."""
        return 32

    def scales(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The greatest exponent becomes 254, that of the greatest normal bfloat16; the whole has what it was.

        Half precision reaches 2^-30 of the greatest scale; a smaller block, nothing in any sum, is 0.
        """
        exponent = parts["scale"].to(torch.int32)
        greatest = exponent.amax()
        whole = torch.ldexp(torch.ones((), dtype=torch.float64, device=exponent.device), greatest - 127)
        return (exponent - greatest + _GREATEST_EXPONENT).clamp(min=1).to(torch.uint8), whole.float()

    def scale_of(self, byte: str, product: Product) -> str:
        """The exponent, put where the type has it."""
        if product == "float16":
            exponent = f"tl.maximum({byte} - {_GREATEST_EXPONENT - 30}, 0)"
            return f"({exponent} << 10).to(tl.int16).to(tl.float16, bitcast=True)"
        if product == "bfloat16":
            return f"({byte} << 7).to(tl.int16).to(tl.bfloat16, bitcast=True)"
        return f"({byte} << 23).to(tl.float32, bitcast=True)"

    def sums_factor(self, product: Product) -> float:
        """Scales are up to 2^15 or 2^127, numbers are over 2^14 or 2^126."""
        return 0.5


class NVFP4Weight(_MicroscalingWeight):
    """E4M3 floats, and a float32 scale of the whole."""

    by_matrix = True

    @property
    def size(self) -> Group:
        """16."""
        return 16

    def scales(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """As they are."""
        return parts["scale"], parts["tensor_scale"].float()

    def scale_of(self, byte: str, product: Product) -> str:
        """The bits, moved, and as great a power of two as fits, since numbers are over 2^14 or 2^126."""
        if product == "float16":
            return f"({byte} << 7).to(tl.int16).to(tl.float16, bitcast=True) * {2.0**15!r}"
        # in two steps, because the power of two is greater than a number of the type can be
        up = f" * {2.0**119!r} * {2.0**119!r}"
        if product == "bfloat16":
            return f"({byte} << 4).to(tl.int16).to(tl.bfloat16, bitcast=True){up}"
        return f"({byte} << 20).to(tl.float32, bitcast=True){up}"

    def sums_factor(self, product: Product) -> float:
        """Scales are times 2^7 or 2^118, numbers are over 2^14 or 2^126."""
        return 2.0**7 if product == "float16" else 2.0**8
