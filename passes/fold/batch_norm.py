"""Batch normalisation in eval mode is an affine map per channel, and merges into the layer before or after it.

With `s = gamma / sqrt(var + eps)` and `t = beta - mean * s`, `batch_norm(y) = s * y + t`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sparc.contract import Bounded
from sparc.encoding.operators import is_decode
from sparc.pass_base import Stage
from sparc.pattern import Found, normalized_arguments
from sparc.program import Program, is_weight
from sparc.rewrite import Match, Skip, rewrite

aten = torch.ops.aten
Result = fx.Node | Skip

_CONV = {
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
}
_TRANSPOSED = {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}
_LAYERS = {*_CONV, *_TRANSPOSED, aten.linear.default}


def _layer_values(layer: fx.Node) -> dict[str, Any]:
    arguments = normalized_arguments(layer)
    return {
        "x": arguments["input"],
        "w": arguments["weight"],
        "b": arguments.get("bias"),
        "layer": layer,
        "groups": arguments.get("groups", 1),
    }


def _norm_values(norm: fx.Node) -> dict[str, Any]:
    arguments = normalized_arguments(norm)
    names = {"gamma": "weight", "beta": "bias", "mean": "running_mean", "var": "running_var", "eps": "eps"}
    return {short: arguments[name] for short, name in names.items()}


def _reason(program: Program, layer: fx.Node, norm: fx.Node) -> Skip | None:
    """Why a layer and a batch norm next to each other cannot be merged."""
    arguments, values = normalized_arguments(norm), _layer_values(layer)
    if arguments["training"] or arguments["running_mean"] is None or arguments["running_var"] is None:
        return Skip("the batch norm uses the statistics of its batch")
    if not is_weight(values["w"]):
        return Skip(
            "the layer's weight is encoded already" if is_decode(values["w"]) else "the layer's weight is computed"
        )
    if values["b"] is not None and not is_weight(values["b"]):
        return Skip("the layer's bias is computed")
    if not all(each is None or is_weight(each) for name, each in _norm_values(norm).items() if name != "eps"):
        return Skip("the statistics are computed")
    for name in ("w", "b"):
        if values[name] is not None and len(values[name].users) > 1:
            return Skip(f"the layer's {'weight' if name == 'w' else 'bias'} is used more than once")
    if layer.target is aten.linear.default and layer.meta["val"].ndim != 2:
        return Skip("the batch norm's channels are not the linear layer's features")
    return None


def _find_after(program: Program, node: fx.Node) -> Found | Skip | None:
    """batch_norm(layer(x, W, b))."""
    layer = node.args[0] if node.target is aten.batch_norm.default else None
    if not isinstance(layer, fx.Node) or layer.target not in _LAYERS:
        return None
    return _reason(program, layer, node) or Found(
        {**_layer_values(layer), **_norm_values(node)}, (layer, node), (node,)
    )


def _find_before(program: Program, node: fx.Node) -> Found | Skip | None:
    """layer(batch_norm(x), W, b)."""
    norm = node.args[0] if node.target in _LAYERS else None
    if not isinstance(norm, fx.Node) or norm.target is not aten.batch_norm.default:
        return None
    values = {**_layer_values(node), **_norm_values(norm), "x": norm.args[0]}
    return _reason(program, node, norm) or Found(values, (norm, node), (node,))


@dataclass(frozen=True)
class _Affine:
    """scale and shift of a batch norm, `[channels]`, float64."""

    scale: Tensor
    shift: Tensor


def _affine(m: Match) -> _Affine:
    mean, var = m.weight("mean"), m.weight("var")
    assert mean is not None
    assert var is not None
    gamma = m.weight("gamma") if m.gamma is not None else torch.ones_like(var)
    beta = m.weight("beta") if m.beta is not None else torch.zeros_like(var)
    assert gamma is not None
    assert beta is not None
    scale = gamma * (var + m.eps).rsqrt()
    return _Affine(scale, beta - mean * scale)


def _along(m: Match, weight: Tensor, vector: Tensor, *, outputs: bool) -> Tensor:
    """`vector` as a tensor that multiplies each output (or input) channel of the layer's weight.

    A convolution's weight is `[out, in/groups, ...]`, a transposed one's `[in, out/groups, ...]`, a linear one's
    `[out, in]`.
    """
    first_axis = outputs != (m.layer.target in _TRANSPOSED)
    if first_axis:
        return vector.reshape(-1, *[1] * (weight.ndim - 1))
    groups, rows = int(m.groups), weight.shape[0]
    per_group = vector.reshape(groups, 1, -1).expand(groups, rows // groups, -1)
    return per_group.reshape(rows, -1, *[1] * (weight.ndim - 2))


def _rebuild(m: Match, weight: Tensor, bias: Tensor) -> fx.Node:
    """The layer with another weight and bias."""
    w = m.constant(weight, like="w")
    b = m.constant(bias, like="b") if m.b is not None else m.constant(bias, like="w", name="bias")
    arguments = {**normalized_arguments(m.layer), "input": m.x, "weight": w, "bias": b}
    return m.call(m.layer.target, *arguments.values())


@rewrite(find=_find_after, contract=Bounded(1e-4), stage=Stage.FOLD)
def fold_batch_norm(m: Match) -> Result:
    """batch_norm(layer(x, W, b)) => layer(x, s * W, s * b + t), for conv1d to conv3d, transposed convolutions and
    linear.
    """
    affine, weight = _affine(m), m.weight("w")
    assert weight is not None
    bias = m.weight("b") if m.b is not None else None
    shifted = affine.shift if bias is None else bias * affine.scale + affine.shift
    return _rebuild(m, weight * _along(m, weight, affine.scale, outputs=True), shifted)


def _pads(m: Match) -> bool:
    """Whether the layer adds zeros around its input, or drops contributions at the border as transposed convolutions
    do.
    """
    padding = normalized_arguments(m.layer).get("padding", 0)
    if m.layer.target in _TRANSPOSED:
        return True
    return (
        padding != "valid"
        if isinstance(padding, str)
        else any(padding)
        if isinstance(padding, (list, tuple))
        else bool(padding)
    )


@rewrite(find=_find_before, contract=Bounded(1e-4), stage=Stage.FOLD)
def fold_batch_norm_before(m: Match) -> Result:
    """layer(batch_norm(x), W, b) => layer(x, s * W, b + sum(W * t)), where no zero padding would have to become `-t /
    s`.
    """
    affine, weight = _affine(m), m.weight("w")
    assert weight is not None
    if bool((affine.shift != 0).any()) and _pads(m):
        return m.skip("the layer pads with zeros, which the batch norm's shift would not reach")
    bias = m.weight("b") if m.b is not None else None
    if m.layer.target in _TRANSPOSED:
        added = torch.zeros(int(m.groups) * weight.shape[1], dtype=torch.float64)
    else:
        added = (weight * _along(m, weight, affine.shift, outputs=False)).flatten(1).sum(1)
    return _rebuild(m, weight * _along(m, weight, affine.scale, outputs=False), added if bias is None else bias + added)
