"""Axes of values and weights, joined into classes of features that must be merged alike.

Features are merged by *units*, runs of neighbours that stay together. A class has as many units as the greatest common
divisor of its axes' sizes: queries of 32 features, in 4 heads that share 2 keys, have 2 units of 16.
"""

from math import gcd
from typing import Any

from torch import Tensor


class Axis:
    """An axis of a value or a weight, and the class it belongs to.

    Attributes:
        size: how many elements.
        units: for the root of a class, how many units it has.
        frozen: for the root, why the class cannot be merged; empty when it can.
        parts: for the root, the axes that it is a concatenation of, if it is one.
        uniform: for the root, whether all axes of the class have its size; only such a class can be a concatenation.
    """

    def __init__(self, size: int, frozen: str = "") -> None:
        """Args: its size, and why it cannot be merged."""
        self.size = size
        self.units = size
        self.frozen = frozen
        self.parts: list[Axis] = []
        self.uniform = True
        self._parent: Axis | None = None

    @property
    def root(self) -> "Axis":
        """What stands for the class."""
        if self._parent is None:
            return self
        self._parent = self._parent.root
        return self._parent

    @property
    def leaves(self) -> "list[Axis]":
        """The parts of a concatenation, in order; the axis itself when it is none."""
        parts = self.root.parts
        return [leaf for part in parts for leaf in part.leaves] if parts else [self]

    def freeze(self, why: str) -> None:
        """Say why the class cannot be merged; the first reason counts."""
        root = self.root
        root.frozen = root.frozen or why
        for part in root.parts:
            part.freeze(why)

    def join(self, other: "Axis") -> None:
        """Make one class of two."""
        kept, gone = self.root, other.root
        if kept is gone:
            return
        gone._parent = kept
        kept.uniform = kept.uniform and gone.uniform and kept.size == gone.size
        kept.units = gcd(kept.units, gone.units)
        reason = kept.frozen or gone.frozen
        parts, kept.parts = gone.parts, kept.parts or gone.parts
        if parts and parts is not kept.parts:
            if [part.size for part in parts] != [part.size for part in kept.parts]:
                reason = reason or "it is cut in two ways"
            for a, b in zip(kept.parts, parts, strict=False):
                a.join(b)
        if kept.parts and not kept.uniform:
            reason = reason or "it is a concatenation and cut into units as well"
        if reason:
            kept.freeze(reason)
            for part in parts:
                part.freeze(reason)

    def concatenate(self, parts: "list[Axis]") -> None:
        """Say that the axis is a concatenation."""
        whole = Axis(self.size)
        whole.parts = parts
        self.join(whole)


Shape = list["Axis | None"]  # None where a size is 1 or varies: nothing to merge


def fresh(value: Any, frozen: str = "") -> Any:
    """New axes for a type: a list for a tensor, a list of lists for several."""
    if isinstance(value, Tensor):
        return [Axis(size, frozen) if isinstance(size, int) and size > 1 else None for size in value.shape]
    return [fresh(item, frozen) for item in value] if isinstance(value, (tuple, list)) else []


def freeze(axes: Any, why: str) -> None:
    """Freeze every axis of a value."""
    for axis in axes or ():
        if isinstance(axis, list):
            freeze(axis, why)
        elif axis is not None:
            axis.freeze(why)


def join(first: "Axis | None", second: "Axis | None") -> None:
    """Make one class of two axes, where both have features."""
    if first is not None and second is not None:
        first.join(second)


def join_all(first: Shape, second: Shape) -> None:
    """Join the axes of two values, aligned at the last one as in broadcasting."""
    for a, b in zip(reversed(first), reversed(second), strict=False):
        join(a, b)
