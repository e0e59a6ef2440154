"""Noise of matrix products whose inputs are quantized, as a share of the products' power."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparc.encoding.int_grid import IntGrid
from sparc.observers.base import finite

MOST_ROWS = 1024
"""Rows that noise is averaged over, at most."""


class Rows:
    """Some rows of the values of one input, and the channels' ranges in every batch.

    Args:
        batches: values `[..., channels]`; each is one tensor at run time. Infinities and NaN count as zeros.
    """

    def __init__(self, batches: Sequence[Tensor]) -> None:
        flat = [finite(batch.float()).reshape(-1, batch.shape[-1]) for batch in batches if batch.numel()]
        step = max(1, -(-sum(map(len, flat)) // MOST_ROWS))
        self.rows = [each[::step] for each in flat]
        self._ranges = [(each.amin(0), each.amax(0)) for each in flat]

    def rounded(self, spec: IntGrid, factor: Tensor) -> list[Tensor]:
        """The rows, multiplied by `factor` `[channels]` and quantized: per tensor by the range of its whole batch, or
        per row.
        """
        found = []
        for rows, (low, high) in zip(self.rows, self._ranges, strict=True):
            values = rows * factor
            if spec.group == "tensor":
                ends = [end.reshape(1, 1) for end in ((low * factor).min(), (high * factor).max())]
                found.append(spec.round(values, spec.from_range(*ends)))
            else:
                found.append(spec.round(values, spec.fit(values)))
        return found


def product_noise(
    x: Rows, matrix: Tensor, spec: IntGrid, factor: Tensor | None = None, weights: IntGrid | None = None
) -> float:
    """Mean over rows of `|y' - y|² / |y|²`, where `y = x @ matrix.T` and `y' = quantize(x * s) @ (matrix / s).T`.

    Every row counts the same: what follows normalises rows, and a scale per tensor harms small ones most.

    Args:
        x: the input.
        matrix: `[out, channels]` float32.
        spec: the grid of x.
        factor: s, `[channels]` float32; 1 by default.
        weights: the grid that `matrix / s` is rounded to; it is not rounded by default.
    """
    ones = torch.ones(matrix.shape[-1])
    moved = matrix if factor is None else matrix / factor
    if weights is not None:
        moved = weights.round(moved, weights.fit(moved))
    ratios = []
    for rows, values in zip(x.rows, x.rounded(spec, ones if factor is None else factor), strict=True):
        exact = rows @ matrix.T
        power = exact.square().sum(-1)
        ratios.append(((values @ moved.T - exact).square().sum(-1) / power)[power > 0])
    every = torch.cat(ratios) if ratios else torch.zeros(0)
    return float(every.mean()) if every.numel() else 0.0
