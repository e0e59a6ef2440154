"""Which nodes around a product belong to its kernel: the pointwise nodes after it, and the norm or quantizer before
it.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparc.analysis.values import same_shape, tensor_type
from sparc.codegen.triton.access import BATCHED
from sparc.codegen.triton.pointwise import is_pointwise
from sparc.codegen.triton.static import is_step, step_type
from sparc.encoding.operators import is_quantize
from sparc.program import is_weight

_GREATEST = 24  # pointwise nodes that one epilogue takes


@dataclass(frozen=True)
class Tail:
    """The pointwise nodes after a product.

    Args:
        nodes: in the graph's order; empty when there are none.
        result: the one node whose value is used outside.
        operands: the values they read from outside, in order.
    """

    nodes: tuple[fx.Node, ...]
    result: fx.Node
    operands: tuple[fx.Node, ...]


def find_tail(anchors: Sequence[fx.Node], order: Sequence[fx.Node], claimed: Collection[fx.Node] = ()) -> Tail | None:
    """The longest run of pointwise nodes after products that has one result; None when the products are used apart.

    A node is taken when every value it reads is one of the region's, or does not depend on any of them; the kernel then
    runs where the result stood.

    Args:
        anchors: the products; their values have one shape.
        order: the graph's nodes.
        claimed: nodes that another kernel takes.
    """
    taken: dict[fx.Node, None] = dict.fromkeys(anchors)
    dependent: set[fx.Node] = set()
    best = Tail((), anchors[0], ()) if len(anchors) == 1 else None
    start = min(order.index(anchor) for anchor in anchors)
    for node in order[start + 1 :]:
        depends = any(each in taken or each in dependent for each in node.all_input_nodes)
        if node in taken and depends:
            return None  # one product reads the other
        if node in taken or not depends:
            continue
        if node in claimed or len(taken) >= _GREATEST or not _fits(node, anchors[0], taken, dependent):
            dependent.add(node)
            continue
        taken[node] = None
        if _exits(taken) == [node] and not is_quantize(node) and not _widens(node):
            nodes = tuple(each for each in taken if each not in anchors)
            best = Tail(nodes, node, _operands(nodes, taken))
    return best


def _widens(node: fx.Node) -> bool:
    """Whether a node is a cast to a wider type, or decodes: storing its operand and casting when it is read moves fewer
    bytes.
    """
    own, source = tensor_type(node), tensor_type(node.all_input_nodes[0])
    cast = node.target in (torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default) or is_step(node)
    return cast and own is not None and source is not None and own.itemsize > source.itemsize


def _fits(node: fx.Node, anchor: fx.Node, taken: dict[fx.Node, None], dependent: set[fx.Node]) -> bool:
    if not is_pointwise(node) or any(each in dependent for each in node.all_input_nodes):
        return False
    own, wanted = step_type(node), tensor_type(anchor)
    if own is None or wanted is None or not same_shape(own.shape, wanted.shape):
        return False
    return all(each in taken or operand_kind(each, anchor) is not None for each in node.all_input_nodes)


def _exits(taken: dict[fx.Node, None]) -> list[fx.Node]:
    return [node for node in taken if any(user not in taken for user in node.users)]


def _operands(nodes: Sequence[fx.Node], taken: dict[fx.Node, None]) -> tuple[fx.Node, ...]:
    return tuple(dict.fromkeys(each for node in nodes for each in node.all_input_nodes if each not in taken))


def operand_kind(node: fx.Node, anchor: fx.Node) -> Any:
    """How an epilogue reads a value, by its shape: `full`, `feature`, `token` or `scalar`; None when it cannot."""
    own, wanted = tensor_type(node), tensor_type(anchor)
    if own is None or wanted is None or str(own.dtype).removeprefix("torch.") not in _READABLE:
        return None
    if all(isinstance(size, int) and size == 1 for size in own.shape):
        return "scalar"
    if same_shape(own.shape, wanted.shape):
        return "full"
    axis = feature_axis(anchor)
    sizes = [1] * (wanted.ndim - own.ndim) + list(own.shape)
    if len(sizes) != wanted.ndim:
        return None
    others = [size for index, size in enumerate(sizes) if index != axis]
    rest = [size for index, size in enumerate(wanted.shape) if index != axis]
    one = [1] * len(rest) if anchor.target not in BATCHED else [rest[0], 1]  # of each matrix there are features
    if same_shape([sizes[axis]], [wanted.shape[axis]]) and same_shape(others, one):
        return "feature"
    return "token" if sizes[axis] == 1 and own.ndim == wanted.ndim and same_shape(others, rest) else None


_READABLE = ("float16", "bfloat16", "float32", "int8", "uint8")


def feature_axis(anchor: fx.Node) -> int:
    """The axis of a product's features: the last, or the channels of a convolution."""
    kind = tensor_type(anchor)
    assert kind is not None
    return 1 if "conv" in str(anchor.target) else kind.ndim - 1


def only_read_by(node: fx.Node, readers: Sequence[fx.Node]) -> bool:
    """Whether nothing else reads a value."""
    return not is_weight(node) and all(user in readers for user in node.users)
