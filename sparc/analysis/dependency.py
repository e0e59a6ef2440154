"""Dependency groups: which channels of which weights can only be removed together.

`groups(program)` gives every set of coupled channels, over all entries, from the operators alone: no names, no module
types. (DepGraph, Fang et al. 2023, found on the captured graph instead of on a trace of autograd, with axes that are
terms, see `sparc.analysis.axes`, instead of lists of indices.)
"""

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from sparc.analysis.axes import Axis, Channels, freeze, leaves, mark, positions, repeats, unify
from sparc.analysis.coupling import Contraction, Coupling
from sparc.analysis.coupling_rules import rule_of
from sparc.analysis.written_attention import hint_products
from sparc.analysis.zeros import vanishes
from sparc.pattern import normalized_arguments
from sparc.program import Entry, Program

KINDS = ("expert", "head", "queries of a head", "head_dim", "hidden", "channel", "neuron")
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
        kind: a description: `neuron`, `channel`, `head`, `queries of a head`, `head_dim`, `hidden` or `expert`.
        members: the axes of weights.
        values: the nodes, with the places of the axes, that hold the channels.
        contractions: the products that sum over the channels.
        frozen: why no unit can be removed; empty when they can.
        statistic: what runs over the units (a norm, a softmax), so that removing some is not the same as making them
            zero; empty when nothing does.
        channels: the units as a part of axes.
        coupling: the analysis it belongs to.
        least: how many units must stay: one, or more experts than a token goes to.
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
    least: int = 1

    @property
    def cached(self) -> bool:
        """Whether a cache holds the channels, so that inputs and outputs of the program have them."""
        return any(node.op == "placeholder" for node, _ in self.values)

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
            if node.op == "call_function":
                _visit(state, node)
        _close_boundary(state, entry)
    for contraction in state.contractions:
        if contraction.weight is None:
            _mark_summed(state, contraction)
    _close_computed_sizes(state)
    hint_products(state)
    return state


def groups(program: Program) -> list[Group]:
    """Every dependency group that holds a weight, in the order in which weights are read.

    Args:
        program: usually canonicalised, so that attention and norms are single operators.
    """
    state = couple(program)
    made_of = _Leaves()
    members: dict[Channels, list[tuple[str, int]]] = {}
    for name, axes in state.weights.items():
        for place, axis in enumerate(axes):
            for leaf in made_of(axis):
                members.setdefault(leaf, []).append((name, place))
    values: dict[Channels, list[tuple[fx.Node, int]]] = {leaf: [] for leaf in members}
    for node, axes in state.axes.items():
        for place, axis in enumerate(axes if node.op != "get_attr" else ()):
            for leaf in made_of(axis):
                if leaf in values:
                    values[leaf].append((node, place))
    contractions: dict[Channels, list[Contraction]] = {}
    for contraction in state.contractions:
        for leaf in made_of(contraction.axis):
            contractions.setdefault(leaf, []).append(contraction)
    kinds, uses = _kinds(state), _weight_uses(program)
    found = []
    for leaf, places in members.items():
        readers = contractions.get(leaf, [])
        summed = _summed(readers)
        indexed = tuple(_member(state, leaf, place, summed.get(place, set()), uses) for place in places)
        kind = kinds.get(leaf, "neuron")
        held = tuple(values[leaf])
        least = max((count for axis, count in state.least if leaf in made_of(axis)), default=1)
        found.append(
            Group(leaf.size, kind, indexed, held, tuple(readers), leaf.frozen, leaf.statistic, leaf, state, least)
        )
    return found


def _close_boundary(state: Coupling, entry: Entry) -> None:
    """Inputs and outputs stay as they are, but for a cache's channels: what one call leaves, the next one takes."""
    slots = entry.cache.slots if entry.cache is not None else ()
    given = dict(zip(entry.signature.input_names, entry.placeholders, strict=True))
    made = list(zip(entry.signature.output_names, entry.output.args[0], strict=True))  # type: ignore[arg-type]
    inner = {slot.input for slot in slots}, {slot.output for slot in slots}
    _close(state, [node for name, node in given.items() if name not in inner[0]], "it is an input of the program")
    results = [node for name, node in made if name not in inner[1] and isinstance(node, fx.Node)]
    _close(state, results, "it is an output of the program")
    for slot in slots:
        before, after = state.of(given[slot.input]), state.of(dict(made)[slot.output])
        for axis, (old, new) in enumerate(zip(before, after, strict=True)):
            if axis in (0, slot.axis):
                freeze(old, "the cache grows along it, or it is the batch")
                freeze(new, "the cache grows along it, or it is the batch")
            else:
                unify(old, new)


def _mark_summed(state: Coupling, contraction: Contraction) -> None:
    """No weight is zero where the channels are summed, so a factor has to be."""
    for leaf in leaves(contraction.axis):
        known = leaf.frozen or leaf.statistic
        if not known and not any(vanishes(state, operand, leaf) for operand in contraction.operands):
            mark(leaf, "values that are not zero at zero weights are summed over it")


class _Leaves:
    """The channels of axes, each looked up once; those that are coupled with themselves are frozen."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Axis, tuple[Channels, ...]]] = {}

    def __call__(self, axis: Axis) -> tuple[Channels, ...]:
        if id(axis) not in self._known:
            for leaf in repeats(axis):
                freeze(leaf, "it is coupled with itself")
            self._known[id(axis)] = axis, tuple(dict.fromkeys(leaves(axis)))
        return self._known[id(axis)][1]


def _summed(contractions: list[Contraction]) -> dict[tuple[str, int], set[fx.Node]]:
    """The operators that sum over each axis of a weight."""
    found: dict[tuple[str, int], set[fx.Node]] = {}
    for each in contractions:
        if each.weight is not None:
            found.setdefault((str(each.weight[0].target), each.weight[1]), set()).add(each.node)
    return found


def _member(
    state: Coupling, leaf: Channels, place: tuple[str, int], summed: set[fx.Node], uses: dict[str, set[fx.Node]]
) -> Member:
    """One axis of a weight; it is only read when every operator that reads the weight sums over this axis."""
    name, axis = place
    index = positions(state.weights[name][axis], leaf)
    if index is None:  # frozen, since it is coupled with itself
        index = torch.empty(leaf.size, 0, dtype=torch.int64)
    return Member(name, axis, index, summed == uses[name])


def _weight_uses(program: Program) -> dict[str, set[fx.Node]]:
    """The operators that read each weight, in any entry."""
    found: dict[str, set[fx.Node]] = {}
    for _, node in program.nodes():
        if node.op == "get_attr":
            found.setdefault(str(node.target), set()).update(node.users)
    return found


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
    for kind in reversed(KINDS):
        for axis, hint in state.hints:
            if hint == kind:
                found.update(dict.fromkeys(leaves(axis), kind))
    return found


__all__ = ["Group", "Member", "couple", "groups"]
