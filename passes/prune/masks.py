"""Choosing the mask of a matrix, and its weights: by magnitude, by Wanda's score, or in a sweep (SparseGPT)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparc.encoding.blocks import Blocks
from sparc.encoding.mask import keep_greatest, kept_count
from sparc.encoding.nm import NM
from sparc.encoding.unstructured import Unstructured
from sparc.passes.second_order.factor import Factor
from sparc.passes.second_order.gram import reconstruction_error
from sparc.passes.second_order.selection import KeepNM, KeepPart, WithDiagonal, block_coordinates
from sparc.passes.second_order.sweep import Selection, sweep

Pattern = NM | Blocks | Unstructured


@dataclass(frozen=True)
class Pruned:
    """A pruned matrix.

    Args:
        weight: `[batch..., out, reduce]`, 0 where dropped.
        mask: bool, as the pattern's `spread` takes it.
    """

    weight: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Pruning:
    """A matrix to prune.

    Args:
        matrix: `[batch..., out, reduce]`, floating.
        pattern: of the mask.
        density: the part to keep; 1 for `NM`, which says it itself.
    """

    matrix: Tensor
    pattern: Pattern
    density: float

    def by_magnitude(self) -> Pruned:
        """Keep the greatest magnitudes, or the blocks of greatest norm, of the whole matrix; n of every m."""
        return self.masked(self._select(None))

    def by_wanda(self, squares: Tensor) -> Pruned:
        """Keep the greatest `|w| * |x|`, where |x| is the norm of the input (Wanda, Sun et al. 2023).

        Elements are compared in their row, or in their m; blocks over the whole matrix.

        Args:
            squares: the mean square of the input of each element, in the matrix's shape.
        """
        return self.masked(self._select(squares, by_row=True))

    def by_mass(self, squares: Tensor) -> Pruned:
        """Drop the least scores of each row that together are a part of the row's sum; the part is that of all rows.

        (Wanda's variant, Sun et al. 2023, appendix; its code looks for the part by bisection. It is the order statistic
        of the sums up to each element, so that it is found at once and the count is exact.)

        Args:
            squares: as for `by_wanda`.
        """
        score = self.matrix.double().abs() * squares.double().sqrt()
        order = score.argsort(dim=-1, descending=True, stable=True).flip(-1)  # of equals, the last comes first
        sums = score.gather(-1, order).cumsum(-1)
        parts = torch.empty_like(sums).scatter_(-1, order, sums / sums[..., -1:]).nan_to_num()
        kept = keep_greatest(parts.flatten(), kept_count(self.density, parts.numel()))
        return self.masked(kept.reshape(parts.shape))

    def by_sweep(self, gram: Tensor, prepared: Factor, criterion: str) -> Pruned:
        """Prune column by column; what is left of a row makes up for what was pruned (SparseGPT).

        N:M is chosen when the sweep comes to each m, elements of any place in blocks of 128 columns, both by what the
        sweep has left; blocks before it.

        Args:
            gram: of the inputs, `[groups, reduce, reduce]`.
            prepared: the same, factored with the columns in order.
            criterion: `obs` or `isc`.
        """
        runs = self.runs(self.matrix, len(gram))
        if isinstance(self.pattern, Blocks):
            _, width = self.pattern.edges(self.matrix.shape)
            costs = block_coordinates(runs, gram, prepared, width, criterion).reshape(self.matrix.shape)
            return self.compensated(self.pattern.select(costs, self.density), prepared)
        selection: Selection = (
            KeepNM(self.pattern) if isinstance(self.pattern, NM) else KeepPart(self.density, runs.shape[-1])
        )
        if criterion == "isc":
            selection = WithDiagonal(selection, prepared.diagonal)
        swept = sweep(runs, prepared, select=selection)
        assert swept.kept is not None
        return Pruned(swept.weight.reshape(self.matrix.shape), swept.kept.reshape(self.matrix.shape))

    def masked(self, mask: Tensor) -> Pruned:
        """The matrix's own values where a mask keeps them."""
        return Pruned(self.matrix.masked_fill(~self.pattern.spread(mask, self.matrix.shape), 0), mask)

    def compensated(self, mask: Tensor, prepared: Factor) -> Pruned:
        """A mask's values, swept so that those which are kept make up for the others."""
        groups = len(prepared.upper)
        kept = self.runs(self.pattern.spread(mask, self.matrix.shape), groups)
        swept = sweep(self.runs(self.matrix, groups), prepared, lambda values, column: values * kept[..., column])
        return Pruned(swept.weight.reshape(self.matrix.shape), mask)

    def better(self, first: Pruned, second: Pruned, gram: Tensor, *, by_row: bool) -> Pruned:
        """The one with less squared error of the products; the first where they are equal.

        Args:
            first: one way to prune the matrix.
            second: another one.
            gram: of the inputs.
            by_row: take the better of each row, when both keep equally many of each; blocks have no rows.
        """
        changes = [self.runs(each.weight.double() - self.matrix.double(), len(gram)) for each in (first, second)]
        errors = [reconstruction_error(change, gram) for change in changes]
        if not by_row or isinstance(self.pattern, Blocks):
            return second if bool(errors[0].sum() > errors[1].sum()) else first
        worse = (errors[0] > errors[1]).reshape(*self.matrix.shape[:-1], 1)
        return Pruned(
            torch.where(worse, second.weight, first.weight),
            torch.where(worse, second.mask, first.mask),
        )

    def spread_columns(self, values: Tensor) -> Tensor:
        """`[groups, reduce]` for every element, in the matrix's shape."""
        rows = self.matrix.numel() // (values.numel() or 1)
        return values.unsqueeze(1).expand(-1, rows, -1).reshape(self.matrix.shape)

    def runs(self, matrix: Tensor, groups: int) -> Tensor:
        """The matrix as `[groups, rows, reduce]`: the rows that share a Gram matrix."""
        return matrix.reshape(groups, -1, matrix.shape[-1])

    def _select(self, importance: Tensor | None, *, by_row: bool = False) -> Tensor:
        if isinstance(self.pattern, NM):
            return self.pattern.select(self.matrix, importance)
        if isinstance(self.pattern, Blocks):
            return self.pattern.select(self.matrix, self.density, importance)
        return self.pattern.select(self.matrix, self.density, importance, by_row=by_row)
