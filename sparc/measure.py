"""Latency, honestly: paired and interleaved, medians with a 95% interval, warmed up."""

import math
import time
from collections.abc import Callable

from sparc.ledger import Ratio

Thunk = Callable[[], object]


def seconds(thunk: Thunk) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    thunk()
    return time.perf_counter() - started


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """The median and a 95% interval for it, from order statistics (no distribution assumed).

    The interval's ranks are `n/2 ± 1.96 sqrt(n)/2`; below 6 values it is the whole range.
    """
    ordered = sorted(values)
    count = len(ordered)
    half = 1.96 * math.sqrt(count) / 2
    low, high = max(0, math.floor(count / 2 - half)), min(count - 1, math.ceil(count / 2 + half))
    middle = ordered[count // 2] if count % 2 else (ordered[count // 2 - 1] + ordered[count // 2]) / 2
    return middle, ordered[low], ordered[high]


def paired_ratio(
    thunk: Thunk, other: Thunk, against: str, *, pairs: int = 30, budget: float = 10.0, warmup: int = 2
) -> Ratio:
    """The ratio of two callables' times, `thunk / other`, from interleaved pairs whose order alternates.

    Args:
        thunk: what is measured.
        other: what it is measured against.
        against: the other's name.
        pairs: how many pairs at most.
        budget: stop after so many seconds, with at least 5 pairs.
        warmup: calls of each that do not count.
    """
    for _ in range(warmup):
        thunk()
        other()
    ratios: list[float] = []
    started = time.perf_counter()
    while len(ratios) < pairs and (len(ratios) < 5 or time.perf_counter() - started < budget):
        if len(ratios) % 2:
            theirs = seconds(other)
            ours = seconds(thunk)
        else:
            ours = seconds(thunk)
            theirs = seconds(other)
        ratios.append(ours / theirs)
    return Ratio(against, *median_interval(ratios), len(ratios))
