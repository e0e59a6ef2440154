"""Dependency groups: which channels of which weights can only be removed together.

`groups(program)` gives every set of coupled channels, over all entries, from the operators alone: no names, no module
types. (DepGraph, Fang et al. 2023, found on the captured graph instead of on a trace of autograd, with axes that are
terms, see `sparc.analysis.axes`, instead of lists of indices.)
"""

import operator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from sparc.analysis.axes import Axis, Channels, freeze, leaves, mark, normal, positions, repeats
from sparc.analysis.coupling import Contraction, Coupling
from sparc.analysis.coupling_rules import rule_of
from sparc.pattern import normalized_arguments
from sparc.program import Program

_KINDS = ("head", "queries of a head", "head_dim", "hidden", "channel")
_COMPUTED = "its size is computed by the program"


@dataclass(frozen=True, eq=False)
class Member:
    """One axis of a weight in a group.

    Args:
        weight: the weight's name.
        axis: which of its axes.
        index: `[units, each]` int64: the places along the axis that belong to each unit, in order.
        read: whether it is only the columns that meet the group's channels in products; else it makes them.
    """

    weight: str
    axis: int
    index: Tensor
    read: bool


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that can only be removed together, across weights and values.

    Args:
        units: how many can be removed, one by one.
        kind: a description: `neuron`, `channel`, `head`, `queries of a head`, `head_dim` or `hidden`.
        members: the axes of weights.
        values: the nodes, with the places of the axes, that hold the channels.
        contractions: the products that sum over the channels.
        frozen: why no unit can be removed; empty when they can.
        statistic: what runs over the units (a norm, a softmax), so that removing some is not the same as making them
            zero; empty when nothing does.
        channels: the units as a part of axes.
        coupling: the analysis it belongs to.
    """

    units: int
    kind: str
    members: tuple[Member, ...]
    values: tuple[tuple[fx.Node, int], ...]
    contractions: tuple[Contraction, ...]
    frozen: str
    statistic: str
    channels: Channels = field(repr=False)
    coupling: Coupling = field(repr=False)

    @property
    def name(self) -> str:
        """The first weight and axis, which stand for the group."""
        return f"{self.members[0].weight}[{self.members[0].axis}]"

    def __str__(self) -> str:
        state = f", frozen: {self.frozen}" if self.frozen else f", {self.statistic}" if self.statistic else ""
        return f"{self.units} {self.kind} of {self.name}{state}"


def couple(program: Program) -> Coupling:
    """The axes of every value and weight, unified where channels are coupled; see `Coupling`."""
    state = Coupling(program)
    for entry in program.entries.values():
        for node in entry.graph.nodes:
            if node.op == "placeholder":
                state.closed(node, "it is an input of the program", [])
                _close(state, [node], "it is an input of the program")
            elif node.op == "output":
                _close(state, node.all_input_nodes, "it is an output of the program")
            elif node.op == "call_function":
                _visit(state, node)
    for contraction in state.contractions:
        if contraction.weight is None and not any(
            state.vanishes(operand, contraction.axis) for operand in contraction.operands
        ):
            mark(contraction.axis, "values that are not zero at zero weights are summed over it")
    _close_computed_sizes(state)
    return state


def groups(program: Program) -> list[Group]:
    """Every dependency group that holds a weight, in the order in which weights are read.

    Args:
        program: usually canonicalised, so that attention and norms are single operators.
    """
    state = couple(program)
    members: dict[Channels, list[tuple[str, int]]] = {}
    for name, axes in state.weights.items():
        for place, axis in enumerate(axes):
            for leaf in dict.fromkeys(leaves(axis)):
                members.setdefault(leaf, []).append((name, place))
    values: dict[Channels, list[tuple[fx.Node, int]]] = {leaf: [] for leaf in members}
    for node, axes in state.axes.items():
        for place, axis in enumerate(axes):
            for leaf in dict.fromkeys(leaves(axis)):
                if leaf in values and node.op != "get_attr":
                    values[leaf].append((node, place))
            for leaf in repeats(axis):
                freeze(leaf, "it is coupled with itself")
    contractions: dict[Channels, list[Contraction]] = {}
    for contraction in state.contractions:
        for leaf in dict.fromkeys(leaves(contraction.axis)):
            contractions.setdefault(leaf, []).append(contraction)
    kinds = _kinds(state)
    return [
        _group(state, leaf, found, values[leaf], contractions.get(leaf, []), kinds.get(leaf, "neuron"))
        for leaf, found in members.items()
    ]


def _group(
    state: Coupling,
    leaf: Channels,
    found: list[tuple[str, int]],
    values: list[tuple[fx.Node, int]],
    contractions: list[Contraction],
    kind: str,
) -> Group:
    read = {each.weight for each in contractions if each.weight is not None}
    readers = {(str(node.target), place) for node, place in read}
    members = []
    for name, place in found:
        index = positions(state.weights[name][place], leaf)
        if index is not None:
            only = (name, place) in readers and _only_read(state, name, place, contractions)
            members.append(Member(name, place, index, only))
    return Group(
        leaf.size, kind, tuple(members), tuple(values), tuple(contractions), leaf.frozen, leaf.statistic, leaf, state
    )


def _only_read(state: Coupling, name: str, place: int, contractions: list[Contraction]) -> bool:
    """Whether every operator that reads the weight sums over this axis."""
    uses = {user for _, node in _weight_uses(state.program, name) for user in node.users}
    summed = {each.node for each in contractions if each.weight and (str(each.weight[0].target), each.weight[1]) == (name, place)}
    return uses == summed


def _weight_uses(program: Program, name: str) -> list[tuple[str, fx.Node]]:
    return [
        (key, node)
        for key, entry in program.entries.items()
        for node in entry.graph.nodes
        if node.op == "get_attr" and node.target == name
    ]


def _visit(state: Coupling, node: fx.Node) -> None:
    if node.target is operator.getitem:
        listed = state.several.get(node.args[0])  # type: ignore[arg-type]
        if listed is not None:
            state.axes[node] = listed[node.args[1]]  # type: ignore[index]
        return
    kind = node.meta.get("val")
    inputs = [used for used in node.all_input_nodes if isinstance(used.meta.get("val"), (Tensor, list, tuple))]
    if not isinstance(kind, (Tensor, list, tuple)):
        return
    rule = rule_of(node)
    found: Any = rule(state, node, normalized_arguments(node)) if rule is not None else None
    if found is None:
        name = getattr(node.target, "_opname", str(node.target))
        found = state.closed(node, f"{name} is not seen through", inputs)
    if isinstance(found, list):
        state.several[node] = found
    else:
        state.axes[node] = found


def _close(state: Coupling, nodes: list[fx.Node], why: str) -> None:
    for node in nodes:
        for axes in state.several.get(node, [state.of(node)]):
            for axis in axes:
                freeze(axis, why)


def _close_computed_sizes(state: Coupling) -> None:
    """A size that the program computes can only be rewritten where a reshape can infer it."""
    for each in state.sizes:
        if each.index is None:
            continue
        given = normalized_arguments(each.node)
        listed = given.get(each.name)
        entry = listed[each.index] if isinstance(listed, (list, tuple)) else None
        if isinstance(entry, fx.Node):
            others = [x for place, x in enumerate(listed) if place != each.index and _infers(x, each)]  # type: ignore[arg-type]
            if others or getattr(each.node.target, "_opname", "") not in ("reshape", "view"):
                freeze(each.axis, _COMPUTED)


def _infers(entry: Any, each: Any) -> bool:
    return isinstance(entry, int) and entry == -1


def _kinds(state: Coupling) -> dict[Channels, str]:
    found: dict[Channels, str] = {}
    for kind in reversed(_KINDS):
        for axis, hint in state.hints:
            if hint == kind:
                found.update(dict.fromkeys(leaves(axis), kind))
    return found


__all__ = ["Axis", "Group", "Member", "couple", "groups", "normal"]
