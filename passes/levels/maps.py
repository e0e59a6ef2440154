"""The maps between a weight of one level and the same weight of the next: averages, sums and copies along its axes.

Units `j`, `j + n`, `j + 2n`, ... of a space with `width * n` units become unit `j` of the coalesced space. With `F` the
average over such a group (`[n, width * n]`, rows sum to 1) and `T` the duplication (`[width * n, n]`), `F T = I`. An
axis along which a weight writes is averaged and duplicated (`F`, `T`); one that is contracted with an activation is
summed, since the merged activation stands for all of them, and shared out again (`T^T`, `F^T`). These are the maps of
the Multi-Level Framework (arXiv 2404.07999).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """A stretch of an axis.

    Args:
        size: how many elements, in the finer level.
        units: how many units they make, each a run of `size / units` neighbours; 0 when the stretch is kept as it is.
    """

    size: int
    units: int


@dataclass(frozen=True)
class AxisMap:
    """What happens to one axis of a weight.

    Args:
        axis: the axis.
        contracted: whether the axis is contracted with an activation.
        parts: its stretches in order, such as queries, keys and values in one matrix.
        width: how many units are merged into one.
    """

    axis: int
    contracted: bool
    parts: tuple[Part, ...]
    width: int

    def coalesce(self, weight: Tensor) -> Tensor:
        """The smaller weight, float64; `weight` has the finer level's size along the axis."""
        pieces = weight.double().split([part.size for part in self.parts], self.axis)
        return torch.cat([self._merge(*each) for each in zip(pieces, self.parts, strict=True)], self.axis)

    def decoalesce(self, weight: Tensor) -> Tensor:
        """The larger weight, float64; `weight` has the coarser level's size along the axis."""
        sizes = [part.size // self.width if part.units else part.size for part in self.parts]
        pieces = weight.double().split(sizes, self.axis)
        return torch.cat([self._duplicate(*each) for each in zip(pieces, self.parts, strict=True)], self.axis)

    @property
    def coarse_size(self) -> int:
        """The axis's size in the coarser level."""
        return sum(part.size // self.width if part.units else part.size for part in self.parts)

    def _merge(self, piece: Tensor, part: Part) -> Tensor:
        if not part.units:
            return piece
        grouped = piece.unflatten(self.axis, (self.width, part.size // self.width))
        return grouped.sum(self.axis) if self.contracted else grouped.mean(self.axis)

    def _duplicate(self, piece: Tensor, part: Part) -> Tensor:
        if not part.units:
            return piece
        copies = torch.cat([piece] * self.width, self.axis)
        return copies / self.width if self.contracted else copies


def coalesce_weight(members: Sequence[Tensor], axes: Sequence[AxisMap]) -> Tensor:
    """The weight that stands for `members`, one weight in neighbouring layers: merged along its axes, and averaged.

    Everything is computed in float64 and rounded once to the members' dtype.
    """
    total = torch.zeros((), dtype=torch.float64)
    for member in members:
        merged = member.double()
        for axis in axes:
            merged = axis.coalesce(merged)
        total = total + merged
    return (total / len(members)).to(members[0].dtype)


def decoalesce_weight(weight: Tensor, axes: Sequence[AxisMap]) -> Tensor:
    """The weight of the finer level that acts like `weight` on duplicated activations."""
    grown = weight.double()
    for axis in reversed(axes):
        grown = axis.decoalesce(grown)
    return grown.to(weight.dtype)
