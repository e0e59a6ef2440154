"""The best matrix of low rank, for its own sake or for its products with what it will meet."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparc.passes.second_order.factor import Factor


@dataclass(frozen=True)
class Decomposition:
    """`W = U diag(singular) V` for each group, where the rows of V are orthonormal in the measure that was given.

    Args:
        left: `[groups, rows, n]` float64.
        singular: `[groups, n]` float64, not increasing.
        right: `[groups, n, reduce]` float64.
    """

    left: Tensor
    singular: Tensor
    right: Tensor

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """`(B, A)`, `[groups, rows, rank]` and `[groups, rank, reduce]`: `B A` is the nearest matrix of that rank.

        Both take the root of the singular values, so that they are about equally large.
        """
        half = self.singular[:, :rank].sqrt()
        return self.left[..., :rank] * half.unsqueeze(-2), half.unsqueeze(-1) * self.right[:, :rank]

    def rank_for(self, energy: float) -> int:
        """The least rank that keeps a share of the sum of squares, over all groups together."""
        squares = self.singular.square().sum(0)
        enough = squares.cumsum(0) >= energy * squares.sum() * (1 - 1e-12)
        return int(enough.to(torch.int8).argmax()) + 1


def decompose(matrix: Tensor, measure: Factor | None = None) -> Decomposition:
    """The singular value decomposition: truncated, it has the least squared error of all matrices of its rank (Eckart
    and Young 1936), or the least `tr(D H Dᵀ)`.

    With `H = L Lᵀ`, the error D costs `|D L|²`: so `W L` is decomposed, and its right factor multiplied with `L⁻¹`
    (SVD-LLM, Wang et al. 2024, section 3.1).

    Args:
        matrix: `[groups, rows, reduce]`, floating.
        measure: factors the damped Gram matrix H of the inputs, in the columns' own order; by default the identity.
    """
    wide = matrix.double()
    if measure is None:
        return Decomposition(*torch.linalg.svd(wide, full_matrices=False))
    inverse = measure.upper.double()  # H⁻¹ = UᵀU, so that L = U⁻¹
    weighed = torch.linalg.solve_triangular(inverse, wide, upper=True, left=False)
    left, singular, right = torch.linalg.svd(weighed, full_matrices=False)
    return Decomposition(left, singular, right @ inverse)
