"""One sweep over the columns of a matrix: each is pruned, rounded, or both, and what remains makes up for the change.

(SparseGPT, Frantar and Alistarh 2023, algorithm 1, and GPTQ, Frantar et al. 2022, algorithm 1: the same sweep, once
with zeros and once with the nearest grid values.)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sparc.passes.second_order.factor import Factor

BLOCK = 128

Column = Callable[[Tensor, int], Tensor]
"""What to make of a column: current values `[groups, rows]` and its number => the values it gets."""


class Selection(Protocol):
    """Chooses what is pruned while the sweep goes on, a run of columns at a time."""

    @property
    def span(self) -> int:
        """How many columns of the sweep's order are chosen together."""
        ...

    def __call__(self, values: Tensor, roots: Tensor, columns: Tensor) -> Tensor:
        """Choose among `span` columns, or fewer at the end.

        Args:
            values: as the sweep has left them, `[groups, columns, rows]`.
            roots: `U[j, j]` of each, `[groups, columns, 1]`.
            columns: their numbers in the matrix, int64.

        Returns:
            Bool in the shape of `values`, True where kept.
        """
        ...


@dataclass(frozen=True)
class Swept:
    """What a sweep made.

    Args:
        weight: `[groups, rows, reduce]`, in the dtype of the original.
        kept: bool of the same shape, True where a selection kept; None without one.
        cost: the sum of the squared errors of all steps, which is `tr(D H Dᵀ)` for the damped H and D = W' - W.
    """

    weight: Tensor
    kept: Tensor | None
    cost: float


def sweep(weight: Tensor, factor: Factor, column: Column | None = None, select: Selection | None = None) -> Swept:
    """`W' = argmin tr((W' - W) H (W' - W)ᵀ)`, greedily, a column at a time.

    `e = (w_j - q_j) / U[j, j]`, and every later column k becomes `w_k - e U[j, k]`.

    Args:
        weight: `[groups, rows, reduce]`, floating.
        factor: of the inputs' Gram matrix.
        column: rounds a column; by default it stays as it is.
        select: what is pruned; by default nothing.

    Returns:
        Weight, mask and cost; computed in float32.
    """
    rest = weight.float().transpose(-1, -2)[:, factor.order].contiguous()  # columns first: each is contiguous
    kept = torch.ones_like(rest, dtype=torch.bool) if select is not None else None
    cost = 0.0
    length = BLOCK if select is None else max(1, BLOCK // select.span) * select.span
    for start in range(0, rest.shape[1], length):
        stop = min(start + length, rest.shape[1])
        block, upper = rest[:, start:stop], factor.upper[:, start:stop, start:stop]
        mask = kept[:, start:stop] if kept is not None else None
        errors = _block(block, upper, factor.order[start:stop], column, select, mask)
        cost += float(errors.double().square().sum())
        rest[:, stop:] -= factor.upper[:, start:stop, stop:].transpose(-1, -2) @ errors
    back = torch.argsort(factor.order)
    changed = rest[:, back].transpose(-1, -2).to(weight.dtype).contiguous()
    return Swept(changed, kept[:, back].transpose(-1, -2).contiguous() if kept is not None else None, cost)


def _block(
    block: Tensor,
    upper: Tensor,
    columns: Tensor,
    column: Column | None,
    select: Selection | None,
    kept: Tensor | None,
) -> Tensor:
    """Sweep `[groups, columns, rows]` in place; the errors, which later columns are changed by."""
    errors = torch.zeros_like(block)
    for place, number in enumerate(columns.tolist()):
        if select is not None and kept is not None and place % select.span == 0:
            run = slice(place, place + select.span)
            roots = upper[:, run, run].diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
            kept[:, run] = select(block[:, run], roots, columns[run])
        old = block[:, place].clone()
        new = old if kept is None else old * kept[:, place]
        if column is not None:
            new = column(new, number)
            new = new if kept is None else new * kept[:, place]
        errors[:, place] = (old - new) / upper[:, place, place, None]
        block[:, place + 1 :] -= upper[:, place, place + 1 :, None] * errors[:, place, None]
        block[:, place] = new
    return errors
