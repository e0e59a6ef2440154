"""Coordinate descent: columns that a sweep has rounded are rounded again, each to what is best given all the others.

A sweep decides about a column before it knows how those behind it will be rounded; this takes decisions back.
"""

import torch
from torch import Tensor

from sparc.passes.second_order.factor import Factor
from sparc.passes.second_order.sweep import BLOCK, Column

ROUNDS = 4  # twelve did no better on what MiniLM had not seen


def descended(rounded: Tensor, wanted: Tensor, gram: Tensor, factor: Factor, column: Column) -> Tensor:
    """`w'_j = round(w'_j - (D H)_j / H_jj)` for `D = W' - W`, column after column, some times over.

    Of `tr(D H Dᵀ)` as a function of one column that is the least value on the grid, so it never grows (QuantEase,
    Behdin et al. 2023, algorithm 1).

    Args:
        rounded: W', where it starts, `[groups, rows, reduce]`, on the grid.
        wanted: W, the same shape.
        gram: of the inputs, `[groups, reduce, reduce]`.
        factor: of `gram`; says the order and what is on H's diagonal besides.
        column: rounds a column.

    Returns:
        In the dtype of `rounded`; computed in float32.
    """
    order = factor.order
    values = rounded.float().transpose(-1, -2)[:, order].contiguous()  # columns first: each is contiguous
    change = values - wanted.float().transpose(-1, -2)[:, order]
    damped = gram.float()[:, order][:, :, order]
    damped.diagonal(dim1=-2, dim2=-1).copy_(factor.diagonal)
    for _ in range(ROUNDS):
        before = values.clone()
        for start in range(0, len(order), BLOCK):
            run = slice(start, start + BLOCK)
            slopes = damped[:, run] @ change
            change[:, run] += _block(values[:, run], slopes, damped[:, run, run], column, order[run].tolist())
        if torch.equal(values, before):
            break
    return values[:, torch.argsort(order)].transpose(-1, -2).to(rounded.dtype).contiguous()


def _block(values: Tensor, slopes: Tensor, damped: Tensor, column: Column, numbers: list[int]) -> Tensor:
    """Round `[groups, columns, rows]` once more in place; returns the steps.

    Args:
        values: the columns.
        slopes: `D H` for them, is edited.
        damped: H among them.
        column: rounds a column.
        numbers: the columns' numbers in the matrix.
    """
    steps = torch.zeros_like(values)
    for place, number in enumerate(numbers):
        old = values[:, place].clone()
        values[:, place] = column(old - slopes[:, place] / damped[:, place, place, None], number)
        steps[:, place] = values[:, place] - old
        slopes[:, place + 1 :] += damped[:, place, place + 1 :, None] * steps[:, place, None]
    return steps
