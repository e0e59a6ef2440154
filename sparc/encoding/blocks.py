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
from sparc.encoding.mask import MaskEncoding


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
        size: rows and columns of a block.
        of: how kept elements are stored; its groups count the columns of the dense matrix.
    """

    shown = ("size",)

    size: tuple[int, int] = (64, 64)
    of: ElementEncoding = Dense()

    def __post_init__(self) -> None:
        size = self.size
        if (
            not isinstance(size, (tuple, list))
            or len(size) != 2
            or any(type(edge) is not int or edge < 1 for edge in size)
        ):
            raise PassError(
                diagnostic_codes.BAD_OPTION,
                f"Blocks has no size {size!r}",
                hint="two positive numbers: (rows, columns)",
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
        if len(shape) >= 2 and (shape[-2] < self.size[0] or shape[-1] < self.size[1]):
            return f"its {shape[-2]} rows and {shape[-1]} columns are fewer than a block's, {self.size}"
        return self.of.accepts(shape)

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
        if not 0 <= density <= 1 or norm not in ("frobenius", "l1"):
            raise PassError(
                diagnostic_codes.BAD_OPTION, f"blocks cannot be selected with density={density!r}, norm={norm!r}"
            )
        score = weight.float().abs()
        if importance is not None:
            score = score * importance.float().sqrt()
        blocks = self._blocks(score).flatten(-2)
        norms = torch.linalg.vector_norm(blocks, ord=2 if norm == "frobenius" else 1, dim=-1, dtype=torch.float64)
        order = norms.flatten().argsort(descending=True, stable=True)
        mask = torch.zeros(order.shape, dtype=torch.bool, device=weight.device)
        mask[order[: int(density * order.numel() + 0.5)]] = True
        return mask.reshape(norms.shape)

    def spread(self, mask: Tensor, shape: Sequence[int]) -> Tensor:
        """Each block's entry for all of its elements."""
        rows = mask.repeat_interleave(self.size[0], dim=-2)[..., : shape[-2], :]
        return rows.repeat_interleave(self.size[1], dim=-1)[..., : shape[-1]]

    def fit(self, weight: Tensor, *, importance: Tensor | None = None, search: bool = False) -> Grid:
        """Keep every block that is not all zero, and fit `of` to them."""
        mask = (self._blocks(weight) != 0).flatten(-2).any(-1)
        return self.fit_masked(weight, mask, importance=importance, search=search)

    # storage --------------------------------------------------------------------------------------------------------
    def _blocks(self, matrix: Tensor) -> Tensor:
        """`[..., out, reduce]` as `[..., block rows, block columns, rows, columns]`, filled up with zeros."""
        rows, columns = self.size
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
        mask = self.mask(parts, shape)
        blocks = self.of.unpack(parts["codes"], self.size[1])
        dense = blocks.new_zeros(*mask.shape, *self.size)
        dense[mask] = blocks
        dense = dense.transpose(-3, -2).flatten(-2).flatten(-3, -2)[..., : shape[-2], : shape[-1]].contiguous()
        return self.of.values(dense, parts, dtype).masked_fill_(~self.spread(mask, shape), 0)

    def keep(self, codes: Tensor, mask: Tensor) -> Tensor:
        """The kept blocks in row-major order, each row packed."""
        return self.of.pack(self._blocks(codes)[mask])

    def mask(self, parts: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
        """What the block list says."""
        rows, columns = -(-shape[-2] // self.size[0]), -(-shape[-1] // self.size[1])
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
        rows = sympy.prod(shape[:-2]) * sympy.ceiling(sympy.sympify(shape[-2]) / self.size[0])
        if kept is None:
            kept = rows * sympy.ceiling(sympy.sympify(shape[-1]) / self.size[1])
        block = self.size[0] * self.of.code_bytes(self.size[1]) + 4
        return kept * block + 4 * (rows + 1) + self.of.grid_bytes(shape)

    def bytes_on(self, grid: Grid, shape: Sequence[int | sympy.Expr]) -> sympy.Expr:
        """With as many blocks as the grid's mask keeps."""
        return self.bytes(shape, int(grid.tensors["mask"].sum()))
