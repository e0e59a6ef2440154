"""Values that are kept as they are, for error estimates."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from sparc.observers.base import Observer

_ROWS = 512
_BATCH_ROWS = 128
_BATCHES = 4


class Kept(Observer):
    """Keeps a part of some batches; which ones depends on their numbers alone."""

    def __init__(self, axis: int = -1) -> None:
        """Args: the channel axis."""
        super().__init__(axis)
        self.kept: dict[int, Tensor] = {}
        self.step = 1

    @abstractmethod
    def thin(self) -> None:
        """Drop what is too much."""

    def state(self) -> list[Tensor]:
        """The step and the batches' numbers, and what is kept of each."""
        return [torch.tensor([self.step, *self.kept]), *self.kept.values()]

    def absorb(self, state: Sequence[Tensor]) -> None:
        """Keep both, and thin."""
        self.seen = True
        step, *batches = state[0].tolist()
        self.step = max(self.step, step)
        self.kept |= dict(zip(batches, state[1:], strict=True))
        self.thin()


class Rows(Kept):
    """`rows`: evenly spaced rows of the value as `[rows, channels]`, at most 512, for error estimates.

    At most 128 rows of a batch are kept, and only batches whose number is a multiple of `step`, the least power of two
    for which no more than 2048 rows are left.
    """

    def _add(self, value: Tensor, batch: int) -> None:
        """Keep evenly spaced rows of the batch."""
        rows = self.by_channel(value)
        step = max(1, rows.shape[0] // _BATCH_ROWS)
        self.kept[batch] = rows[::step][:_BATCH_ROWS].clone()
        self.thin()

    def thin(self) -> None:
        """Keep every second batch, every fourth, ..., but never none."""
        while True:
            multiples = {batch: rows for batch, rows in self.kept.items() if batch % self.step == 0}
            self.kept = multiples or {batch: self.kept[batch] for batch in sorted(self.kept)[:1]}
            if len(self.kept) == 1 or sum(len(rows) for rows in self.kept.values()) <= 4 * _ROWS:
                return
            self.step *= 2

    def result(self) -> Tensor:
        """`[rows, channels]`."""
        rows = torch.cat([self.kept[batch] for batch in sorted(self.kept)])
        step = max(1, -(-rows.shape[0] // _ROWS))
        return rows[::step]


class Batches(Kept):
    """`batches`: the first values as they are, at most four batches, for error estimates that need whole tensors."""

    def _add(self, value: Tensor, batch: int) -> None:
        """Keep the batch."""
        self.kept[batch] = value
        self.thin()

    def thin(self) -> None:
        """Keep the batches of least number."""
        self.kept = {batch: self.kept[batch] for batch in sorted(self.kept)[:_BATCHES]}

    def result(self) -> list[Tensor]:
        """The tensors."""
        return [self.kept[batch] for batch in sorted(self.kept)]
