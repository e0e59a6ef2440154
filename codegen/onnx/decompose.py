"""Operators without a translation of their own: torch's decomposition of the one node is traced and emitted instead."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from sparc.codegen.onnx.emit import Emitter, Result


def decomposition(e: Emitter, node: fx.Node) -> fx.Graph | None:
    """The node's operator as a graph of others, one placeholder for each node it reads; None when torch has none.

    Args:
        e: the emitter, for the world that symbolic sizes live in.
        node: the call to take apart.
    """
    target = node.target
    assert callable(target)
    values, spec = pytree.tree_flatten((node.args, node.kwargs))
    nodes = [value for value in values if isinstance(value, fx.Node)]

    def call(*inputs: Any) -> Any:
        feed = iter(inputs)
        args, kwargs = pytree.tree_unflatten(
            [next(feed) if isinstance(value, fx.Node) else value for value in values], spec
        )
        return target(*args, **kwargs)

    table = _table(target)
    fakes = [each.meta["val"] for each in nodes]
    try:
        with e.entry.fake_mode, torch.no_grad():
            traced = make_fx(call, decomposition_table=table, tracing_mode="real", _allow_non_fake_inputs=True)(*fakes)
    except Exception:  # torch raises assorted types where it cannot trace
        return None
    inside = [each.target for each in traced.graph.nodes if each.op == "call_function"]
    return None if target in inside or any(each.op == "get_attr" for each in traced.graph.nodes) else traced.graph


def _table(target: Any) -> Mapping[Any, Any]:
    """The decomposition of this operator alone: the parts of what it is made of stay whole."""
    from torch._decomp import decomposition_table

    own = decomposition_table.get(target)
    return {target: own} if own is not None else {}


def emit_decomposed(e: Emitter, node: fx.Node, graph: fx.Graph) -> Result:
    """Emit a decomposition in the place of its node."""
    nodes = [value for value in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(value, fx.Node)]
    for inner, outer in zip([each for each in graph.nodes if each.op == "placeholder"], nodes, strict=True):
        e.assign(inner, e.result(outer))
    for inner in graph.nodes:
        if inner.op == "call_function":
            inner.meta.update({key: node.meta[key] for key in ("module", "source") if key in node.meta})
    results = graph.output_node().args[0]
    if isinstance(results, fx.Node):
        return e.value(results) if isinstance(results.meta["val"], Tensor) else e.result(results)
    assert isinstance(results, Sequence)
    return [e.value(each) if isinstance(each, fx.Node) else None for each in results]
