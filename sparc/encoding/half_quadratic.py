"""Looking for the minima of integer grids that give the least `sum |w - w'|^p`, p < 1, without data.

A few outliers may then be far off, if most weights are near. (HQQ, Badri and Shaji, "Half-Quadratic Quantization of
Large Machine Learning Models", 2023.)

With a scale that stays, an auxiliary matrix takes up what outliers miss, and two steps alternate:

    e = w - w';  outlier = sign(e) * max(0, |e| - |e|^(p-1) / beta)
    minimum = mean over the group of (w - outlier) - code * scale;  beta = beta * kappa

(A floating zero point z, as the source has it, is the minimum `-z * scale`.) Errors are counted in steps of the grid,
so that the result does not depend on the unit of the weights; the released code counts them in that unit, where for
weights of usual size (errors below 0.1) no outlier is ever taken up.
"""

import torch
from torch import Tensor

from sparc.encoding.base import Encoding, saturate
from sparc.encoding.grid import Grid
from sparc.encoding.groups import column, grouped
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.mask import MaskEncoding

EXPONENT = 0.7
_BETA = 10.0
_KAPPA = 1.01
_ROUNDS = 20


def why_no_minimum(encoding: Encoding) -> str:
    """Why an encoding, or what a mask holds, has no minimum to look for; empty when it has one."""
    inner = encoding.of if isinstance(encoding, MaskEncoding) else encoding
    if isinstance(inner, IntGrid) and inner.zero == "minimum":
        return ""
    # an integer zero point would have to move by a whole step: the means below stay within half of one
    return f"{inner} has no floating minimum"


def half_quadratic(weight: Tensor, grid: Grid, exponent: float = EXPONENT) -> Grid:
    """The grid with the minima of least error that were found, the best of each group.

    The first candidate is the grid itself, so the result is worse in no group.

    Args:
        weight: `[batch..., out, reduce]`, floating.
        grid: of an `IntGrid` with a minimum, or of a mask around one: what it drops does not count. Scales stay.
        exponent: p.
    """
    if isinstance(grid.spec, MaskEncoding):
        kept = grid.spec.spread(grid.tensors["mask"], weight.shape)
        inner = _search(weight.masked_fill(~kept, 0), grid.spec.inner(grid), kept, exponent)
        return Grid(grid.spec, {**grid.tensors, **inner.tensors}, grid.view)
    return _search(weight, grid, torch.ones_like(weight, dtype=torch.bool), exponent)


def _search(weight: Tensor, grid: Grid, kept: Tensor, exponent: float) -> Grid:
    spec = grid.spec
    assert isinstance(spec, IntGrid)
    values, counted = grouped(weight.float(), spec.group), grouped(kept.float(), spec.group, fill="zero")
    count = counted.sum(-1).clamp(min=1)
    scale = column(grid.tensors["scale"])
    best = minimum = grid.tensors["minimum"]
    least = torch.full(minimum.shape, torch.inf)
    beta = _BETA
    for _ in range(_ROUNDS + 1):
        codes = ((values - column(minimum)) / scale).round_().clamp_(spec.low, spec.high)
        found = saturate(codes * scale + column(minimum), weight.dtype).float()
        errors = (values - found) / scale
        size = errors.abs()
        total = (size**exponent * counted).sum(-1)
        best, least = torch.where(total < least, minimum, best), torch.minimum(total, least)
        threshold = torch.where(size > 0, size, 1) ** (exponent - 1) / beta
        outliers = errors.sign() * (size - threshold).clamp_(min=0)
        means = ((values / scale - outliers - codes) * counted).sum(-1) / count
        minimum = spec.stored_minimum(means * scale.squeeze(-1))
        beta *= _KAPPA
    return Grid(spec, {**grid.tensors, "minimum": best}, grid.view)
