"""Repeated blocks: stretches of a graph that are the same function of a carried value, one after the other.

They are found from the graph alone. From a value that starts a chain, the *cuts* are the values through which
everything that depends on it must pass, such as a transformer's hidden state between two layers. The stretches between
neighbouring cuts become a sequence of structures, and a repeated block is a stretch of that sequence with a period.
What a block reads but does not compute from the carried value is its own when nothing else reads it (the keys of
cross-attention, a bias gathered from a table), else the loop's invariant (a mask, angles of rotary embeddings).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, fx

from sparc.program import is_weight

_MOST_BLOCKS = 12  # layers that differ in what they read may alternate, such as five local layers and a global one


@dataclass(frozen=True)
class Repetition:
    """One repetition of a block.

    Args:
        carried: the value that it starts from.
        result: the value that it hands to the next one; the last of `nodes`.
        nodes: what it computes, in an order that is the same for all repetitions.
        weights: names of what it reads from the store, in that order; equal names are one weight.
    """

    carried: fx.Node
    result: fx.Node
    nodes: tuple[fx.Node, ...]
    weights: tuple[str, ...]


@dataclass(frozen=True)
class Repeats:
    """A block and its repetitions, in order: each one's result is what the next one starts from.

    Args:
        repetitions: two or more.
        invariants: what every repetition reads besides weights and the carried value.
    """

    repetitions: tuple[Repetition, ...]
    invariants: tuple[fx.Node, ...]

    def __len__(self) -> int:
        return len(self.repetitions)

    def __iter__(self) -> Iterator[Repetition]:
        return iter(self.repetitions)

    @property
    def escape(self) -> fx.Node | None:
        """A value that something outside reads besides the last result, such as keys that the model returns: while it
        is needed, no repetition can be left out.
        """
        following: list[Repetition | None] = [*self.repetitions[1:], None]
        for block, after in zip(self.repetitions, following, strict=True):
            inside = {*block.nodes, *(after.nodes if after is not None else ())}
            for node in block.nodes[:-1] if after is None else block.nodes:
                allowed = inside if node is block.result else set(block.nodes)
                if any(user not in allowed for user in node.users):
                    return node
        return None

    @property
    def shared(self) -> list["Repeats"]:
        """The stretches of two or more neighbours that read the very same weights."""
        stretches = (tuple(found) for _, found in groupby(self.repetitions, key=lambda each: each.weights))
        return [Repeats(found, self.invariants) for found in stretches if len(found) > 1]


def find_repeats(graph: fx.Graph) -> list[Repeats]:
    """The repeated blocks of a graph, in order of their first nodes.

    Blocks are as long as they can be repeated, and every block reads a weight; repeated parts inside a repeated block
    are not listed. The time is linear in the number of nodes for each start of a chain, which is a float input or a
    node that reads a weight outside the blocks already found.
    """
    found: list[Repeats] = []
    taken: set[fx.Node] = set()
    for node in graph.nodes:
        if node in taken or not _starts(node):
            continue
        for each in _Chain(graph, node).repeats():
            nodes = {inner for repetition in each for inner in repetition.nodes}
            if not nodes & taken:
                found.append(each)
                taken |= nodes
    order = {node: index for index, node in enumerate(graph.nodes)}
    return sorted(found, key=lambda each: order[each.repetitions[0].result])


def _starts(node: fx.Node) -> bool:
    kind = node.meta.get("val")
    if not isinstance(kind, Tensor) or not kind.is_floating_point() or not node.users:
        return False
    return node.op == "placeholder" or (node.op == "call_function" and any(map(is_weight, node.all_input_nodes)))


class _Chain:
    """What depends on one value, cut into segments; segment `i` ends at `cuts[i + 1]`."""

    def __init__(self, graph: fx.Graph, start: fx.Node) -> None:
        self._graph = graph
        self.members = _dependents(graph, start)
        self.cuts = _cuts(graph, start, self.members)
        self._segment: dict[fx.Node, int] = {}
        ends = {cut: index for index, cut in enumerate(self.cuts)}
        current = -1
        for node in graph.nodes:
            if node in self.members:
                self._segment[node] = current
                current = ends.get(node, current)

    def repeats(self) -> list[Repeats]:
        """The repeated blocks along the chain."""
        traces = [
            _trace(first, last, self.members.__contains__, exact=False)
            for first, last in zip(self.cuts, self.cuts[1:], strict=False)
        ]
        numbers: dict[Any, int] = {}
        forms = [numbers.setdefault(trace.form, len(numbers)) for trace in traces]
        return list(self._search(forms, [len(trace.nodes) for trace in traces], 0))

    def _search(self, forms: list[int], sizes: list[int], offset: int) -> Iterator[Repeats]:
        """The largest periodic stretch that proves to be a repeated block, and then those on both sides of it."""
        candidates = sorted(
            periodic(forms),
            key=lambda each: (-sum(sizes[each.stop - each.period * each.count : each.stop]), each.period),
        )
        for candidate in candidates:
            found = self._confirm(candidate, offset)
            if found is not None:
                first, stop, repeats = found
                yield from self._search(forms[: first - offset], sizes[: first - offset], offset)
                yield repeats
                yield from self._search(forms[stop - offset :], sizes[stop - offset :], stop)
                return

    def _confirm(self, candidate: "Periodic", offset: int) -> tuple[int, int, Repeats] | None:
        """The longest stretch of truly isomorphic blocks inside a candidate, with blocks of one or more periods."""
        best: tuple[int, int, Repeats] | None = None
        for blocks in range(1, min(candidate.count // 2, _MOST_BLOCKS) + 1):
            length = candidate.period * blocks
            stop = candidate.stop + offset
            starts = list(range(stop - length * (candidate.count // blocks), stop, length))
            traces = self._exact(starts, length)
            for first, count in _equal_stretches([trace.form for trace in traces]):
                if count > 1 and traces[first].weights and (best is None or count * length > best[1] - best[0]):
                    chosen = traces[first : first + count]
                    repeats = Repeats(tuple(trace.repetition() for trace in chosen), chosen[0].outer)
                    best = (starts[first], starts[first] + count * length, repeats)
        return best

    def _exact(self, starts: Sequence[int], length: int) -> list["_Trace"]:
        owner: dict[fx.Node, int | None] = {}
        for node in reversed(self._graph.nodes):
            if node in self.members:
                segment = self._segment[node]
                inside = starts[0] <= segment < starts[-1] + length
                owner[node] = (segment - starts[0]) // length if inside else None
            elif node.op == "call_function" and node.users:
                owners = {owner.get(user) for user in node.users}
                owner[node] = owners.pop() if len(owners) == 1 else None
        inner: dict[int | None, set[fx.Node]] = {}
        for node, index in owner.items():
            inner.setdefault(index, set()).add(node)
        return [
            _trace(self.cuts[start], self.cuts[start + length], inner[index].__contains__, exact=True)
            for index, start in enumerate(starts)
        ]


def _dependents(graph: fx.Graph, start: fx.Node) -> set[fx.Node]:
    """A value and all that is computed from it; sizes do not count, which any value of a layer's shape could give."""
    members = {start}
    for node in graph.nodes:
        sizes = isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool, int, float))
        if node.op == "call_function" and not sizes and any(used in members for used in node.all_input_nodes):
            members.add(node)
    return members


def _cuts(graph: fx.Graph, start: fx.Node, members: set[fx.Node]) -> list[fx.Node]:
    """The values that are alone when they are computed: everything later depends on `start` through them only."""
    unread = {node: sum(user in members for user in node.users) for node in members}
    alive: set[fx.Node] = set()
    cuts = []
    for node in graph.nodes:
        if node not in members:
            continue
        for used in node.all_input_nodes:
            if used in unread:
                unread[used] -= 1
                if unread[used] == 0:
                    alive.discard(used)
        if unread[node]:
            alive.add(node)
        kind = node.meta["val"]
        returned = any(user.op == "output" for user in node.users)
        if isinstance(kind, Tensor) and kind.is_floating_point() and (alive == {node} or (not alive and returned)):
            cuts.append(node)
    return cuts


@dataclass(frozen=True)
class _Trace:
    """What is computed between two cuts, and its structure: equal forms are isomorphic."""

    first: fx.Node
    nodes: tuple[fx.Node, ...]
    weights: tuple[str, ...]
    outer: tuple[fx.Node, ...]
    form: Any

    def repetition(self) -> Repetition:
        return Repetition(self.first, self.nodes[-1], self.nodes, self.weights)


def _trace(first: fx.Node, last: fx.Node, inside: Callable[[fx.Node], bool], *, exact: bool) -> _Trace:
    """Follow `last` back to `first`; operands that are not `inside` stay outside.

    Args:
        first: the cut that the stretch starts from.
        last: the cut that it ends with.
        inside: whether a node belongs to the stretch.
        exact: whether outside values must be the same ones for equal forms, or only of the same type.
    """
    nodes = _post_order(first, last, inside)
    index = {node: number for number, node in enumerate(nodes)}
    weights: dict[str, int] = {}
    outer: dict[fx.Node, None] = {}
    types: list[Any] = []

    def reference(node: fx.Node) -> Any:
        if node is first:
            return ("carried",)
        if node in index:
            return ("node", index[node])
        if is_weight(node):
            if str(node.target) not in weights:
                types.append(_type(node))
            return ("weight", weights.setdefault(str(node.target), len(weights)))
        outer[node] = None
        return (
            "outer",
            node.name if exact else (node.op, node.target if node.op == "call_function" else "", _type(node)),
        )

    calls = [
        (node.target, _type(node), _literal(node.args, reference), _literal(node.kwargs, reference)) for node in nodes
    ]
    return _Trace(first, tuple(nodes), tuple(weights), tuple(outer), (tuple(calls), tuple(types), _type(first)))


def _post_order(first: fx.Node, last: fx.Node, inside: Callable[[fx.Node], bool]) -> list[fx.Node]:
    def operands(node: fx.Node) -> Iterator[fx.Node]:
        return (used for used in node.all_input_nodes if used is not first and used.op == "call_function")

    done: dict[fx.Node, None] = {}
    stack = [(last, operands(last))]
    while stack:
        node, rest = stack[-1]
        following = next((used for used in rest if used not in done and inside(used)), None)
        if following is None:
            done.setdefault(node)
            stack.pop()
        else:
            stack.append((following, operands(following)))
    return list(done)


def _literal(value: Any, reference: Callable[[fx.Node], Any]) -> Any:
    """Arguments as something hashable, with nodes replaced by references."""
    if isinstance(value, fx.Node):
        return reference(value)
    if isinstance(value, (tuple, list)):
        return tuple(_literal(item, reference) for item in value)
    if isinstance(value, dict):
        return tuple((key, _literal(item, reference)) for key, item in sorted(value.items()))
    return repr(value)


def _type(node: fx.Node) -> Any:
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else (value,)
    return tuple(
        (str(each.dtype), *map(str, each.shape)) if isinstance(each, Tensor) else type(each).__name__ for each in values
    )


@dataclass(frozen=True)
class Periodic:
    """A stretch `[start, stop)` of a sequence whose elements repeat every `period`; the last blocks are whole."""

    start: int
    stop: int
    period: int

    @property
    def count(self) -> int:
        """How many whole periods there are."""
        return (self.stop - self.start) // self.period


def periodic(sequence: Sequence[int]) -> Iterator[Periodic]:
    """Every maximal stretch of two or more periods."""
    for period in range(1, len(sequence) // 2 + 1):
        equal = [a == b for a, b in zip(sequence, sequence[period:], strict=False)]
        for start, length in _equal_stretches(equal):
            if equal[start] and length >= period:
                yield Periodic(start, start + length + period, period)


def _equal_stretches(values: Iterable[Any]) -> Iterator[tuple[int, int]]:
    """The start and length of every maximal stretch of equal values."""
    start = 0
    for _, stretch in groupby(values):
        length = sum(1 for _ in stretch)
        yield start, length
        start += length
