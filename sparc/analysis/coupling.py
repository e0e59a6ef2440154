"""What the rules of operators write down: the axes of every value and weight, unified where channels are coupled.

A rule is a function from the state, a node and its arguments by name to the axes of the node's result (for several
results, a list of them). The tables of rules are in `coupling_layout` (operators that move data), `coupling_positions`
(those to which positions matter) and `coupling_rules` (those that compute).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from sparc.analysis.axes import Axis, channels, extent, freeze, unify
from sparc.program import Program, is_weight

Axes = tuple[Axis, ...]
Rule = Callable[["Coupling", fx.Node, dict[str, Any]], "Axes | list[Axes] | None"]


@dataclass(frozen=True)
class SizeArgument:
    """An argument of an operator that is the size of an axis.

    Args:
        node: the operator.
        name: the argument's name in its schema.
        index: its place in a list of sizes; None for a single number.
        axis: the axis whose size it is.
        offset: what is added to the size.
        within: the axis from whose end it is counted in the program, where it is: a size that any of its channels
            changes.
    """

    node: fx.Node
    name: str
    index: int | None
    axis: Axis
    offset: int = 0
    within: Axis | None = None


@dataclass(frozen=True)
class Contraction:
    """Products summed over an axis.

    Args:
        node: the operator.
        axis: what is summed over.
        operands: what is multiplied.
        weight: the node and axis of the weight whose columns meet the channels; None when both operands are computed.
    """

    node: fx.Node
    axis: Axis
    operands: tuple[Any, ...]
    weight: tuple[fx.Node, int] | None = None


@dataclass
class Coupling:
    """The state of the analysis.

    Args:
        program: what is analysed.
        axes: of every node that holds one tensor.
        several: of every node that holds a list of tensors.
        weights: the axes of every weight, by name.
        sizes: arguments that are sizes of axes.
        contractions: where products are summed.
        hints: what an axis is in the terms of its field: `head`, `head_dim`, `hidden`, `channel`, `expert`.
        experts: nodes that find experts by their numbers only (`sparc.analysis.mixtures`), and the axis of those.
        least: axes of which so many places must stay.
    """

    program: Program
    axes: dict[fx.Node, Axes] = field(default_factory=dict)
    several: dict[fx.Node, list[Axes]] = field(default_factory=dict)
    weights: dict[str, Axes] = field(default_factory=dict)
    sizes: list[SizeArgument] = field(default_factory=list)
    contractions: list[Contraction] = field(default_factory=list)
    hints: list[tuple[Axis, str]] = field(default_factory=list)
    experts: dict[fx.Node, Axis] = field(default_factory=dict)
    least: list[tuple[Axis, int]] = field(default_factory=list)

    def of(self, node: Any) -> Axes:
        """The axes of a tensor; of what is no tensor, none."""
        if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), Tensor):
            return ()
        if node not in self.axes:
            if is_weight(node):
                name = str(node.target)
                if name not in self.weights:
                    self.weights[name] = tuple(channels(size) for size in node.meta["val"].shape)
                self.axes[node] = self.weights[name]
            else:
                self.axes[node] = tuple(channels(size) for size in node.meta["val"].shape)
        return self.axes[node]

    def closed(self, node: fx.Node, why: str, values: Iterable[Any]) -> "Axes | list[Axes]":
        """An operator that is not seen through: what it reads is frozen, and so is what it writes."""
        for value in values:
            for axis in self.of(value):
                freeze(axis, why)
        kinds = node.meta.get("val")
        made = [
            tuple(channels(size, why) for size in kind.shape) if isinstance(kind, Tensor) else ()
            for kind in (kinds if isinstance(kinds, (list, tuple)) else [kinds])
        ]
        return made if isinstance(kinds, (list, tuple)) else made[0]

    def fixed(self, axis: Axis, why: str) -> Axis:
        """The axis, frozen."""
        freeze(axis, why)
        return axis

    def size(
        self, node: fx.Node, name: str, index: int | None, axis: Axis, offset: int = 0, within: Axis | None = None
    ) -> None:
        """Note that an argument is the size of an axis; see `SizeArgument`."""
        self.sizes.append(SizeArgument(node, name, index, axis, offset, within))

    def contract(self, node: fx.Node, a: tuple[Any, int], b: tuple[Any, int]) -> None:
        """Products of two operands, each with the place of its axis, are summed over that axis."""
        first, second = (self.of(operand)[place] for operand, place in (a, b))
        unify(first, second)
        weights = [each for each in (b, a) if is_weight(each[0])]
        reader = weights[0] if len(weights) == 1 else None
        self.contractions.append(Contraction(node, first, (a[0], b[0]), reader))

    def broadcast(self, operands: Iterable[Axes]) -> Axes:
        """The axes of values that are broadcast against each other, unified where none has size one."""
        result: list[Axis] = []
        for axes in operands:
            missing = len(axes) - len(result)
            if missing > 0:
                result[:0] = axes[:missing]
            for place in range(1, len(axes) + 1 - max(missing, 0)):
                result[-place] = _together(result[-place], axes[-place])
        return tuple(result)


def name_of(node: fx.Node) -> str:
    """The name of a node's operator, without its overload."""
    return str(getattr(node.target, "_opname", node.target))


def place_of(axis: int, rank: int) -> int:
    """The place of an axis, counted from the front."""
    return axis % rank if rank else 0


def _together(a: Axis, b: Axis) -> Axis:
    """One axis for two that are broadcast: the longer one, or both unified."""
    if a is b:
        return a
    if extent(a) == 1 or extent(b) == 1:
        return b if extent(a) == 1 else a
    unify(a, b)
    return a
