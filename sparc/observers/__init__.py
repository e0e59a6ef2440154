"""What calibration can measure on a stream of tensors. Each observer sees one batch at a time and keeps a summary."""

from sparc.observers.base import Observer
from sparc.observers.by_run import ByRun, RunGram, RunMoments
from sparc.observers.gram import Geometry, Gram, PatchGram
from sparc.observers.histogram import Counts, Histogram
from sparc.observers.kept import Batches, Rows
from sparc.observers.ranges import AbsMax, AbsMean, Moments, Range

KINDS: dict[str, type[Observer]] = {
    "range": Range,
    "absmax": AbsMax,
    "absmean": AbsMean,
    "moments": Moments,
    "histogram": Histogram,
    "rows": Rows,
    "gram": Gram,
    "batches": Batches,
    "run_moments": RunMoments,
    "run_gram": RunGram,
}


def observer(kind: str) -> Observer:
    """An observer by its kind: a name of `KINDS`, with the channel axis after a colon when it is not the last:
    `moments:1`; or `patches:` with a `Geometry`.
    """
    name, _, axis = kind.partition(":")
    if name == "patches":
        return PatchGram(Geometry.parse(axis))
    return KINDS[name](int(axis or -1))


__all__ = [
    "KINDS",
    "AbsMax",
    "AbsMean",
    "Batches",
    "ByRun",
    "Counts",
    "Geometry",
    "Gram",
    "Histogram",
    "Moments",
    "Observer",
    "PatchGram",
    "Range",
    "Rows",
    "RunGram",
    "RunMoments",
    "observer",
]
