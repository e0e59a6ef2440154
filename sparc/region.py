"""Regions: pieces of a graph, cut out along a boundary so that they can be run by themselves."""

from collections.abc import Iterable, Sequence

from torch import fx


def region_inputs(results: Iterable[fx.Node], inner: set[fx.Node]) -> list[fx.Node]:
    """The nodes outside `inner` that the computation of `results` reads; weights are no inputs."""
    found: dict[fx.Node, None] = {}
    seen: set[fx.Node] = set()
    stack = list(results)
    while stack:
        node = stack.pop()
        if node in seen or node.op == "get_attr":
            continue
        seen.add(node)
        if node in inner:
            stack.extend(node.all_input_nodes)
        else:
            found.setdefault(node)
    return list(found)


def region(results: Sequence[fx.Node], inner: set[fx.Node], boundary: Iterable[fx.Node]) -> fx.Graph:
    """A graph of its own that computes `results` from `boundary` through the `inner` nodes and weights."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in boundary:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)

    def copy(node: fx.Node) -> fx.Node:
        if node not in copies:
            for used in node.all_input_nodes:
                copy(used)
            copies[node] = graph.node_copy(node, lambda used: copies[used])
            copies[node].meta = dict(node.meta)
        return copies[node]

    graph.output([copy(result) for result in results])
    return graph


def cone(results: Iterable[fx.Node]) -> tuple[fx.Node, ...]:
    """Every call that `results` are computed from, inputs first, the results among them.

    A rewrite that relies on what a value *is* (a mask proved to be causal) names the value's cone as matched, so that
    its check computes the value instead of making one up.
    """
    found: dict[fx.Node, None] = {}

    def visit(node: fx.Node) -> None:
        if node.op == "call_function" and node not in found:
            for used in node.all_input_nodes:
                visit(used)
            found[node] = None

    for result in results:
        visit(result)
    return tuple(found)
