"""What an encoding adds to generated kernels: how its parts are laid out in memory, and the code that decodes a tile.

A contraction walks over the columns of a weight matrix in steps. In each step it asks for the tile of one block of rows
and one block of columns. The tile comes as planes: pieces whose columns need not be neighbours, so that codes packed
into words can be taken out with a shift and a mask; the activation is read at each plane's columns.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sparc.codegen.triton.index import Indices
from sparc.encoding.base import Encoding, Parts

Product = Literal["float16", "bfloat16", "float32", "int8", "float8e4nv"]


@dataclass(frozen=True)
class Buffer:
    """A tensor that a kernel reads for a weight.

    Args:
        name: the argument's name.
        type: Triton's name of the elements' type, such as `i32`.
    """

    name: str
    type: str


@dataclass(frozen=True)
class Tile:
    """The tile that code is asked for.

    Args:
        rows: the name of the rows' indices, int32 `[block_rows]`, all of rows that exist.
        first: the name of the first column, a multiple of `block_columns`.
        block_rows: rows of the tile.
        block_columns: columns of the tile.
        product: the type in which it is multiplied.
        scaled: what the scales of groups multiply: the tile's elements, or the partial product, in float32.
        suffix: ends every name that the code defines, and the names of the buffers.
        stored_rows: an expression for the rows of the codes, where a mask stores other rows than the matrix has; empty
            where they are `rows`. Scales are always those of `rows`.
        stored_first: an expression for the first column in the codes, likewise; empty where it is `first`.
        matrix: the name of the index of the matrix that the rows belong to, where the weight is a batch of matrices
            whose rows are below one another; empty where it is one.
    """

    rows: str
    first: str
    block_rows: int
    block_columns: int
    product: Product
    scaled: Literal["tile", "product"] = "product"
    suffix: str = ""
    stored_rows: str = ""
    stored_first: str = ""
    matrix: str = ""

    def entries(self, stride: int, codes: int = 1) -> str:
        """Where the tile's codes lie: offsets, int32 `[block_rows, block_columns / codes]`.

        Args:
            stride: entries of a stored row.
            codes: that an entry holds.
        """
        start = self.stored_first or self.first
        start = start if codes == 1 else f"{start} // {codes}"
        count = self.block_columns // codes
        return f"{self.stored_rows or self.rows}[:, None] * {stride} + ({start} + tl.arange(0, {count}))[None, :]"

    def indices(self) -> Indices:
        """What is known of the tile's indices."""
        indices = Indices()
        indices.symbol(self.first, multiple=self.block_columns)
        return indices


@dataclass(frozen=True)
class Plane:
    """A piece of a tile.

    Args:
        lines: code that defines `value`.
        value: an expression for the piece `[block_rows, width]` in the product's type.
        columns: an expression for its columns, int32 `[width]`.
        width: how many columns.
        scale: an expression, float32 `[block_rows]`, that multiplies the piece's part of the product; empty for none.
    """

    lines: tuple[str, ...]
    value: str
    columns: str
    width: int
    scale: str = ""


@dataclass(frozen=True)
class TileCode:
    """The code of a tile.

    Args:
        before: lines before the loop.
        setup: lines at the beginning of each step.
        planes: the pieces.
        scale: an expression, float32 `[block_rows]`, that multiplies the whole product after the loop; empty for none.
    """

    planes: tuple[Plane, ...]
    before: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    scale: str = ""


@dataclass(frozen=True)
class Loop:
    """The columns that a block of rows has: how the contraction walks over them.

    Args:
        before: lines before the loop, where `rows_block` is the index of the block of rows.
        steps: an expression for the number of steps.
        lines: lines at the beginning of each step that define the tile's first column from `step`.
        static: whether `steps` is a literal, so that steps can be shared out among programs.
    """

    steps: str
    lines: tuple[str, ...]
    before: tuple[str, ...] = ()
    static: bool = True


@dataclass(frozen=True)
class DecodeCost:
    """What decoding takes, for one weight.

    Args:
        bits: bits read from memory, scales and indices included.
        issue: instructions.
        arithmetic: those of them on the integer and logic units.
        density: the share of the matrix that is read and multiplied.
        shared: accesses of shared memory, one that waits for others of its bank counted once for each.
    """

    bits: float
    issue: float
    arithmetic: float
    density: float = 1.0
    shared: float = 0.0


class WeightLowering(ABC):
    """What an encoding adds to generated kernels; made for one encoding and one matrix `[rows, columns]`.

    An extension registers a subclass, or a function that returns an instance, under `("cuda", encoding's class name)`:
    it is called as `lowering(encoding, shape, parts)`, where `parts` are the encoded weight's tensors.

    Attributes: `forbidden`, beginnings of machine instructions that the main loop must not hold; `maskable`, whether
    its codes may be stored otherwise than the matrix's rows, as masks need it: the layout follows `stored_columns`, and
    the code reads where `Tile.entries` says; `stored_columns`, the columns of a stored row of codes, which a mask sets
    where they are not the matrix's; `masked`, which a mask sets; `narrow`, which a mask sets where units are to be no
    wider than they must be.
    """

    forbidden: tuple[str, ...] = ()
    maskable: ClassVar[bool] = False

    def __init__(self, encoding: Encoding, shape: Sequence[int], parts: Parts) -> None:
        """Args: see the class."""
        self.encoding, self.parts = encoding, parts
        self.rows, self.columns = int(shape[-2]), int(shape[-1])
        self.stored_columns = self.columns
        self.masked = self.narrow = False

    @abstractmethod
    def accepts(self, product: Product) -> str | None:
        """None when tiles can be decoded to a type, else the reason why not."""

    @property
    @abstractmethod
    def buffers(self) -> tuple[Buffer, ...]:
        """What the kernel reads."""

    @abstractmethod
    def layout(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The buffers' tensors, by name, from the encoding's parts."""

    @property
    @abstractmethod
    def unit(self) -> int:
        """The least number of columns of a tile, a power of two; `padded_columns` is a multiple of it."""

    @property
    def greatest(self) -> int:
        """The greatest number of columns that a tile may have."""
        return 1 << 16

    @property
    def planes(self) -> int:
        """Of a unit, where `maskable`: plane `p` has as many columns as the others, neighbours, in order."""
        return 1

    @property
    def block_rows(self) -> int | None:
        """The number of rows a tile must have; None when any power of two will do."""
        return None

    @property
    def padded_columns(self) -> int:
        """The columns that the layout stores: `columns`, rounded up."""
        return -(-self.columns // self.unit) * self.unit

    @property
    def stride(self) -> int:
        """The codes of a stored row, rounded up."""
        return -(-self.stored_columns // self.unit) * self.unit

    @property
    def integer_sums(self) -> bool:
        """Whether `row_sums` are those of the integers that are multiplied, before their scale."""
        return False

    def row_sums(self) -> Tensor:
        """The sums of the matrix's rows, float32 `[rows]`; int32 where they are of integers."""
        dense = self.encoding.decode(self.parts, (self.rows, self.columns), torch.float32)
        return dense.double().sum(1).float()

    def loop(self, tile: Tile) -> Loop:
        """By default, every column."""
        steps = self.padded_columns // tile.block_columns
        return Loop(str(steps), (f"{tile.first} = step * {tile.block_columns}",))

    @abstractmethod
    def decode(self, tile: Tile) -> TileCode:
        """The code that decodes a tile."""

    @abstractmethod
    def cost(self, product: Product) -> DecodeCost:
        """What it takes."""

    def lookup(self, tile: Tile) -> TileCode:
        """The code of the form that looks sums up (`sparc.codegen.triton.lookup`), where `lookup_cost` offers it.

        It has one plane, whose columns are `[16, 16]` and whose value, float32 `[block_rows, width]`, is added to the
        product: it is made of the entries of `table`, and of the activation's `value`.
        """
        raise NotImplementedError

    def lookup_cost(self, product: Product, block_rows: int) -> DecodeCost | None:
        """What that form takes, its tables included; None, by default, where there is none.

        Args:
            product: the activation's type, in which tables are made.
            block_rows: rows of a tile, which share them.
        """
        return None

    def key(self) -> str:
        """What the generated code depends on, beside the shape: the encoding, as text."""
        return str(self.encoding)

    def without_tensors(self) -> "WeightLowering":
        """A copy that holds shapes alone, for what outlives the weights: its code is generated already."""
        found = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, WeightLowering):
                setattr(found, name, value.without_tensors())
            elif isinstance(value, Mapping) and all(isinstance(each, Tensor) for each in value.values()):
                setattr(found, name, {part: each.to("meta") for part, each in value.items()})
        return found


LoweringType = Callable[[Encoding, tuple[int, int], Parts], WeightLowering]
