"""The damped Gram matrix, ordered and factored for a sweep over columns."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 0.01
_MOST_DAMPING = 1e3


@dataclass(frozen=True)
class Factor:
    """`H⁻¹ = UᵀU` for the damped Gram matrix H, in the order of the sweep.

    `U[j, j]²` is the first diagonal entry of the inverse of `H[j:, j:]`: what a squared change of column j costs less
    for, the more the columns behind it can make up.

    Args:
        order: `[reduce]` int64: the column that each step treats.
        upper: `U`, `[groups, reduce, reduce]` float32, upper triangular.
        diagonal: of H in the same order, `[groups, reduce]` float32.
        ridge: what H has on its diagonal that the Gram matrix has not, `[groups]` float32.
    """

    order: Tensor
    upper: Tensor
    diagonal: Tensor
    ridge: Tensor


def factor(gram: Tensor, damping: float = DAMPING, *, descending: bool = False, unit: int = 1) -> Factor:
    """Damp, order and factor a Gram matrix: `H = G + λI`, where λ is `damping` times the mean of G's diagonal.

    (SparseGPT, Frantar and Alistarh 2023, section 3; GPTQ, Frantar et al. 2022, section 3.) A matrix that cannot be
    factored is damped ten times as much, again and again. A column that met only zeros costs no more than λ.

    Args:
        gram: `[groups, reduce, reduce]`, positive semidefinite.
        damping: not negative.
        descending: treat columns of great diagonal first (GPTQ's activation order), by the mean over groups.
        unit: so many consecutive columns stay together.
    """
    wide = gram.double()
    diagonal = wide.diagonal(dim1=-2, dim2=-1)
    order = torch.arange(gram.shape[-1])
    if descending:
        each = diagonal.mean(0)
        padded = torch.nn.functional.pad(each, (0, -len(each) % unit))
        units = padded.unflatten(0, (-1, unit)).mean(-1).argsort(descending=True, stable=True)
        order = (units[:, None] * unit + torch.arange(unit)).flatten()
        order = order[order < len(each)]
    damped = wide[:, order][:, :, order]
    mean = diagonal.mean(-1)
    mean = torch.where((mean > 0) & mean.isfinite(), mean, 1.0)
    while True:
        ridge = damping * mean
        trial = damped + ridge[:, None, None] * torch.eye(damped.shape[-1], dtype=torch.float64)
        upper = _upper(trial)
        if upper is not None or damping > _MOST_DAMPING:
            break
        damping = 10 * max(damping, DAMPING / 100)
    if upper is None:
        raise ArithmeticError("the Gram matrix of its input is not finite")
    return Factor(order, upper.float(), trial.diagonal(dim1=-2, dim2=-1).float(), ridge.float())


def _upper(matrix: Tensor) -> Tensor | None:
    """Upper triangular U with `matrix⁻¹ = UᵀU`: `matrix = R Rᵀ` with upper R gives `U = R⁻¹`."""
    lower, failed = torch.linalg.cholesky_ex(matrix.flip(-2, -1))
    if bool(failed.any()) or not math.isfinite(float(lower.sum())):
        return None
    root = lower.flip(-2, -1)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype).expand_as(matrix)
    return torch.linalg.solve_triangular(root, identity, upper=True)
