"""Ranges and moments of values."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparc.observers.base import Observer, extremes


class Range(Observer):
    """`range`: the least and the greatest value, as a pair of floats."""

    low, high = float("inf"), float("-inf")

    def _add(self, value: Tensor, batch: int) -> None:
        """Widen."""
        low, high, _ = extremes(value)
        self._widen(low, high)

    def _widen(self, low: float, high: float) -> None:
        self.low, self.high = min(self.low, low), max(self.high, high)

    def result(self) -> tuple[float, float]:
        """(least, greatest)."""
        return self.low, self.high

    def state(self) -> list[Tensor]:
        """Both ends."""
        return [torch.tensor([self.low, self.high], dtype=torch.float64)]

    def absorb(self, state: Sequence[Tensor]) -> None:
        """Widen."""
        self.seen = True
        self._widen(*state[0].tolist())


class AbsMax(Observer):
    """`absmax`: the greatest magnitude of each channel, `[channels]` float32."""

    value: Tensor | None = None

    def _add(self, value: Tensor, batch: int) -> None:
        """Widen."""
        self.absorb([self.by_channel(value).abs().amax(0)])

    def result(self) -> Tensor:
        """`[channels]`."""
        assert self.value is not None
        return self.value

    def state(self) -> list[Tensor]:
        """The magnitudes."""
        return [self.result()]

    def absorb(self, state: Sequence[Tensor]) -> None:
        """Widen."""
        self.seen = True
        self.value = state[0] if self.value is None else torch.maximum(self.value, state[0])


class Mean(Observer):
    """A mean over all rows: subclasses say of what. Sums over batches are float64."""

    count = 0
    total: Tensor | None = None

    def result(self) -> Tensor:
        """The mean."""
        assert self.total is not None
        return self.total / self.count

    def state(self) -> list[Tensor]:
        """Sum and count."""
        assert self.total is not None
        return [self.total, torch.tensor(self.count)]

    def absorb(self, state: Sequence[Tensor]) -> None:
        """Add."""
        self.seen = True
        self.total = state[0].clone() if self.total is None else self.total.add_(state[0])
        self.count += int(state[1])


class AbsMean(Mean):
    """`absmean`: the mean magnitude of each channel, `[channels]` float64."""

    def _add(self, value: Tensor, batch: int) -> None:
        """Accumulate in float64."""
        rows = self.by_channel(value)
        self.absorb([rows.abs().sum(0, dtype=torch.float64), torch.tensor(rows.shape[0])])


class Moments(Mean):
    """`moments`: mean and mean square of each channel, `[2, channels]` float64."""

    def _add(self, value: Tensor, batch: int) -> None:
        """Accumulate in float64."""
        rows = self.by_channel(value)
        found = torch.stack([rows.sum(0, dtype=torch.float64), rows.square().sum(0, dtype=torch.float64)])
        self.absorb([found, torch.tensor(rows.shape[0])])
