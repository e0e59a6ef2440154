"""Codes instead of numbers between products: what only moves elements of a decoded activation moves its codes.

A value is quantized where it is made, and products read it behind reshapes and poolings. Decoding commutes with all
that copies or selects elements, so that it can come last, where a product takes the codes.
"""

import operator

import torch
from torch import fx

from sparc.analysis.features import packet
from sparc.codegen.triton.static import Coded, match_coded
from sparc.encoding.operators import is_decode
from sparc.program import Entry

aten = torch.ops.aten

_MOVING = frozenset(
    {
        *(aten.view, aten.reshape, aten.flatten, aten.unflatten, aten.squeeze, aten.unsqueeze, aten.transpose),
        *(aten.permute, aten.t, aten.slice, aten.select, aten.narrow, aten.contiguous, aten.clone),
    }
)
_SELECTING = frozenset({aten.max_pool2d, aten.upsample_nearest2d})  # which torch does not do on codes everywhere
_PRODUCTS = (aten.linear.default, aten.conv2d.default)


def carry_codes(entry: Entry) -> None:
    """Decode behind reshapes; behind poolings that a product reads, quantize again, which finds the same codes.

    Args:
        entry: the graph, which is edited.
    """
    for node in list(entry.graph.nodes):
        coded = match_coded(node.args[0]) if node.args else None
        if coded is None or is_decode(node):
            continue
        if packet(node) in _MOVING:
            codes = entry.call(node.target, coded.codes, *node.args[1:], before=node, like=node, **node.kwargs)
        elif packet(node) in _SELECTING and _is_exact(node) and any(_leads_to_product(each) for each in node.users):
            codes = _quantized(entry, node, coded)
        else:
            continue
        decode = node.args[0]
        parts = [codes, *coded.parameters]
        decoded = entry.call(decode.target, parts, *decode.args[1:], before=node, like=node)
        node.replace_all_uses_with(decoded)
        entry.graph.erase_node(node)


def _quantized(entry: Entry, node: fx.Node, coded: Coded) -> fx.Node:
    """The codes of what a node selects, which lie on the grid."""
    selected = entry.call(node.target, *node.args, before=node, like=node, **node.kwargs)
    spec = node.args[0].args[1]  # type: ignore[union-attr]
    quantize = torch.ops.sparc.quantize.default
    made = entry.call(quantize, selected, list(coded.parameters), spec, before=node, like=node)
    return entry.call(operator.getitem, made, 0, before=node, like=node)


def _is_exact(node: fx.Node) -> bool:
    """Whether a number tells its code: 255 steps are more than bfloat16 tells apart."""
    return bool(node.meta["val"].dtype in (torch.float16, torch.float32))


def _leads_to_product(node: fx.Node) -> bool:
    moves = packet(node) in _MOVING | _SELECTING
    return node.target in _PRODUCTS or (moves and any(_leads_to_product(each) for each in node.users))
