"""Normalisations over the features, as models write them in half precision: in float32 between casts, the gain
after.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from sparc.analysis.values import tensor_type
from sparc.program import is_weight

aten = torch.ops.aten

_NORMS: dict[Any, Literal["rms_norm", "layer_norm"]] = {
    aten.rms_norm.default: "rms_norm",
    aten.layer_norm.default: "layer_norm",
}


@dataclass(frozen=True)
class Norm:
    """A normalisation that a prologue can do.

    Args:
        kind: which.
        source: what is normalised, in the type of the result.
        gain: `[features]`, if there is one.
        bias: likewise.
        epsilon: what is added to the mean square.
        nodes: everything between `source` and the result, the result among them.
    """

    kind: Literal["rms_norm", "layer_norm"]
    source: fx.Node
    gain: fx.Node | None
    bias: fx.Node | None
    epsilon: float
    nodes: tuple[fx.Node, ...]


def find_norm(result: fx.Node) -> Norm | None:
    """The normalisation whose value a node is: `norm(x)`, `cast(norm(cast(x)))`, `gain * cast(norm(cast(x)))`."""
    nodes: list[fx.Node] = []
    current, gain = _without_gain(result)
    if gain is not None:
        nodes.append(result)
    current = _skip_cast(current, nodes)
    if current.target not in _NORMS or len(current.args[1]) != 1:  # type: ignore[arg-type]
        return None
    own_gain, bias = ([*current.args, None, None][2:4]) if _is_layer(current) else ([*current.args, None][2], None)
    if (gain is not None and (own_gain is not None or bias is not None)) or not isinstance(current.args[0], fx.Node):
        return None
    nodes.append(current)
    source = _skip_cast(current.args[0], nodes)
    before, after = tensor_type(source), tensor_type(result)
    if before is None or after is None or before.dtype != after.dtype:
        return None
    chosen = gain if gain is not None else own_gain
    return Norm(_NORMS[current.target], source, chosen, bias, _epsilon(current), tuple(nodes))  # type: ignore[arg-type]


def _without_gain(node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """A product with a weight of the features' size, taken apart."""
    if node.target is not aten.mul.Tensor:
        return node, None
    for value, gain in (node.args, node.args[::-1]):
        kind = tensor_type(gain)
        if isinstance(value, fx.Node) and is_weight(gain) and kind is not None and kind.ndim == 1:
            own = tensor_type(node)
            if own is not None and kind.shape[0] == own.shape[-1]:
                return value, gain  # type: ignore[return-value]
    return node, None


def _skip_cast(node: fx.Node, nodes: list[fx.Node]) -> fx.Node:
    if node.target is aten.to.dtype and isinstance(node.args[0], fx.Node):
        nodes.append(node)
        return node.args[0]
    return node


def _is_layer(node: fx.Node) -> bool:
    return node.target is aten.layer_norm.default


def _epsilon(node: fx.Node) -> float:
    position = 4 if _is_layer(node) else 3
    value = node.args[position] if len(node.args) > position else node.kwargs.get("eps")
    if isinstance(value, (int, float)):
        return float(value)
    if _is_layer(node):
        return 1e-5
    kind = tensor_type(node)
    assert kind is not None
    wide = torch.float32 if kind.dtype in (torch.float16, torch.bfloat16) else kind.dtype  # as torch computes it
    return float(torch.finfo(wide).eps)
