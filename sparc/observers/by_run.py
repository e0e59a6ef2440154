"""Statistics of rows that go to different matrices, as the tokens of a mixture of experts do."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from sparc.grouped import runs
from sparc.observers.base import Observer


class ByRun(Observer):
    """A mean over the rows of each run that a grouped product (`sparc.grouped`) reads; a run that got none has the mean
    over all rows. Sums over batches are float64.
    """

    total: Tensor | None = None
    counts: Tensor | None = None

    def update_runs(self, value: Tensor, ends: Tensor, batch: int) -> None:
        """See a value `[rows, channels]`, whose runs end at `ends` `[runs]`."""
        rows = self.by_channel(value)
        self._count([rows[run] for run in runs(ends)])

    def _add(self, value: Tensor, batch: int) -> None:
        """All rows are one run."""
        self._count([self.by_channel(value)])

    def _count(self, each: Sequence[Tensor]) -> None:
        counts = torch.tensor([len(run) for run in each], dtype=torch.float64)
        self.absorb([torch.stack([self.sum_of(run) for run in each]), counts])

    @abstractmethod
    def sum_of(self, rows: Tensor) -> Tensor:
        """What is summed over rows `[rows, channels]`, float64."""

    def result(self) -> Tensor:
        """`[runs, ...]` float64."""
        assert self.total is not None
        assert self.counts is not None
        counts = self.counts.reshape(-1, *[1] * (self.total.ndim - 1))
        return torch.where(counts > 0, self.total / counts.clamp(min=1), self.total.sum(0) / counts.sum().clamp(min=1))

    def state(self) -> list[Tensor]:
        """Sums and counts."""
        assert self.total is not None
        assert self.counts is not None
        return [self.total, self.counts]

    def absorb(self, state: Sequence[Tensor]) -> None:
        """Add."""
        self.seen = True
        total, counts = state
        self.total = total.clone() if self.total is None else self.total.add_(total)
        self.counts = counts.clone() if self.counts is None else self.counts.add_(counts)


class RunMoments(ByRun):
    """`run_moments`: mean and mean square of each channel over each run's rows, `[runs, 2, channels]` float64."""

    def sum_of(self, rows: Tensor) -> Tensor:
        """Both sums."""
        return torch.stack([rows.sum(0, dtype=torch.float64), rows.square().sum(0, dtype=torch.float64)])


class RunGram(ByRun):
    """`run_gram`: the mean of `x xᵀ` over each run's rows x, `[runs, channels, channels]` float64."""

    def sum_of(self, rows: Tensor) -> Tensor:
        """Products are float32."""
        return (rows.T @ rows).double()
