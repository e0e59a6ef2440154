"""Recognised forms: what has no operator of its own in ATen, and how every spelling of it looks after `canonicalize`.

A lowering asks `find_rotary(graph)`, `find_gated(graph)` or `find_quick_gelu(graph)` for the places, each with the
nodes it covers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sparc.analysis.values import same_shape, same_size, shape_of

aten = torch.ops.aten

_ACTIVATIONS = (aten.silu.default, aten.gelu.default, aten.relu.default, aten.sigmoid.default, aten.tanh.default)
_FLATTENS = ("flatten", "reshape", "reshape_as", "view")
_KEEPS_PAIRS = ("cos", "sin", "to", "neg", "mul", "div", "unsqueeze", "expand", "slice", "select", "embedding", "index")


def _name(node: Any) -> str:
    return str(getattr(node.target, "_opname", None) or getattr(node.target, "__name__", "")) if _is_call(node) else ""


def _is_call(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function"


def _last(axis: Any, node: fx.Node) -> bool:
    rank = len(shape_of(node))
    return isinstance(axis, int) and axis % rank == rank - 1


# rotary position embedding -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Rotary:
    """A rotary position embedding: `result = x * cos + turn(x) * sin` over the last axis.

    `turn` is `cat([-x[half:], x[:half]])`; when `interleaved` it turns each pair `(a, b)` of neighbours to `(-b, a)`:
    `flatten(stack([-x[1::2], x[0::2]], -1))`.

    Args:
        result: the sum, `[..., features]`.
        x: what is turned, `[..., features]`.
        cos: broadcast to x.
        sin: broadcast to x.
        interleaved: which elements form a pair.
        nodes: every node of the form but for `whole`, inputs first, `result` last.
        whole: `cat([result, rest])` when only the first features of a tensor are turned; else `result`.
        source: what `whole` is computed from: x itself, or the tensor that x was cut from.
        symmetric: whether both elements of a pair are known to share one cosine and one sine, so that a table of half
            the width says everything.
    """

    result: fx.Node
    x: fx.Node
    cos: fx.Node
    sin: fx.Node
    interleaved: bool
    nodes: tuple[fx.Node, ...]
    whole: fx.Node
    source: fx.Node
    symmetric: bool


def find_rotary(graph: fx.Graph, weights: Mapping[str, Tensor] | None = None) -> list[Rotary]:
    """Every rotary position embedding of a canonical graph.

    Args:
        graph: the graph.
        weights: the program's; with them, tables of cosines that are weights can be shown to be symmetric.
    """
    found = (_rotary_at(node, weights or {}) for node in graph.nodes)
    return [each for each in found if each is not None]


def _rotary_at(node: fx.Node, weights: Mapping[str, Tensor]) -> Rotary | None:
    if node.target is not aten.add.Tensor or node.kwargs:
        return None
    for straight, turned in (node.args[:2], node.args[1::-1]):
        if not (_name(straight) == _name(turned) == "mul"):
            continue
        for turn, sin in (turned.args[:2], turned.args[1::-1]):  # type: ignore[union-attr]
            x, interleaved, inner = _turn(turn)
            if x is None or x not in straight.args or not isinstance(sin, fx.Node):  # type: ignore[union-attr]
                continue
            cos: Any = straight.args[1 - straight.args.index(x)]  # type: ignore[union-attr]
            if not isinstance(cos, fx.Node):
                continue
            nodes = (*inner, straight, turned, node)
            whole, source = _whole(node, x)
            symmetric = all(_is_doubled(each, interleaved, weights) for each in (cos, sin))
            return Rotary(node, x, cos, sin, interleaved, nodes, whole, source, symmetric)  # type: ignore[arg-type]
    return None


def _turn(node: Any) -> tuple[fx.Node | None, bool, tuple[fx.Node, ...]]:
    """What a node is the quarter turn of, whether the pairs are neighbours, and the nodes that turn it."""
    if _name(node) == "cat" and len(node.args[0]) == 2 and _last(node.args[1] if len(node.args) > 1 else 0, node):
        found = _negated_pair(node.args[0], _half)
        return (None, False, ()) if found is None else (found[0], False, (*found[1], node))
    stack: Any = node.args[0] if _name(node) in _FLATTENS else None
    if (
        _name(stack) == "stack"
        and len(stack.args[0]) == 2
        and _last(stack.args[1] if len(stack.args) > 1 else 0, stack)
    ):
        found = _negated_pair(stack.args[0], _neighbour)
        if found is not None and same_shape(shape_of(node), shape_of(found[0])):
            return found[0], True, (*found[1], stack, node)
    return None, False, ()


def _negated_pair(parts: Any, piece: Any) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """`[-second(x), first(x)]`."""
    negative, first = parts
    if _name(negative) != "neg":
        return None
    second = negative.args[0]
    a, b = piece(first, 0), piece(second, 1)
    if a is None or b is None or a[0] is not b[0]:
        return None
    return a[0], (*dict.fromkeys((*a[1], *b[1])), negative)


def _half(node: Any, index: int) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """The tensor that a node is the first or second half of along the last axis."""
    if _name(node) == "getitem" and _name(node.args[0]) in ("split", "chunk", "split_with_sizes"):
        pieces = node.args[0]
        sizes = [shape_of_piece[-1] for shape_of_piece in (piece.shape for piece in pieces.meta["val"])]
        fits = (
            len(sizes) == 2
            and sizes[0] == sizes[1]
            and _last(pieces.args[2] if len(pieces.args) > 2 else 0, pieces.args[0])
        )
        return (pieces.args[0], (pieces, node)) if fits and node.args[1] == index else None
    if _name(node) != "slice" or len(node.args) != 4 or not _last(node.args[1], node):
        return None
    x, _, start, _ = node.args
    width = shape_of(x)[-1]
    if not isinstance(width, int) or width % 2 or not same_size(shape_of(node)[-1], width // 2):
        return None
    return (x, (node,)) if start in ((0, None) if index == 0 else (width // 2, -(width // 2))) else None


def _neighbour(node: Any, index: int) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """The tensor that a node holds every second element of."""
    if _name(node) != "slice" or len(node.args) != 5 or node.args[4] != 2 or not _last(node.args[1], node):
        return None
    x, _, start, _, _ = node.args
    complete = same_size(2 * shape_of(node)[-1], shape_of(x)[-1])
    return (x, (node,)) if complete and (start or 0) == index else None


def _whole(result: fx.Node, x: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The concatenation with the features that are not turned, and the tensor both parts come from."""
    for user in result.users:
        parts: Any = user.args[0] if _name(user) == "cat" else ()
        if len(parts) != 2 or parts[0] is not result or not _name(x) == _name(parts[1]) == "slice":
            continue
        source: Any = x.args[0]
        if source is parts[1].args[0] and same_shape(shape_of(user), shape_of(source)):
            return user, source
    return result, x


def _is_doubled(node: Any, interleaved: bool, weights: Mapping[str, Tensor]) -> bool:
    """Whether both elements of every pair of a table are equal."""
    if isinstance(node, fx.Node) and node.op == "get_attr":
        table = weights.get(str(node.target))
        if table is None or table.ndim == 0 or table.shape[-1] % 2:
            return False
        half = table.shape[-1] // 2
        pairs = (table[..., 0::2], table[..., 1::2]) if interleaved else (table[..., :half], table[..., half:])
        return torch.equal(*pairs)
    name = _name(node)
    if name == "cat" and not interleaved:
        parts = node.args[0]
        return len(parts) == 2 and parts[0] is parts[1] and _last(node.args[1] if len(node.args) > 1 else 0, node)
    if name == "repeat_interleave" and interleaved:
        return node.args[1] == 2 and _last(node.args[2] if len(node.args) > 2 else None, node)
    if name in _FLATTENS and _name(node.args[0]) == "stack" and interleaved:
        parts = node.args[0].args[0]
        return len(parts) == 2 and parts[0] is parts[1] and same_size(2 * shape_of(parts[0])[-1], shape_of(node)[-1])
    if name not in _KEEPS_PAIRS or not node.args:
        return False
    inner = node.args[0]
    keeps = isinstance(inner, fx.Node) and same_size(shape_of(inner)[-1], shape_of(node)[-1])
    scalar = name not in ("mul", "div") or not isinstance(node.args[1], fx.Node) or not shape_of(node.args[1])
    return keeps and scalar and _is_doubled(inner, interleaved, weights)


# gates and activations -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Gated:
    """A gated unit: `result = activation(gate) * up` (SwiGLU with silu, GEGLU with gelu).

    Args:
        result: the product.
        activation: the node of the activation.
        gate: its input.
        up: the other factor, of the same type.
        packed: the one tensor that gate and up are the two halves of, if there is one; gate comes first when
            `gate_first`.
        gate_first: the order in `packed`.
    """

    result: fx.Node
    activation: fx.Node
    gate: fx.Node
    up: fx.Node
    packed: fx.Node | None = None
    gate_first: bool = True


def find_gated(graph: fx.Graph) -> list[Gated]:
    """Every gated unit whose gate is read by nothing else."""
    return [each for each in (_gated_at(node) for node in graph.nodes) if each is not None]


def _gated_at(node: fx.Node) -> Gated | None:
    if node.target is not aten.mul.Tensor:
        return None
    for activation, up in (node.args[:2], node.args[1::-1]):
        if not isinstance(activation, fx.Node) or not isinstance(up, fx.Node) or activation.target not in _ACTIVATIONS:
            continue
        gate: Any = activation.args[0]
        if len(activation.users) > 1 or up in (gate, *gate.args) or not same_shape(shape_of(gate), shape_of(up)):
            continue
        for first, second, gate_first in ((gate, up, True), (up, gate, False)):
            a, b = _half(first, 0), _half(second, 1)
            if a is not None and b is not None and a[0] is b[0]:
                return Gated(node, activation, gate, up, a[0], gate_first)
        return Gated(node, activation, gate, up)
    return None


@dataclass(frozen=True)
class QuickGelu:
    """`result = x * sigmoid(1.702 * x)`, the sigmoid approximation of GELU."""

    result: fx.Node
    x: fx.Node
    nodes: tuple[fx.Node, ...]


def find_quick_gelu(graph: fx.Graph) -> list[QuickGelu]:
    """Every GELU in its sigmoid approximation."""
    return list(_quick_gelus(graph))


def _quick_gelus(graph: fx.Graph) -> Iterator[QuickGelu]:
    for node in graph.nodes:
        if node.target is not aten.mul.Tensor:
            continue
        for x, gate in (node.args[:2], node.args[1::-1]):
            scaled: Any = gate.args[0] if _name(gate) == "sigmoid" else None  # type: ignore[union-attr]
            if _name(scaled) == "mul" and x in scaled.args and 1.702 in scaled.args:
                yield QuickGelu(node, x, (scaled, gate, node))  # type: ignore[arg-type]
                break
