"""Run a graph in eager torch, natively or in float64, freeing each value after its last use."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from sparc.grouped import grouped_mm

Values = Mapping[fx.Node, Any]
Watch = Callable[[fx.Node, Any, Values], Any]


def last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node, the values that nobody needs once it has run."""
    seen: set[fx.Node] = set()
    dies: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        for used in dict.fromkeys([node, *node.all_input_nodes]):
            if used not in seen:
                seen.add(used)
                dies.setdefault(node, []).append(used)
    return dies


def widen(value: Any) -> Any:
    """The value in float64 where it is a floating tensor or names a floating dtype; complex and integer values
    unchanged.
    """
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    return value


class WideWeights(Mapping[str, Tensor]):
    """A view of weights that upcasts each floating tensor to float64 once, on first use."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights
        self._wide: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._wide:
            self._wide[name] = widen(self._weights[name])
        return self._wide[name]

    def __iter__(self) -> Iterable[str]:  # type: ignore[override]
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


_WIDE: Mapping[Any, Callable[..., Any]] = {torch.ops.aten._grouped_mm.default: grouped_mm}  # what lacks float64


def run_node(node: fx.Node, env: Values, weights: Mapping[str, Tensor], *, wide: bool = False) -> Any:
    """The value of one `get_attr` or `call_function` node, its arguments taken from `env`.

    sparc's own operators compute in their own precision even in a wide run, since rounding is part of their meaning.
    """
    if node.op == "get_attr":
        return weights[str(node.target)]
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda used: env[used])
    if wide and getattr(node.target, "namespace", "") == "sparc":
        return pytree.tree_map(widen, node.target(*args, **kwargs))  # type: ignore[operator]
    if wide:
        args, kwargs = fx.node.map_aggregate((args, kwargs), widen)  # type: ignore[misc]
        return _WIDE.get(node.target, node.target)(*args, **kwargs)  # type: ignore[operator]
    return node.target(*args, **kwargs)  # type: ignore[operator]


def execute(
    graph: fx.Graph,
    weights: Mapping[str, Tensor],
    inputs: Sequence[Any],
    *,
    wide: bool = False,
    watch: Watch | None = None,
    grad: bool = False,
) -> list[Any]:
    """Run `graph` on one value per placeholder and return the flat list of its outputs.

    Args:
        graph: a graph of `placeholder`, `get_attr`, `call_function` and `output` nodes.
        weights: tensors by the names that `get_attr` nodes use.
        inputs: one value per placeholder, in order.
        wide: compute in float64: weights, inputs and every cast to a floating dtype.
        watch: called with each node, its value as soon as it is computed, and the values alive then (its arguments
            among them); what
            it returns, when not None, replaces the value.
        grad: record gradients.
    """
    env: dict[fx.Node, Any] = {}
    dies = last_uses(graph)
    feed = iter(inputs)
    if wide and not isinstance(weights, WideWeights):
        weights = WideWeights(weights)
    with torch.set_grad_enabled(grad):
        for node in graph.nodes:
            if node.op == "placeholder":
                env[node] = widen(next(feed)) if wide else next(feed)
            elif node.op == "output":
                return list(fx.node.map_arg(node.args[0], lambda used: env[used]))
            else:
                env[node] = run_node(node, env, weights, wide=wide)
            if watch is not None:
                replaced = watch(node, env[node], env)
                if replaced is not None:
                    env[node] = replaced
            for dead in dies.get(node, ()):
                del env[dead]
    return []
