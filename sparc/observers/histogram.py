"""Histograms whose bins do not depend on the order of what is counted."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparc.observers.base import Observer, extremes

_BINS = 4096
_COUNTED = 2**18
_LEAST_EXPONENT = -1000
_PRECISION = 30  # bits of the greatest magnitude that the narrowest bins tell apart


class Counts(NamedTuple):
    """A histogram.

    Args:
        counts: `[bins]` float64, of at most 4096 equal bins.
        low: lower edge of the first bin, which holds the least value.
        high: upper edge of the last bin, which holds the greatest.
        least: the least value seen.
        greatest: the greatest value seen.
    """

    counts: Tensor
    low: float
    high: float
    least: float
    greatest: float


class Histogram(Observer):
    """`histogram`: `Counts` of equal bins over the range seen so far.

    Bins are `2^k` wide and begin at multiples of it, where k is the least for which the bins cover the range: wider
    bins are unions of narrower ones, and the same values give the same counts in any order. The extremes are those of
    all values; of a batch of more than 2^18 values, only evenly spaced ones are counted.
    """

    counts: Tensor | None = None
    least, greatest = math.inf, -math.inf
    first, exponent = 0, 0

    def _add(self, value: Tensor, batch: int) -> None:
        """Count one batch."""
        low, high, value = extremes(value)
        self._cover(low, high)
        assert self.counts is not None
        spaced = value.flatten()[:: 2 * (value.numel() // (2 * _COUNTED)) + 1].double()
        places = torch.floor(spaced * 2.0**-self.exponent).to(torch.int64) - self.first
        self.counts += torch.bincount(places, minlength=_BINS).double()

    def _cover(self, low: float, high: float) -> None:
        """Widen the range, and the bins as far as they must be."""
        self.least, self.greatest = min(self.least, low), max(self.greatest, high)
        old, first, exponent = self.counts, self.first, self.exponent
        self.first, self.exponent = _bins_over(self.least, self.greatest)
        self.counts = torch.zeros(_BINS, dtype=torch.float64)
        if old is not None:
            self._count(old, first, exponent)

    def _count(self, counts: Tensor, first: int, exponent: int) -> None:
        """Add counts of bins that are no wider."""
        assert self.counts is not None
        filled = counts.nonzero().flatten()
        places = ((filled + first) >> (self.exponent - exponent)) - self.first
        self.counts.index_add_(0, places, counts[filled])

    def result(self) -> Counts:
        """The counts."""
        assert self.counts is not None
        behind = math.floor(math.ldexp(self.greatest, -self.exponent)) + 1
        low, high = (math.ldexp(place, self.exponent) for place in (self.first, behind))
        return Counts(self.counts[: behind - self.first], low, high, self.least, self.greatest)

    def state(self) -> list[Tensor]:
        """Counts, where they begin, extremes."""
        assert self.counts is not None
        bins = torch.tensor([self.first, self.exponent])
        return [self.counts, bins, torch.tensor([self.least, self.greatest], dtype=torch.float64)]

    def absorb(self, state: Sequence[Tensor]) -> None:
        """Add, once both are in bins of one width."""
        self.seen = True
        counts, bins, ends = state
        self._cover(*ends.tolist())
        self._count(counts, *bins.tolist())


def _bins_over(low: float, high: float) -> tuple[int, int]:
    """The first bin and the exponent of the narrowest bins that cover a range."""
    exponent = max(math.frexp(max(abs(low), abs(high)))[1] - _PRECISION, _LEAST_EXPONENT)

    def place(value: float) -> int:
        return math.floor(math.ldexp(value, -exponent))

    while place(high) - place(low) >= _BINS:
        exponent += 1
    return place(low), exponent
