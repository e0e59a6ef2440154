"""Unstructured sparsity: any elements are kept; a bitmap says which."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor

from sparc.encoding.base import ElementEncoding, Parts
from sparc.encoding.bits import pack_bits, packed_length, unpack_bits
from sparc.encoding.dense import Dense
from sparc.encoding.grid import Grid
from sparc.encoding.mask import MaskEncoding, check_density, keep_greatest, kept_count


@dataclass(frozen=True)
class Unstructured(MaskEncoding):
    """Any elements are kept, the others are zero.

    How many are kept is no option of the encoding: the grid's mask says it, and a pass that prunes gives its density to
    `select`.

    Parts: `codes`, the kept codes of the whole matrix in row-major order, packed by `of` as a matrix of one row; the
    tensors of `of`'s grid, for all of the matrix; `bitmap`, uint8 `[batch..., out, ceil(reduce / 8)]`, a bit per
    element, 1 where kept, packed row by row as `sparc.encoding.bits` says. With b-bit codes and density d that is
    `1 + d b` bits per dense element. The grid's `mask` is bool in the matrix's shape.

    Args:
        of: how kept elements are stored; its groups count the columns of the dense matrix.
    """

    of: ElementEncoding = Dense()

    @property
    def part_names(self) -> tuple[str, ...]:
        """The parts of `of`, then the bitmap."""
        return (*self.of.part_names, *self.mask_names)

    @property
    def mask_names(self) -> tuple[str, ...]:
        """The bitmap."""
        return ("bitmap",)

    def accepts(self, shape: Sequence[int]) -> str | None:
        """Matrices that `of` accepts."""
        return self.of.accepts(shape)

    # the mask -------------------------------------------------------------------------------------------------------
    def select(
        self, weight: Tensor, density: float, importance: Tensor | None = None, *, by_row: bool = False
    ) -> Tensor:
        """The mask that keeps the greatest `|w| * sqrt(importance)`; of equals, the first.

        Args:
            weight: `[batch..., out, reduce]`.
            density: the part of the elements to keep, 0 to 1; their number is rounded to the nearest, halves up.
            importance: the weight of a squared element, `[reduce]` or the matrix's shape.
            by_row: keep so many of each row (Wanda, Sun et al. 2023), instead of the matrix.

        Raises:
            PassError: SPARC209 when density is not between 0 and 1.
        """
        check_density(density)
        score = weight.float().abs()
        if importance is not None:
            score = score * importance.float().sqrt()
        compared = score if by_row else score.flatten()
        return keep_greatest(compared, kept_count(density, compared.shape[-1])).reshape(score.shape)

    def spread(self, mask: Tensor, shape: Sequence[int]) -> Tensor:
        """The mask itself."""
        return mask

    def fit(self, weight: Tensor, *, importance: Tensor | None = None, search: bool = False) -> Grid:
        """Keep every element that is not zero, and fit `of` to them."""
        return self.fit_masked(weight, weight != 0, importance=importance, search=search)

    # storage --------------------------------------------------------------------------------------------------------
    def encode(self, weight: Tensor, grid: Grid) -> Parts:
        """Kept codes, the inner grid's tensors, the bitmap."""
        mask = grid.tensors["mask"]
        return {
            "codes": self.keep(self.of.codes(weight, grid.tensors), mask),
            **self.inner(grid).tensors,
            "bitmap": pack_bits(mask.to(torch.uint8), 1).contiguous(),
        }

    def decode(self, parts: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Put the kept codes back in their places, look up their values, and zero the rest."""
        mask = self.mask(parts, shape)
        kept = int(mask.sum())
        stored = self.of.pack(torch.empty(1, kept, dtype=torch.uint8, device="meta"))
        if parts["codes"].shape != stored.shape:
            raise ValueError(f"the codes are not those of the {kept} elements that the bitmap keeps")
        chosen = self.of.unpack(parts["codes"], kept)
        dense = chosen.new_zeros(tuple(shape)).masked_scatter_(mask, chosen)
        return self.of.values(dense, parts, dtype).masked_fill_(~mask, 0)

    def mask(self, parts: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
        """What the bitmap says; spare bits at the end of a row say nothing."""
        bitmap = parts["bitmap"]
        if bitmap.dtype != torch.uint8 or tuple(bitmap.shape) != (*shape[:-1], packed_length(int(shape[-1]), 1)):
            raise ValueError(f"the bitmap is not that of a matrix {list(shape)}")
        return unpack_bits(bitmap, 1, int(shape[-1])).bool()

    def keep(self, codes: Tensor, mask: Tensor) -> Tensor:
        """The kept codes in row-major order, packed as a matrix of one row."""
        return self.of.pack(codes[mask].unsqueeze(0))

    def bytes(self, shape: Sequence[int | sympy.Expr], kept: int | sympy.Expr | None = None) -> sympy.Expr:
        """The stored bytes with `kept` elements kept; by default with all of them, which is the most it can be."""
        bitmap = sympy.prod(shape[:-1]) * sympy.ceiling(sympy.sympify(shape[-1]) / 8)
        codes = self.of.code_bytes(sympy.prod(shape) if kept is None else kept)
        return codes + bitmap + self.of.grid_bytes(shape)

    def bytes_on(self, grid: Grid, shape: Sequence[int | sympy.Expr]) -> sympy.Expr:
        """With as many elements as the grid's mask keeps."""
        return self.bytes(shape, int(grid.tensors["mask"].sum()))
