"""What a sweep over columns keeps, and which criterion says what pruning an element costs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparc.encoding.mask import keep_greatest, kept_count
from sparc.encoding.nm import NM
from sparc.passes.second_order.factor import Factor
from sparc.passes.second_order.sweep import BLOCK, Selection


@dataclass(frozen=True)
class KeepNM:
    """Keeps the n of every m columns whose pruning would cost most: `w² / U[j, j]²`; of equals, the first."""

    pattern: NM

    @property
    def span(self) -> int:
        """m."""
        return self.pattern.m

    def __call__(self, values: Tensor, roots: Tensor, columns: Tensor) -> Tensor:
        """As `Selection` says."""
        return self.pattern.select((values / roots).transpose(-1, -2)).transpose(-1, -2)


@dataclass(frozen=True)
class KeepPart:
    """Keeps a part of each block of columns, over all rows: what costs most to prune, `w² / U[j, j]²`.

    (SparseGPT, Frantar and Alistarh 2023, section 3.3.) The counts of all blocks, and of all groups, add up to that of
    the whole. The sweep has to go through the columns in order.

    Args:
        density: the part.
        reduce: how many columns there are.
    """

    density: float
    reduce: int

    @property
    def span(self) -> int:
        """A block of the sweep."""
        return BLOCK

    def __call__(self, values: Tensor, roots: Tensor, columns: Tensor) -> Tensor:
        """As `Selection` says."""
        first, rows = int(columns[0]), values.shape[-1]
        kept = []
        for group, scores in enumerate((values / roots).abs().flatten(1)):
            places = (group * self.reduce + column for column in (first, first + len(columns)))
            before, after = (kept_count(self.density, rows * place) for place in places)
            kept.append(keep_greatest(scores, after - before))
        return torch.stack(kept).reshape(values.shape)


@dataclass(frozen=True)
class WithDiagonal:
    """A selection by ISC instead of OBS: `w² (H[j, j] + 1 / U[j, j]²)`, the sum of OBD's and OBS's criteria.

    (Shao et al. 2024, "One-Shot Sensitivity-Aware Mixed Sparsity Pruning", equation for ISC. The code published with it
    takes `1 / U[j, j]` without the square, whose unit is not that of the other term; the paper's formula is used.)

    Args:
        selection: chooses by `w² / root²`.
        diagonal: of H, `[groups, reduce]`.
    """

    selection: Selection
    diagonal: Tensor

    @property
    def span(self) -> int:
        """That of the selection."""
        return self.selection.span

    def __call__(self, values: Tensor, roots: Tensor, columns: Tensor) -> Tensor:
        """As `Selection` says: the root that makes OBS's criterion ISC."""
        both = self.diagonal[:, columns, None] + roots.square().reciprocal()
        return self.selection(values, both.rsqrt(), columns)


def block_coordinates(runs: Tensor, gram: Tensor, factor: Factor, width: int, criterion: str) -> Tensor:
    """The matrix in coordinates where the squared norm of any block of `width` columns is what pruning it costs.

    `obs`: `w_B ([H⁻¹]_BB)⁻¹ w_Bᵀ` for each row, when the columns outside of B make up for it (Hassibi and Stork 1993,
    for several weights at once). `isc`: `w_B H_BB w_Bᵀ` more. Since `H_BB - ([H⁻¹]_BB)⁻¹` is positive semidefinite, ISC
    lies between once and twice the cost without compensation.

    Args:
        runs: `[groups, rows, reduce]`.
        gram: `[groups, reduce, reduce]`.
        factor: of H, the damped Gram matrix, with the columns in order.
        width: of a block; the last one may be narrower.
        criterion: `obs` or `isc`.

    Returns:
        `[groups, rows, reduce]` float64: `w_B L` for each B, where L Lᵀ is the matrix between `w_B` and `w_Bᵀ`.
    """
    upper, found = factor.upper.double(), []
    for start in range(0, runs.shape[-1], width):
        stop = min(start + width, runs.shape[-1])
        root = upper[:, :stop, start:stop]
        costs = torch.linalg.inv(root.transpose(-1, -2) @ root)
        if criterion == "isc":
            damped = gram[:, start:stop, start:stop].double().clone()
            damped.diagonal(dim1=-2, dim2=-1).copy_(factor.diagonal[:, start:stop])
            costs = costs + damped
        lower = torch.linalg.cholesky((costs + costs.transpose(-1, -2)) / 2)
        found.append(runs[..., start:stop].double() @ lower)
    return torch.cat(found, -1)
