"""What every observer has in common."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Observer(ABC):
    """Sees one value per batch and keeps a summary; `result()` is the statistic, once `seen` is true.

    Infinities and NaN (the masked scores of an attention, say) count as zeros; a tensor without elements is ignored.
    The summaries of several processes, each of which saw its share of the batches, are taken together by `absorb`.
    """

    seen = False

    def __init__(self, axis: int = -1) -> None:
        """Args: the channel axis, for statistics per channel."""
        self.axis = axis

    def update(self, value: Tensor, batch: int) -> None:
        """See a value.

        Args:
            value: any shape.
            batch: the number of its batch, which is another one for every value.
        """
        if value.numel():
            self.seen = True
            self._add(value, batch)

    @abstractmethod
    def _add(self, value: Tensor, batch: int) -> None:
        """Take in a tensor that is not empty."""

    @abstractmethod
    def result(self) -> Any:
        """The statistic over all batches."""

    @abstractmethod
    def state(self) -> list[Tensor]:
        """The summary, once something was seen."""

    @abstractmethod
    def absorb(self, state: Sequence[Tensor]) -> None:
        """Take in another observer's summary, as if this one had seen its batches too."""

    def by_channel(self, value: Tensor) -> Tensor:
        """The value as float32 `[everything else, channels]`."""
        rows = value.float().movedim(self.axis, -1).reshape(-1, value.shape[self.axis])
        return rows if bool(torch.isfinite(rows.sum())) else finite(rows)


def finite(value: Tensor) -> Tensor:
    """Zeros for infinities and NaN."""
    return torch.where(torch.isfinite(value), value, torch.zeros_like(value))


def extremes(value: Tensor) -> tuple[float, float, Tensor]:
    """The least and the greatest finite value, and the value without infinities and NaN."""
    low, high = (float(bound) for bound in torch.aminmax(value))
    if math.isfinite(low) and math.isfinite(high):
        return low, high, value
    return extremes(finite(value))
