"""The range an activation is quantized over, from a histogram of its values.

Every method gets counts in equal bins over `[low, high]`, many more than the 256 levels of the grid, and returns a
range inside it. A range always contains 0, since a grid with an integer zero point does.
"""

import torch
from torch import Tensor

LEVELS = 256
_COARSE = [0.2 + 0.05 * step for step in range(17)]
_FINE = [-0.04 + 0.01 * step for step in range(9)]
_ENTROPY_CANDIDATES = 128
_SAME = 1e-12

Range = tuple[float, float]


def percentile_range(counts: Tensor, low: float, high: float, percent: float) -> Range:
    """The range that holds `percent` of the values; what is left out is shared equally by the two sides.

    Args:
        counts: `[bins]`.
        low: lower edge of the first bin; so for the other methods.
        high: upper edge of the last bin.
        percent: 50 to 100.
    """
    edges = torch.linspace(low, high, counts.numel() + 1, dtype=torch.float64)
    cumulative = counts.double().cumsum(0) / counts.sum()
    outside = (1 - percent / 100) / 2
    first = int((cumulative <= outside + _SAME).sum())
    last = min(int((cumulative < 1 - outside - _SAME).sum()), counts.numel() - 1)
    return min(0.0, float(edges[first])), max(0.0, float(edges[last + 1]))


def mse_range(counts: Tensor, low: float, high: float) -> Range:
    """The range with the least squared error, of rounding and clipping together; a bin's values are taken at its
    centre.

    The two ends are shrunk independently of each other: in steps of 5% down to a fifth, then in steps of 1% around
    the best.
    """
    filled = counts > 0
    values, counts = bin_centres(counts, low, high)[filled], counts[filled]
    low, high = min(0.0, low), max(0.0, high)
    best = (1.0, 1.0)
    for steps in (_COARSE, _FINE):
        base = (0.0, 0.0) if steps is _COARSE else best
        lows = [min(1.0, base[0] + step) for step in steps] if low < 0 else [1.0]
        highs = [min(1.0, base[1] + step) for step in steps] if high > 0 else [1.0]
        pairs = torch.cartesian_prod(torch.tensor(lows, dtype=torch.float64), torch.tensor(highs, dtype=torch.float64))
        errors = squared_errors(counts, values, pairs[:, 0] * low, pairs[:, 1] * high)
        chosen = pairs[int(errors.argmin())]
        best = (float(chosen[0]), float(chosen[1]))
    return best[0] * low, best[1] * high


def squared_errors(counts: Tensor, values: Tensor, lows: Tensor, highs: Tensor) -> Tensor:
    """Total squared error of the 8-bit grid over each range `[candidates]`, for `counts` of `values`."""
    scale = ((highs - lows) / (LEVELS - 1)).clamp(min=1e-30)[:, None]
    zero = torch.round(-lows[:, None] / scale)
    codes = (torch.round(values / scale) + zero).clamp(0, LEVELS - 1)
    return (((codes - zero) * scale - values).square() * counts).sum(1)


def entropy_range(counts: Tensor, low: float, high: float) -> Range:
    """The range whose quantized histogram diverges least from the histogram itself (Kullback-Leibler, as in TensorRT).

    Both ends shrink in proportion. The reference is the histogram with what lies outside moved into the end bins; the
    candidate spreads what lies inside over the bins of each of 256 levels. A candidate spans at least two bins a level:
    with as many bins as levels, both would be equal and the whole range would always win.
    """
    bins = counts.numel()
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)
    centre = int(torch.searchsorted(edges, torch.tensor(0.0, dtype=torch.float64), right=True).clamp(1, bins)) - 1
    best, least = (0, bins), float("inf")
    for step in range(_ENTROPY_CANDIDATES + 1):
        keep = step / _ENTROPY_CANDIDATES
        first, last = round(centre * (1 - keep)), round(centre + (bins - centre) * keep)
        if last - first < 2 * LEVELS:
            continue
        found = divergence(counts, first, last, min(centre, bins - 1))
        if found <= least:
            best, least = (first, last), found
    return min(0.0, float(edges[best[0]])), max(0.0, float(edges[best[1]]))


def divergence(counts: Tensor, first: int, last: int, zero: int = 0) -> float:
    """Kullback-Leibler divergence (nats) of the histogram clipped to bins `[first, last)` from its 256-level form.

    Many values are often exactly 0, or exactly where an operator clips. The grid represents those exactly, so such a
    spike in the bin of zero, or in an end bin of the histogram, is levelled to its neighbours before the comparison:
    spread over a level it would look like an error that grows with the range. (TensorRT does so for the bin of zero.)

    Args:
        counts: `[bins]`.
        first: the first bin inside.
        last: the bin after the last one inside.
        zero: the bin that holds 0.
    """
    inside = counts[first:last].double().clone()
    for exact in {zero, 0, counts.numel() - 1}:
        if first <= exact < last:
            near = [float(counts[bin_]) for bin_ in (exact - 1, exact + 1) if first <= bin_ < last]
            inside[exact - first] = min(float(counts[exact]), sum(near) / len(near))
    reference = inside.clone()
    reference[0] += counts[:first].sum()
    reference[-1] += counts[last:].sum()
    level = torch.arange(last - first) * LEVELS // (last - first)
    filled = (reference > 0).double()
    sums = torch.zeros(LEVELS, dtype=torch.float64).index_add_(0, level, inside)
    members = torch.zeros(LEVELS, dtype=torch.float64).index_add_(0, level, filled)
    candidate = (sums / members.clamp(min=1))[level] * filled
    if float(candidate.sum()) <= 0:
        return float("inf")
    p, q = reference / reference.sum(), candidate / candidate.sum()
    seen = p > 0
    return float((p[seen] * (p[seen] / q[seen].clamp(min=1e-12)).log()).sum())


def bin_centres(counts: Tensor, low: float, high: float) -> Tensor:
    """The centre of each bin."""
    edges = torch.linspace(low, high, counts.numel() + 1, dtype=torch.float64)
    return (edges[1:] + edges[:-1]) / 2
