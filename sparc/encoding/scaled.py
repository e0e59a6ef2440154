"""What formats with a scale per group share: a code stands for a number, and a value is that number times a scale."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from sparc.encoding.base import ElementEncoding, saturate
from sparc.encoding.grid import Grid
from sparc.encoding.groups import Group, column, group_at, grouped, magnitudes, ungrouped, why_no_matrix

FACTORS = tuple(0.7 + 0.05 * step for step in range(17))  # what a search multiplies a group's greatest magnitude by


@dataclass(frozen=True)
class ScaledEncoding(ElementEncoding):
    """An element encoding whose values are `number(code) * scale`, where a group of columns shares a scale.

    The grid has a tensor `scale`, `[..., out, groups]`; how it is stored is the subclass's.
    """

    @property
    @abstractmethod
    def columns(self) -> Group:
        """How many consecutive columns share a scale."""

    @abstractmethod
    def nearest(self, numbers: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The uint8 codes of the nearest numbers, for finite float32 `[..., out, reduce]`."""

    @abstractmethod
    def numbers(self, codes: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """What the codes stand for, float32."""

    @abstractmethod
    def scales(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The scale of every group, `[..., out, groups]`, float32, positive."""

    @abstractmethod
    def covering(self, magnitude: Tensor) -> dict[str, Tensor]:
        """The grid's tensors for groups of these greatest magnitudes, `[..., out, groups]`, float32."""

    def candidates(self, magnitude: Tensor, start: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """Other tensors `scale` that a search may prefer to `start`'s."""
        for factor in FACTORS:
            yield self.covering(magnitude * factor)["scale"]

    def accepts(self, shape: Sequence[int]) -> str | None:
        """Any matrix with at least one element."""
        return why_no_matrix(shape)

    def at_column(self, grid: Grid, column: int) -> Grid:
        """The column's scale; what belongs to the whole matrix stays."""
        tensors = dict(grid.tensors)
        if "scale" in tensors:
            tensors["scale"] = group_at(tensors["scale"], self.columns, column)
        return Grid(self.ungrouped(), tensors)

    def ungrouped(self) -> Self:
        """The encoding of a single column; its own groups, if it has any, are one."""
        return self

    def codes(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The codes nearest to `w / scale`, computed in float32; NaN is taken for 0."""
        scaled = grouped(weight.float(), self.columns) / column(self.scales(tensors))
        return self.nearest(ungrouped(scaled, weight.shape, self.columns).nan_to_num_(), tensors)

    def values(self, codes: Tensor, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """`number * scale` in float32, then cast; the cast saturates."""
        scaled = grouped(self.numbers(codes, tensors), self.columns) * column(self.scales(tensors))
        return saturate(ungrouped(scaled, codes.shape, self.columns), dtype)

    def fit(self, weight: Tensor, *, importance: Tensor | None = None, search: bool = False) -> Grid:
        """Cover each group's greatest magnitude, or look for less squared error among other scales."""
        magnitude = magnitudes(weight, self.columns, importance)
        tensors = self.covering(magnitude)
        return Grid(self, self.search(weight, magnitude, tensors, importance) if search else tensors)

    def search(
        self, weight: Tensor, magnitude: Tensor, start: dict[str, Tensor], importance: Tensor | None
    ) -> dict[str, Tensor]:
        """The start with the scale of least (weighted) squared error in each group; of equals, the first.

        Args:
            weight: `[..., out, reduce]`, floating.
            magnitude: the greatest of each group, `[..., out, groups]`.
            start: the grid's tensors.
            importance: as for `fit`.
        """
        h = torch.ones(()) if importance is None else importance.float()
        h = grouped(h.expand(weight.shape), self.columns, fill="zero")
        # errors are counted in steps of the first scale, so that their squares neither under- nor overflow
        unit = column(self.scales(start)).reciprocal()
        best, least = start, self._error(weight, start, unit, h)
        for scale in self.candidates(magnitude, start):
            error = self._error(weight, {**start, "scale": scale}, unit, h)
            better = error < least
            least = torch.where(better, error, least)
            best = {**best, "scale": torch.where(better, scale, best["scale"])}
        return best

    def _error(self, weight: Tensor, tensors: Mapping[str, Tensor], unit: Tensor, h: Tensor) -> Tensor:
        residual = self.values(self.codes(weight, tensors), tensors, weight.dtype).float() - weight.float()
        return (grouped(residual, self.columns) * unit).square().mul(h).sum(-1)
