"""What calibration can measure on a stream of tensors. Each observer sees one batch at a time and keeps a summary."""

import json
import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

_BINS = 2048
_COUNTED = 2**18
_ROWS = 512
_PATCHES = 2**16
_LEAST_WIDTH = 1e-6


class Observer(ABC):
    """Updated with one value per batch; `result()` is the statistic, once `seen` is true.

    Infinities and NaN (the masked scores of an attention, say) count as zeros; a tensor without elements is ignored.
    """

    seen = False

    def __init__(self, axis: int = -1) -> None:
        """Args: the channel axis, for statistics per channel."""
        self.axis = axis

    def update(self, value: Tensor) -> None:
        """See one batch."""
        if value.numel():
            self.seen = True
            self._add(value)

    @abstractmethod
    def _add(self, value: Tensor) -> None:
        """Take in a tensor that is not empty."""

    @abstractmethod
    def result(self) -> Any:
        """The statistic over all batches."""

    def by_channel(self, value: Tensor) -> Tensor:
        """The value as float32 `[everything else, channels]`."""
        rows = value.float().movedim(self.axis, -1).reshape(-1, value.shape[self.axis])
        return rows if bool(torch.isfinite(rows.sum())) else _finite(rows)


def _finite(value: Tensor) -> Tensor:
    return torch.where(torch.isfinite(value), value, torch.zeros_like(value))


def _extremes(value: Tensor) -> tuple[float, float, Tensor]:
    """The least and the greatest finite value, and the value without infinities and NaN."""
    low, high = (float(bound) for bound in torch.aminmax(value))
    if math.isfinite(low) and math.isfinite(high):
        return low, high, value
    return _extremes(_finite(value))


class Range(Observer):
    """`range`: the least and the greatest value, as a pair of floats."""

    low, high = float("inf"), float("-inf")

    def _add(self, value: Tensor) -> None:
        """Widen."""
        low, high, _ = _extremes(value)
        self.low, self.high = min(self.low, low), max(self.high, high)

    def result(self) -> tuple[float, float]:
        """(least, greatest)."""
        return self.low, self.high


class AbsMax(Observer):
    """`absmax`: the greatest magnitude of each channel, `[channels]` float32."""

    value: Tensor | None = None

    def _add(self, value: Tensor) -> None:
        """Widen."""
        found = self.by_channel(value).abs().amax(0)
        self.value = found if self.value is None else torch.maximum(self.value, found)

    def result(self) -> Tensor:
        """`[channels]`."""
        assert self.value is not None
        return self.value


class Moments(Observer):
    """`moments`: mean and mean square of each channel, `[2, channels]` float64."""

    count = 0
    total: Tensor | None = None

    def _add(self, value: Tensor) -> None:
        """Accumulate in float64."""
        rows = self.by_channel(value)
        found = torch.stack([rows.sum(0, dtype=torch.float64), rows.square().sum(0, dtype=torch.float64)])
        self.total = found if self.total is None else self.total + found
        self.count += rows.shape[0]

    def result(self) -> Tensor:
        """`[2, channels]`."""
        assert self.total is not None
        return self.total / self.count


class Counts(NamedTuple):
    """A histogram.

    Args:
        counts: `[2048]` float64, of equal bins.
        low: lower edge of the first bin.
        high: upper edge of the last bin.
        least: the least value seen; at or above `low`.
        greatest: the greatest value seen.
    """

    counts: Tensor
    low: float
    high: float
    least: float
    greatest: float


class Histogram(Observer):
    """`histogram`: `Counts` of equal bins over the range seen so far.

    When a batch leaves the range, the range is doubled towards it until it fits, so that old bins fall exactly into new
    ones. The extremes are those of all values; of a batch of more than 2^18 values, only evenly spaced ones are
    counted.
    """

    counts: Tensor | None = None
    low = high = 0.0
    least, greatest = math.inf, -math.inf

    def _add(self, value: Tensor) -> None:
        """Count one batch."""
        low, high, value = _extremes(value)
        self.least, self.greatest = min(self.least, low), max(self.greatest, high)
        if self.counts is None:
            self.low, self.high = low, max(high, low + max(abs(low), 1.0) * _LEAST_WIDTH)
            self.counts = torch.zeros(_BINS, dtype=torch.float64)
        while low < self.low or high > self.high:
            self._double(towards_low=low < self.low)
        spaced = value.flatten()[:: 2 * (value.numel() // (2 * _COUNTED)) + 1]
        self.counts += torch.histc(spaced.float(), _BINS, self.low, self.high).double()

    def _double(self, towards_low: bool) -> None:
        assert self.counts is not None
        width = self.high - self.low
        halved = self.counts.reshape(-1, 2).sum(1)
        empty = torch.zeros_like(halved)
        self.counts = torch.cat([empty, halved] if towards_low else [halved, empty])
        self.low, self.high = (self.low - width, self.high) if towards_low else (self.low, self.high + width)

    def result(self) -> Counts:
        """The counts."""
        assert self.counts is not None
        return Counts(self.counts, self.low, self.high, self.least, self.greatest)


class Rows(Observer):
    """`rows`: evenly spaced rows of the value as `[rows, channels]`, at most 512, for error estimates.

    At most 128 rows of a batch are kept; each time too many have come together, every other one is dropped, and from
    then on only half as many are taken.
    """

    stride = 1

    def __init__(self, axis: int = -1) -> None:
        """Args: the channel axis."""
        super().__init__(axis)
        self.kept: list[Tensor] = []

    def _add(self, value: Tensor) -> None:
        """Keep evenly spaced rows of the batch."""
        rows = self.by_channel(value)
        step = max(1, rows.shape[0] // 128)
        self.kept.append(rows[::step][:128][:: self.stride].clone())
        if sum(part.shape[0] for part in self.kept) > 4 * _ROWS:
            self.kept = [torch.cat(self.kept)[::2]]
            self.stride *= 2

    def result(self) -> Tensor:
        """`[rows, channels]`."""
        rows = torch.cat(self.kept)
        step = max(1, -(-rows.shape[0] // _ROWS))
        return rows[::step]


class Gram(Observer):
    """`gram`: the mean of `x xᵀ` over all rows x, `[channels, channels]` float64.

    Products are float32, sums over batches float64.
    """

    count = 0
    total: Tensor | None = None

    def _add(self, value: Tensor) -> None:
        """Accumulate."""
        rows = self.rows_of(value)
        found = (rows.transpose(-1, -2) @ rows).double()
        self.total = found if self.total is None else self.total.add_(found)
        self.count += rows.shape[-2]

    def rows_of(self, value: Tensor) -> Tensor:
        """`[..., rows, channels]`, float32."""
        return self.by_channel(value)

    def result(self) -> Tensor:
        """`[channels, channels]`."""
        assert self.total is not None
        return self.total / self.count


class PatchGram(Gram):
    """`patches`: `Gram` of the patches that a convolution multiplies, `[groups, reduce, reduce]`, where a patch is laid
    out like a row of the convolution's weight.

    At most 2^16 evenly spaced patches of a batch are counted.
    """

    def __init__(self, geometry: "Geometry") -> None:
        """Args: the convolution's."""
        super().__init__()
        self.geometry = geometry

    def rows_of(self, value: Tensor) -> Tensor:
        """`[groups, patches, reduce]`."""
        kernel, stride, padding, dilation, groups = self.geometry
        image = value.float() if bool(torch.isfinite(value.sum())) else _finite(value.float())
        if len(kernel) == 1:
            image, kernel, stride = image.unsqueeze(2), (1, *kernel), (1, *stride)
            padding, dilation = ((0, 0), *padding), (1, *dilation)
        sides = [side for before, after in reversed(padding) for side in (before, after)]
        columns = torch.nn.functional.unfold(
            torch.nn.functional.pad(image, sides), kernel, dilation=dilation, stride=stride
        )
        step = max(1, -(-columns.shape[0] * columns.shape[2] // _PATCHES))
        patches = columns.movedim(1, 0).flatten(1)[:, ::step]
        return patches.unflatten(0, (groups, -1)).transpose(-1, -2)


class Geometry(NamedTuple):
    """Where a convolution reads; a kind of statistics is `f"patches:{geometry}"`.

    Args:
        kernel: its size along each of one or two axes.
        stride: likewise.
        padding: zeros before and behind, along each axis.
        dilation: likewise.
        groups: in how many groups channels are convolved.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    def __str__(self) -> str:
        return json.dumps(self)

    @staticmethod
    def parse(text: str) -> "Geometry":
        """The inverse of `str`."""
        kernel, stride, padding, dilation, groups = json.loads(text)
        sides = tuple((before, after) for before, after in padding)
        return Geometry(tuple(kernel), tuple(stride), sides, tuple(dilation), groups)


class Batches(Observer):
    """`batches`: the first values as they are, at most four batches, for error estimates that need whole tensors."""

    def __init__(self, axis: int = -1) -> None:
        """Args: unused."""
        super().__init__(axis)
        self.kept: list[Tensor] = []

    def _add(self, value: Tensor) -> None:
        """Keep the batch."""
        if len(self.kept) < 4:
            self.kept.append(value)

    def result(self) -> list[Tensor]:
        """The tensors."""
        return self.kept


KINDS: dict[str, type[Observer]] = {
    "range": Range,
    "absmax": AbsMax,
    "moments": Moments,
    "histogram": Histogram,
    "rows": Rows,
    "gram": Gram,
    "batches": Batches,
}


def observer(kind: str) -> Observer:
    """An observer by its kind: a name of `KINDS`, with the channel axis after a colon when it is not the last:
    `moments:1`; or `patches:` with a `Geometry`.
    """
    name, _, axis = kind.partition(":")
    if name == "patches":
        return PatchGram(Geometry.parse(axis))
    return KINDS[name](int(axis or -1))
