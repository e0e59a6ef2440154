"""Block sparsity: whole blocks of the matrix are kept or zero."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import sympy
import torch
from torch import Tensor

from sparc import codes as diagnostic_codes
from sparc.diag import PassError
from sparc.encoding.base import ElementEncoding, Parts
from sparc.encoding.dense import Dense
from sparc.encoding.grid import Grid
from sparc.encoding.mask import MaskEncoding, check_density, kept_count

Edge = int | Literal["all"]


@dataclass(frozen=True)
class Blocks(MaskEncoding):
    """Blocks of `size` rows and columns, each kept or zero.

    How many are kept is no option of the encoding: the grid's mask says it, and a pass that prunes gives its density to
    `select`.

    Parts, in block compressed sparse row form: `codes` `[kept, rows, packed columns]`, the kept blocks in row-major
    order, each row packed by `of`, blocks at a ragged edge filled up with code 0; the tensors of `of`'s grid, for all
    of the matrix; `pointers`, int32 `[block rows + 1]`, where each block row's blocks begin (the block rows of a batch
    follow one another); `indices`, int32 `[kept]`, the block column of each. The grid's `mask` is bool `[batch...,
    block rows, block columns]`.

    Args:
        size: rows and columns of a block; `"all"` is as many as the matrix has, so that `(1, "all")` keeps whole rows
            (outputs) and `("all", 1)` whole columns (inputs).
        of: how kept elements are stored; its groups count the columns of the dense matrix.
    """

    shown = ("size",)

    size: tuple[Edge, Edge] = (64, 64)
    of: ElementEncoding = Dense()

    def __post_init__(self) -> None:
        size = self.size
        if (
            not isinstance(size, (tuple, list))
            or len(size) != 2
            or not all(edge == "all" or (type(edge) is int and edge >= 1) for edge in size)
        ):
            raise PassError(
                diagnostic_codes.BAD_OPTION,
                f"Blocks has no size {size!r}",
                hint='(rows, columns), each a positive number or "all"',
            )
        object.__setattr__(self, "size", tuple(size))
        super().__post_init__()

    @property
    def part_names(self) -> tuple[str, ...]:
        """The parts of `of`, then the block list."""
        return (*self.of.part_names, *self.mask_names)

    @property
    def mask_names(self) -> tuple[str, ...]:
        """The block list."""
        return ("pointers", "indices")

    def accepts(self, shape: Sequence[int]) -> str | None:
        """Matrices that `of` accepts and that are no smaller than a block in either direction."""
        if len(shape) >= 2:
            rows, columns = self.edges(shape)
            if shape[-2] < rows or shape[-1] < columns:
                return f"its {shape[-2]} rows and {shape[-1]} columns are fewer than a block's, {self.size}"
        return self.of.accepts(shape)

    def edges(self, shape: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of a block of a matrix of this shape."""
        rows, columns = self.size
        return int(shape[-2]) if rows == "all" else rows, int(shape[-1]) if columns == "all" else columns

    # the mask -------------------------------------------------------------------------------------------------------
    def select(
        self,
        weight: Tensor,
        density: float,
        importance: Tensor | None = None,
        norm: Literal["frobenius", "l1"] = "frobenius",
    ) -> Tensor:
        """The mask that keeps the blocks of greatest norm over the whole matrix; of equals, the first.

        Args:
            weight: `[batch..., out, reduce]`.
            density: the part of the blocks to keep, 0 to 1; their number is rounded to the nearest, halves up.
            importance: the weight of a squared element, `[reduce]` or the matrix's shape.
            norm: sum of squares (`importance * w²`) or of magnitudes (`sqrt(importance) * |w|`), in float64. The blocks
                of a ragged edge are not scaled up: they cost as much as the others and hold less.

        Raises:
            PassError: SPARC209 when density is not between 0 and 1, or for an unknown norm.
        """
        check_density(density)
        if norm not in ("frobenius", "l1"):
            raise PassError(diagnostic_codes.BAD_OPTION, f"blocks cannot be selected with norm={norm!r}")
        score = weight.float().abs()
        if importance is not None:
            score = score * importance.float().sqrt()
        blocks = self._blocks(score).flatten(-2)
        norms = torch.linalg.vector_norm(blocks, ord=2 if norm == "frobenius" else 1, dim=-1, dtype=torch.float64)
        order = norms.flatten().argsort(descending=True, stable=True)
        mask = torch.zeros(order.shape, dtype=torch.bool, device=weight.device)
        mask[order[: kept_count(density, order.numel())]] = True
        return mask.reshape(norms.shape)

    def spread(self, mask: Tensor, shape: Sequence[int]) -> Tensor:
        """Each block's entry for all of its elements."""
        height, width = self.edges(shape)
        rows = mask.repeat_interleave(height, dim=-2)[..., : shape[-2], :]
        return rows.repeat_interleave(width, dim=-1)[..., : shape[-1]]

    def fit(self, weight: Tensor, *, importance: Tensor | None = None, search: bool = False) -> Grid:
        """Keep every block that is not all zero, and fit `of` to them."""
        mask = (self._blocks(weight) != 0).flatten(-2).any(-1)
        return self.fit_masked(weight, mask, importance=importance, search=search)

    # storage --------------------------------------------------------------------------------------------------------
    def _blocks(self, matrix: Tensor) -> Tensor:
        """`[..., out, reduce]` as `[..., block rows, block columns, rows, columns]`, filled up with zeros."""
        rows, columns = self.edges(matrix.shape)
        below, right = -matrix.shape[-2] % rows, -matrix.shape[-1] % columns
        if below or right:
            matrix = torch.nn.functional.pad(matrix, (0, right, 0, below))
        return matrix.unflatten(-2, (-1, rows)).unflatten(-1, (-1, columns)).transpose(-3, -2)

    def encode(self, weight: Tensor, grid: Grid) -> Parts:
        """Kept codes, the inner grid's tensors, the block list."""
        mask = grid.tensors["mask"]
        counts = mask.sum(-1).flatten()
        return {
            "codes": self.keep(self.of.codes(weight, grid.tensors), mask),
            **self.inner(grid).tensors,
            "pointers": torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32),
            "indices": mask.nonzero()[:, -1].to(torch.int32),
        }

    def decode(self, parts: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Put the kept blocks back in their places, look up their values, and zero the rest."""
        mask, edges = self.mask(parts, shape), self.edges(shape)
        blocks = self.of.unpack(parts["codes"], edges[1])
        dense = blocks.new_zeros(*mask.shape, *edges)
        dense[mask] = blocks
        dense = dense.transpose(-3, -2).flatten(-2).flatten(-3, -2)[..., : shape[-2], : shape[-1]].contiguous()
        return self.of.values(dense, parts, dtype).masked_fill_(~self.spread(mask, shape), 0)

    def keep(self, codes: Tensor, mask: Tensor) -> Tensor:
        """The kept blocks in row-major order, each row packed."""
        return self.of.pack(self._blocks(codes)[mask])

    def mask(self, parts: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
        """What the block list says."""
        height, width = self.edges(shape)
        rows, columns = -(-shape[-2] // height), -(-shape[-1] // width)
        pointers = parts["pointers"].to(torch.int64)
        counts = pointers.diff()
        if bool((counts < 0).any()) or int(counts.sum()) != parts["indices"].numel():
            raise ValueError("the pointers are not those of the indices")
        mask = torch.zeros(pointers.numel() - 1, columns, dtype=torch.bool, device=pointers.device)
        row = torch.arange(len(mask), device=pointers.device).repeat_interleave(counts)
        mask[row, parts["indices"].to(torch.int64)] = True
        return mask.reshape(*shape[:-2], rows, columns)

    def bytes(self, shape: Sequence[int | sympy.Expr], kept: int | sympy.Expr | None = None) -> sympy.Expr:
        """The stored bytes with `kept` blocks kept; by default with all of them, which is the most it can be."""
        out, reduce = map(sympy.sympify, shape[-2:])
        height = out if self.size[0] == "all" else self.size[0]
        width = reduce if self.size[1] == "all" else self.size[1]
        rows = sympy.prod(shape[:-2]) * sympy.ceiling(out / height)
        if kept is None:
            kept = rows * sympy.ceiling(reduce / width)
        block = height * self.of.code_bytes(width) + 4
        return kept * block + 4 * (rows + 1) + self.of.grid_bytes(shape)

    def bytes_on(self, grid: Grid, shape: Sequence[int | sympy.Expr]) -> sympy.Expr:
        """With as many blocks as the grid's mask keeps."""
        return self.bytes(shape, int(grid.tensors["mask"].sum()))
