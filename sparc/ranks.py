"""Processes that work together: whose turn a batch is, and how each learns what the others found."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as distributed
from torch import Tensor

from sparc import codes
from sparc.diag import PassError

Item = TypeVar("Item")

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool)
_MOST_AXES = 8


@dataclass(frozen=True)
class Ranks:
    """The processes of torch.distributed's default group; one process without.

    Args:
        rank: this process.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @staticmethod
    def current() -> "Ranks":
        """Those of this process: after `torch.distributed.init_process_group`, all of the group.

        Raises:
            PassError: SPARC218 when the group has no backend for tensors of the CPU.
        """
        if not distributed.is_available() or not distributed.is_initialized():
            return Ranks()
        if "cpu:" not in (backends := distributed.get_backend_config()):
            raise PassError(codes.RANKS_APART, "processes cannot exchange statistics", why=f"backends: {backends}")
        return Ranks(distributed.get_rank(), distributed.get_world_size())

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Every `count`-th item, beginning with item `rank`."""
        return items[self.rank :: self.count]

    def number(self, index: int) -> int:
        """Which of all items the one at `index` of this share is."""
        return self.rank + index * self.count

    def exchange(self, mine: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """What each process hands in, in the order of ranks; every process calls this in the same order.

        Args:
            mine: tensors of any shapes, of the dtypes of calibration's statistics; different numbers are fine.
        """
        for owner in range(self.count):
            yield [self._broadcast(owner, each) for each in self._listed(owner, mine)]

    def _listed(self, owner: int, mine: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """The owner's tensors, or as many places."""
        count = torch.tensor(len(mine))
        distributed.broadcast(count, owner)
        return mine if owner == self.rank else [None] * int(count)

    def _broadcast(self, owner: int, tensor: Tensor | None) -> Tensor:
        """The owner's tensor; the others give None."""
        header = torch.zeros(2 + _MOST_AXES, dtype=torch.int64)
        if tensor is not None:
            sizes = torch.tensor(tensor.shape, dtype=torch.int64)
            header[0], header[1], header[2 : 2 + tensor.ndim] = _DTYPES.index(tensor.dtype), tensor.ndim, sizes
        distributed.broadcast(header, owner)
        if tensor is None:
            shape = header[2 : 2 + int(header[1])].tolist()
            tensor = torch.empty(shape, dtype=_DTYPES[int(header[0])])
        shared = tensor.contiguous()
        distributed.broadcast(shared, owner)
        return shared
