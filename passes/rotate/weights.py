"""Weights while they are rotated: kept in float64, rounded once to their dtype."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from sparc.pass_base import PassContext
from sparc.program import Program, is_weight


class Refusal(Exception):
    """Why a value cannot be rotated."""


@dataclass(frozen=True)
class Store:
    """The program's weights in float64; what is put is rounded once and remembered unrounded for the check."""

    program: Program
    context: PassContext

    def __getitem__(self, name: str) -> Tensor:
        known = self.context.wide.get(name)
        return self.program.weights[name].double() if known is None else known

    def put(self, name: str, tensor: Tensor) -> None:
        """Replace a weight by a float64 tensor."""
        self.program.set_weight(name, tensor.to(self.program.weights[name].dtype).contiguous())
        self.context.wide[name] = tensor

    def add(self, name: str, tensor: Tensor, readers: Iterable[fx.Node], position: int, like: fx.Node) -> str:
        """Add a weight made of `like`, of its dtype, as the argument of `readers` at `position`; returns its name."""
        stored = tensor.to(like.meta["val"].dtype).contiguous()
        made = str(self.program.add_weight(name, stored, like, own=True).target)
        self.context.wide[made] = tensor
        for reader in readers:
            arguments: list[Any] = [*reader.args, *[None] * (position + 1 - len(reader.args))]
            arguments[position] = self.program.weight_node(self.program.entry_of(reader), made)
            reader.args = tuple(arguments)
        return made


def turned(tensor: Tensor, axis: int, rotation: Tensor, centred: bool = False) -> Tensor:
    """The features along an axis, as row vectors, times a rotation; their mean is removed first where `centred`.

    Args:
        tensor: float64.
        axis: the axis of `size` features.
        rotation: `[size, size]` float64.
        centred: whether the mean over the features is taken away.
    """
    rows = tensor.movedim(axis, -1)
    if centred:
        rows = rows - rows.mean(-1, keepdim=True)
    return (rows @ rotation).movedim(-1, axis)


def name_of(node: Any) -> str:
    """The name of a weight's node."""
    assert is_weight(node)
    return str(node.target)
