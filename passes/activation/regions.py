"""Which values of a graph are quantized so that a stretch of it computes in integers from end to end.

Three kinds of operators matter around the chosen products (convolutions and linears whose weights are rounded):
- *absorbed* ones (relu, relu6, clamp) disappear in the quantization that follows them, whose range ends where they
  clip;
- *carriers* (reshape, transpose, max-pool, ...) only move or select elements, so they may as well move codes;
- *joining* operators (add, mul, concat, average pooling, ...) have kernels on codes when all they read and write is
  quantized, or are cheap enough not to break the stretch.
"""

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx

from sparc.encoding.operators import is_decode, is_quantize
from sparc.passes.activation.insert import is_activation_decode, quantized_value

aten = torch.ops.aten

ABSORBED = frozenset({aten.relu, aten.relu6, aten.hardtanh, aten.clamp, aten.clamp_min})
CARRIERS = frozenset(
    {
        *(aten.max_pool2d, aten.max_pool3d, aten.upsample_nearest2d, aten.pixel_shuffle),
        *(
            aten.reshape,
            aten.view,
            aten.flatten,
            aten.unflatten,
            aten.squeeze,
            aten.unsqueeze,
            aten.expand,
            aten.repeat,
        ),
        *(aten.transpose, aten.permute, aten.t, aten.slice, aten.select, aten.narrow, aten.flip, aten.roll),
        *(aten.split, aten.chunk, aten.split_with_sizes, aten.contiguous, aten.clone, aten.dropout),
    }
)
JOINING = frozenset(
    {
        *(aten.add, aten.mul, aten.cat, aten.avg_pool1d, aten.avg_pool2d, aten.adaptive_avg_pool1d),
        *(aten.adaptive_avg_pool2d, aten.mean, aten.sigmoid, aten.leaky_relu, aten.hardswish, aten.hardsigmoid),
    }
)
CONVOLUTIONS = frozenset({aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution})


def packet(node: fx.Node) -> Any:
    """The operator of a node without its overload."""
    return getattr(node.target, "overloadpacket", node.target)


def is_carrier(node: fx.Node) -> bool:
    """Whether a node only moves or selects elements of its first argument."""
    if node.target is operator.getitem:
        return isinstance(node.args[0], fx.Node) and is_carrier(node.args[0])
    return packet(node) in CARRIERS


def is_zero_pad(node: fx.Node) -> bool:
    """Whether a node pads with zeros, which every activation grid represents exactly."""
    if packet(node) is aten.pad:
        mode = node.args[2] if len(node.args) > 2 else "constant"
        value = node.args[3] if len(node.args) > 3 else 0
        return mode == "constant" and not value
    if packet(node) is aten.constant_pad_nd:
        return len(node.args) < 3 or not node.args[2]
    return False


def root(value: fx.Node) -> fx.Node:
    """The value whose elements `value` carries: behind carriers, zero padding and pairs that are already there."""
    while True:
        if is_decode(value) and is_activation_decode(value):
            behind = quantized_value(value)
            if behind is None:
                return value
            value = behind
        elif is_carrier(value) or is_zero_pad(value):
            value = value.args[0]  # type: ignore[assignment]
        else:
            return value


def absorbing(value: fx.Node) -> fx.Node:
    """The last of the absorbed operators that follow a value one by one, or the value itself."""
    while len(value.users) == 1:
        user = next(iter(value.users))
        if packet(user) not in ABSORBED or user.args[0] is not value:
            break
        value = user
    return value


def values_to_quantize(graph: fx.Graph, products: Collection[fx.Node]) -> list[fx.Node]:
    """The values to quantize, in the order of the graph.

    These are: what a chosen product reads (behind carriers); what a chosen convolution writes; what a joining operator
    writes, if everything it reads is quantized and something quantized reads it. Values that are quantized already
    count as such and are not returned.

    Args:
        graph: the graph.
        products: chosen convolutions and linears.
    """
    wanted: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node in products:
            wanted.setdefault(root(product_input(node)))
            if packet(node) in CONVOLUTIONS:
                wanted.setdefault(absorbing(node))
        elif packet(node) in JOINING and _feeds(node, products) and _reads_quantized(node, wanted):
            wanted.setdefault(absorbing(node))
    order = {node: index for index, node in enumerate(graph.nodes)}
    fresh = [value for value in wanted if _is_float(value) and not is_quantized_already(value)]
    return sorted(fresh, key=order.__getitem__)


def product_input(node: fx.Node) -> fx.Node:
    """The activation that a product reads."""
    return node.args[1 if packet(node) is aten.addmm else 0]  # type: ignore[return-value]


def is_quantized_already(value: fx.Node) -> bool:
    """Whether a quantize node reads the value, or it is a decoded activation itself."""
    if is_decode(value):
        return is_activation_decode(value)
    return any(is_quantize(user) for user in value.users)


def _reads_quantized(node: fx.Node, wanted: Collection[fx.Node]) -> bool:
    read = [used for used in node.all_input_nodes if used.op != "get_attr"]
    roots = [root(used) for used in read]
    return bool(roots) and all(each in wanted or is_quantized_already(each) for each in roots)


def _feeds(node: fx.Node, products: Collection[fx.Node]) -> bool:
    """Whether a product or a joining operator reads the value, at once or behind carriers and absorbed operators."""
    stack, seen = list(node.users), set()
    while stack:
        user = stack.pop()
        if user in seen:
            continue
        seen.add(user)
        if user in products or packet(user) in JOINING:
            return True
        if is_carrier(user) or is_zero_pad(user) or packet(user) in ABSORBED or _is_pair(user):
            stack.extend(user.users)
    return False


def _is_pair(node: fx.Node) -> bool:
    return node.target is operator.getitem or is_decode(node) or is_quantize(node)


def _is_float(value: fx.Node) -> bool:
    kind = value.meta.get("val")
    return isinstance(kind, Tensor) and kind.is_floating_point() and value.op != "get_attr"
