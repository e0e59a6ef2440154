"""Results that share memory with an input or with each other: what a runtime computes, and the views taken afterwards.

A runtime other than torch hands out fresh memory. So a program computes what owns its memory, and the views that the
fragment returns are taken of that, and of the inputs, in torch.
"""

import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sparc.execute import execute
from sparc.functional import memory_of
from sparc.region import region


@dataclass(frozen=True)
class Results:
    """How the results of a fragment come about.

    Args:
        computed: the nodes that a program computes.
        orders: for each of those, its axes from the longest stride to the shortest.
        rest: from arguments of the fragment and computed values to all results.
        needed: which of the arguments and, counted on, the computed values `rest` takes.
    """

    computed: tuple[fx.Node, ...]
    orders: tuple[tuple[int, ...], ...]
    rest: fx.Graph
    needed: tuple[int, ...]

    def finish(self, arguments: Sequence[Any], computed: Sequence[Tensor]) -> tuple[Any, ...]:
        """The fragment's results.

        Args:
            arguments: the fragment's, weights and sizes among them.
            computed: what the program computed, in memory of its own.
        """
        ordered = [_ordered(value, order) for value, order in zip(computed, self.orders, strict=True)]
        known = [*arguments, *ordered]
        return tuple(execute(self.rest, {}, [known[index] for index in self.needed], grad=torch.is_grad_enabled()))


def plan_results(graph: fx.Graph, arguments: Sequence[fx.Node]) -> Results:
    """Decide what is computed and what is a view.

    Args:
        graph: a pure graph whose values know what memory they lie in.
        arguments: its placeholders for the fragment's arguments.
    """
    results = graph.output_node().args[0]
    assert isinstance(results, (tuple, list))
    nodes = {node for node in results if isinstance(node, fx.Node)}
    owners = Counter(memory_of(node.meta["val"]) for node in nodes)
    given = {memory_of(node.meta.get("val")) for node in arguments} - {None}
    computed: dict[fx.Node, None] = {}

    def visit(node: fx.Node, view: bool) -> None:
        if node in arguments or node in computed:
            return
        value = node.meta["val"]
        if isinstance(value, Tensor) and not (view and _source(node)):
            computed[node] = None
            return
        for used in node.all_input_nodes:
            visit(used, True)

    for node in results:
        if isinstance(node, fx.Node):
            value = node.meta["val"]
            memory = memory_of(value)
            shared = memory in given or owners[memory] > 1
            visit(node, shared or not (isinstance(value, Tensor) and _order(value) == tuple(range(value.ndim))))
    orders = tuple(_order(node.meta["val"]) for node in computed)
    return Results(tuple(computed), orders, *_rest(results, [*arguments, *computed]))


def _rest(results: Sequence[Any], boundary: Sequence[fx.Node]) -> tuple[fx.Graph, tuple[int, ...]]:
    """The graph from the boundary to the results, and which nodes of the boundary it takes."""
    nodes = list(dict.fromkeys(node for node in results if isinstance(node, fx.Node)))
    graph = region(nodes, set(), boundary)
    output = graph.output_node()
    copies = dict(zip(nodes, output.args[0], strict=True))  # type: ignore[arg-type]
    output.args = ([copies.get(each, each) if isinstance(each, fx.Node) else each for each in results],)
    needed = []
    for index, placeholder in enumerate(graph.find_nodes(op="placeholder")):
        if placeholder.users:
            needed.append(index)
        else:
            graph.erase_node(placeholder)
    return graph, tuple(needed)


def _source(node: fx.Node) -> fx.Node | None:
    """What a tensor is a view of."""
    maker = node.args[0] if node.target is operator.getitem else node
    assert isinstance(maker, fx.Node)
    memory = memory_of(node.meta["val"])
    return next((used for used in maker.all_input_nodes if memory_of(used.meta.get("val")) == memory), None)


def _order(value: Tensor) -> tuple[int, ...]:
    """The axes from the longest stride to the shortest, by the example's sizes."""
    strides = [int(stride) if isinstance(stride, int) else int(stride.node.hint) for stride in value.stride()]
    sizes = [int(size) if isinstance(size, int) else int(size.node.hint) for size in value.shape]
    axes = [axis for axis in range(value.ndim) if sizes[axis] != 1]
    ranked = iter(sorted(axes, key=lambda axis: (-strides[axis], axis)))
    return tuple(next(ranked) if sizes[axis] != 1 else axis for axis in range(value.ndim))


def _ordered(value: Tensor, order: tuple[int, ...]) -> Tensor:
    """The value with its axes in this order in memory, without gaps."""
    back = [order.index(axis) for axis in range(value.ndim)]
    return value.permute(order).contiguous().permute(back)


def owned(values: Sequence[Tensor], others: set[int]) -> list[Tensor]:
    """The values, copied where they lie in memory of another one or in `others`.

    Args:
        values: what a program computed.
        others: addresses of the storages of inputs and weights.
    """
    taken = set(others)
    found = []
    for value in values:
        if address(value) in taken:
            value = value.clone()
        taken.add(address(value))
        found.append(value)
    return found


def address(value: Tensor) -> int:
    """Where the memory of a tensor begins."""
    return value.untyped_storage().data_ptr()
