"""What an encoding is: a way to write a weight matrix with fewer bytes, exactly, once it lies on the encoding's grid.

Encodings see matrices of shape `[batch..., out, reduce]` (see `sparc.encoding.view`). The law every encoding keeps,
bitwise: `decode(encode(round(w, grid), grid)) == round(w, grid)`.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import sympy
import torch
from torch import Tensor

from sparc.encoding.grid import Grid

Parts = dict[str, Tensor]
_MAX_ROUNDS = 8


@dataclass(frozen=True)
class Encoding(ABC):
    """A frozen dataclass whose fields are its options; `str(encoding)` is its spec, which `sparc::decode` carries.

    Class attribute: `shown`, the options that the spec says even at their defaults, because readers of reports need
    them.
    """

    shown: ClassVar[tuple[str, ...]] = ()

    def __str__(self) -> str:
        return spec_text(self)

    @property
    @abstractmethod
    def part_names(self) -> tuple[str, ...]:
        """The names of the stored tensors, in the order `sparc::decode` takes them."""

    @abstractmethod
    def accepts(self, shape: Sequence[int]) -> str | None:
        """None when a matrix of this shape can be encoded, else the reason why not."""

    @abstractmethod
    def fit(self, weight: Tensor, *, importance: Tensor | None = None, search: bool = False) -> Grid:
        """Choose the grid for a matrix.

        Args:
            weight: `[batch..., out, reduce]`, floating.
            importance: the weight of a squared error in each column, `[reduce]`, or of each element, in the matrix's
                shape; not negative, uniform by default. What has importance 0 does not matter at all, not even for the
                range covered.
            search: minimise the (weighted) squared rounding error instead of covering the whole range.
        """

    @abstractmethod
    def round(self, weight: Tensor, grid: Grid) -> Tensor:
        """The nearest matrix on the grid, in the dtype of `weight`."""

    @abstractmethod
    def encode(self, weight: Tensor, grid: Grid) -> Parts:
        """The stored tensors of a matrix that lies on the grid."""

    @abstractmethod
    def decode(self, parts: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The matrix of this shape and dtype."""

    @abstractmethod
    def bytes(self, shape: Sequence["int | sympy.Expr"]) -> sympy.Expr:
        """The stored bytes of a matrix of this shape, which may be symbolic."""

    def bytes_on(self, grid: Grid, shape: Sequence["int | sympy.Expr"]) -> sympy.Expr:
        """The stored bytes of a matrix on one grid: `bytes`, unless it is the grid that says how much is stored."""
        return self.bytes(shape)

    def compose(self, inner: "Encoding") -> "Encoding":
        """The encoding of a weight on this grid once it is also rounded to `inner`; by default, `inner` itself."""
        return inner


@dataclass(frozen=True)
class ElementEncoding(Encoding):
    """An encoding that gives every element a code of its own, so that masks can choose which codes are stored."""

    @abstractmethod
    def codes(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """One code per element, in the shape of `weight`; `tensors` are the grid's."""

    @abstractmethod
    def values(self, codes: Tensor, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """What the codes mean."""

    @abstractmethod
    def pack(self, codes: Tensor) -> Tensor:
        """Codes `[..., n]` as they are stored."""

    @abstractmethod
    def unpack(self, packed: Tensor, length: int) -> Tensor:
        """The inverse of `pack`, for rows of `length` codes."""

    @abstractmethod
    def code_bytes(self, length: "int | sympy.Expr") -> sympy.Expr:
        """Stored bytes of a row of `length` codes."""

    @property
    @abstractmethod
    def grid_names(self) -> tuple[str, ...]:
        """The names of the grid's tensors, which are stored beside the codes."""

    @property
    def part_names(self) -> tuple[str, ...]:
        """The codes, then the grid's tensors."""
        return ("codes", *self.grid_names)

    @abstractmethod
    def grid_bytes(self, shape: Sequence["int | sympy.Expr"]) -> sympy.Expr:
        """Stored bytes of the grid's tensors for a matrix of this shape."""

    def at_column(self, grid: Grid, column: int) -> Grid | None:
        """The grid of one column, as a matrix `[..., out, 1]`; None where a column cannot be rounded by itself.

        Methods that round column by column (GPTQ) ask for it, and leave an encoding that gives None to others.
        """
        return None

    def round(self, weight: Tensor, grid: Grid) -> Tensor:
        """The values of the nearest codes, rounded again until they are stable.

        The first time is enough but where floats are sparser than the grid (a large minimum, bfloat16 weights) and the
        weight was clipped: then the float nearest to a value may be nearer to the next value. Both roundings are
        monotone, so a few more steps end at a fixed point.
        """
        rounded = self.values(self.codes(weight, grid.tensors), grid.tensors, weight.dtype)
        for _ in range(_MAX_ROUNDS):
            again = self.values(self.codes(rounded, grid.tensors), grid.tensors, weight.dtype)
            if torch.equal(again, rounded):
                break
            rounded = again
        return rounded

    def encode(self, weight: Tensor, grid: Grid) -> Parts:
        """The packed codes and the grid's tensors."""
        packed = self.pack(self.codes(weight, grid.tensors))
        return {"codes": packed, **{name: grid.tensors[name] for name in self.grid_names}}

    def decode(self, parts: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Unpack the codes and look up their values."""
        return self.values(self.unpack(parts["codes"], int(shape[-1])), parts, dtype)

    def bytes(self, shape: Sequence["int | sympy.Expr"]) -> sympy.Expr:
        """Codes and grid."""
        return sympy.prod(shape[:-1]) * self.code_bytes(shape[-1]) + self.grid_bytes(shape)


def spec_text(encoding: Encoding) -> str:
    """`IntGrid(bits=4, group=32)`: the encoding's name and its options."""
    return f"{type(encoding).__name__}({options_text(encoding, encoding.shown)})"


def options_text(options: Any, shown: Collection[str] = ()) -> str:
    """The fields of a frozen dataclass, in order, but for those at their defaults: `bits=4, group=32`.

    Args:
        options: the dataclass.
        shown: fields that are written at their defaults too.
    """
    parts = []
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name in shown or value != field.default:
            parts.append(f"{field.name}={value if isinstance(value, Encoding) else repr(value)}")
    return ", ".join(parts)


def saturate(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A cast between float types that gives the greatest finite number where the plain cast would give infinity."""
    greatest = torch.finfo(dtype).max
    if greatest < torch.finfo(tensor.dtype).max:
        wide = tensor if tensor.dtype == torch.float64 else tensor.float()  # a narrower one may not hold the bound
        tensor = wide.clamp(-greatest, greatest)
    return tensor.to(dtype)
