"""Feature axes: operators that treat every feature of a value alike, so that a linear map of the features commutes.

Axes are counted from the end (-1 is the last), so that broadcasting over leading axes does not move them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sparc.analysis.values import same_size, scalar_value, size_expression, tensor_type
from sparc.pattern import normalized_arguments
from sparc.program import Program, is_weight

aten = torch.ops.aten

CONVOLUTIONS = frozenset({aten.conv1d, aten.conv2d, aten.conv3d})
NORMS = frozenset({aten.layer_norm, aten.rms_norm})
_SHAPES = frozenset({aten.sym_size, aten.zeros_like, aten.ones_like, aten.full_like, aten.new_zeros, aten.new_ones})


def packet(node: Any) -> Any:
    """The operator of a node without its overload; for what is no call, the kind of node (`placeholder`)."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return getattr(node, "op", None)
    return getattr(node.target, "overloadpacket", node.target)


def operator_name(node: fx.Node) -> str:
    """How a remark names what a node computes."""
    if node.op == "output":
        return "the program's output"
    return str(getattr(packet(node), "__name__", node.op))


def reads_shape_only(node: fx.Node) -> bool:
    """Whether a call takes nothing but sizes and types from its argument."""
    return packet(node) in _SHAPES


def product_axes(node: Any) -> tuple[int, int] | None:
    """The feature axes of the input and the result of a linear layer or an ungrouped convolution; None for others.

    A linear layer whose weight is a vector has no features in its result.
    """
    kind = packet(node)
    if kind is not aten.linear and kind not in CONVOLUTIONS:
        return None
    arguments = normalized_arguments(node)
    axis = 1 - int(arguments["weight"].meta["val"].ndim)  # the same with and without a batch
    return (axis, axis) if axis < 0 and arguments.get("groups", 1) == 1 else None


def is_norm(node: Any) -> bool:
    """Whether a node is a layer norm or an RMS norm over the last axis alone."""
    return packet(node) in NORMS and len(normalized_arguments(node)["normalized_shape"]) == 1


def vector(program: Program, value: Any, axis: int, size: int) -> Tensor | None:
    """`[size]`: the numbers of a weight that has one for each feature along an axis, and nothing else; else None."""
    tensor = program.weight(value) if is_weight(value) else None
    if tensor is None or not tensor.is_floating_point() or tensor.ndim < -axis or tensor.shape[axis] != size:
        return None
    return tensor.reshape(-1) if tensor.numel() == size else None


def carried_axis(program: Program, node: fx.Node, x: fx.Node, axis: int) -> int | None:
    """The axis at which `node` has the features of its argument `x`, when a linear map of them may be applied before
    or after it alike; None when it may not, or `node` reads `x` in another place.

    Args:
        program: the program.
        node: a call.
        x: one of its arguments.
        axis: the axis of the features in `x`, from the end.
    """
    before, after = tensor_type(x), tensor_type(node)
    if before is None or after is None or not before.is_floating_point() or not after.is_floating_point():
        return None
    if packet(node) in (aten.mul, aten.div):
        return axis if _is_common_factor(program, node, x, axis) else None
    rule = _RULES.get(packet(node))
    if rule is None or not node.args or node.args[0] is not x or node.all_input_nodes.count(x) > 1:
        return None
    carried = rule(node, before.ndim, before.ndim + axis)
    return carried if carried is not None and same_size(after.shape[carried], before.shape[axis]) else None


def _is_common_factor(program: Program, node: fx.Node, x: fx.Node, axis: int) -> bool:
    """Whether x is multiplied (or divided) by the same number for all its features."""
    a, b = node.args[:2]
    if a is b or (a is not x and (b is not x or packet(node) is aten.div)):
        return False
    factor = b if a is x else a
    if scalar_value(program, factor) is not None or isinstance(factor, (int, float)):
        return True
    kind = tensor_type(factor)
    return kind is not None and is_broadcast(kind, axis)


def is_broadcast(kind: Tensor, axis: int) -> bool:
    """Whether a tensor of this type has one element for the whole of an axis, counted from the end."""
    return kind.ndim < -axis or same_size(kind.shape[axis], 1)


# rules: the axis from the front in the argument => the axis from the end in the result -------------------------------
Rule = Callable[[fx.Node, int, int], "int | None"]


def _rank(node: fx.Node) -> int:
    return int(node.meta["val"].ndim)


def _same(node: fx.Node, rank: int, at: int) -> int | None:
    return at - rank


def _besides(node: fx.Node, rank: int, at: int) -> int | None:
    """What works along another axis (or other axes), which stays."""
    arguments = normalized_arguments(node)
    dims = arguments.get("dims", arguments.get("dim", 0))
    dims = dims if isinstance(dims, (list, tuple)) else [dims]
    return at - rank if dims and all(dim % rank != at for dim in dims) else None


def _reduced(node: fx.Node, rank: int, at: int) -> int | None:
    """What removes other axes, unless it keeps them with size one."""
    arguments = normalized_arguments(node)
    dims = arguments.get("dim")
    dims = dims if isinstance(dims, (list, tuple)) else [dims]
    if any(dim is None or dim % rank == at for dim in dims) or not dims:
        return None
    removed = 0 if _rank(node) == rank else sum(dim % rank > at for dim in dims)
    return at - rank + removed


def _unsqueeze(node: fx.Node, rank: int, at: int) -> int | None:
    return at - rank - (normalized_arguments(node)["dim"] % (rank + 1) > at)


def _permute(node: fx.Node, rank: int, at: int) -> int | None:
    if packet(node) is aten.permute:
        return [axis % rank for axis in normalized_arguments(node)["dims"]].index(at) - rank
    arguments = normalized_arguments(node)
    a, b = (arguments.get(name, default) % rank for name, default in (("dim0", 0), ("dim1", 1)))
    return {a: b, b: a}.get(at, at) - rank


def _reshape(node: fx.Node, rank: int, at: int) -> int | None:
    """Sizes before and after the axis of the features multiply to the same."""
    old, new = node.args[0].meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]

    def behind(shape: Any, axis: int) -> Any:
        product = size_expression(1)
        for size in shape[axis + 1 :]:
            product *= size_expression(size)
        return product

    for axis in range(-1, -len(new) - 1, -1):
        position = len(new) + axis
        if same_size(new[position], old[at]) and behind(new, position) == behind(old, at):
            return axis
    return None


def _index(node: fx.Node, rank: int, at: int) -> int | None:
    """`x[i, j]` on leading axes leaves the last one where it is."""
    indices: Any = node.args[1]
    return -1 if at == rank - 1 and len(indices) < rank else None


def _masked(node: fx.Node, rank: int, at: int) -> int | None:
    """Filling with zeros, of all features or none."""
    kind, value = tensor_type(node.args[1]), node.args[2]
    per_token = kind is not None and is_broadcast(kind, at - rank)
    return at - rank if per_token and isinstance(value, (int, float)) and value == 0 else None


def _pad(node: fx.Node, rank: int, at: int) -> int | None:
    """Zeros along other axes."""
    arguments = normalized_arguments(node)
    widths, value = list(arguments["pad"]), arguments.get("value")
    own = widths[2 * (rank - 1 - at) : 2 * (rank - at)]
    zeros = arguments.get("mode", "constant") == "constant" and value in (None, 0)
    return at - rank if zeros and not any(own) else None


_RULES: dict[Any, Rule] = {
    **dict.fromkeys([aten.clone, aten.contiguous, aten.alias, aten.detach, aten.dropout, aten.neg, aten.to], _same),
    **dict.fromkeys([aten.expand, aten.expand_as], _same),
    **dict.fromkeys([aten.slice, aten.roll, aten.flip, aten.index_select], _besides),
    **dict.fromkeys([aten.select, aten.squeeze, aten.mean, aten.sum], _reduced),
    aten.unsqueeze: _unsqueeze,
    **dict.fromkeys([aten.permute, aten.transpose, aten.t], _permute),
    **dict.fromkeys([aten.reshape, aten.view, aten.flatten, aten.unflatten, aten._unsafe_view], _reshape),
    aten.index: _index,
    aten.masked_fill: _masked,
    **dict.fromkeys([aten.pad, aten.constant_pad_nd], _pad),
}


_SCALES = frozenset({aten.mul, aten.div, aten.neg, aten.sum, aten.masked_fill, aten.pad, aten.constant_pad_nd})


def carries_shift(node: fx.Node) -> bool:
    """Whether an operator that carries features also carries a constant that is added to each of them."""
    return packet(node) not in _SCALES


# readers -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Readers:
    """Who reads the features of a value.

    Args:
        products: linear layers and ungrouped convolutions.
        carriers: the operators between, inputs first.
    """

    products: tuple[fx.Node, ...]
    carriers: tuple[fx.Node, ...]


def product_readers(program: Program, value: fx.Node, axis: int = -1) -> Readers | str:
    """Every product that reads the features of `value`, through operators that carry them; or what else reads it.

    Args:
        program: the program.
        value: the value.
        axis: the axis of its features, from the end.
    """
    products: dict[fx.Node, None] = {}
    carriers: dict[fx.Node, None] = {}
    stack = [(value, axis)]
    while stack:
        node, at = stack.pop()
        for user in node.users:
            axes = product_axes(user)
            if axes is not None and user.args[0] is node and user.all_input_nodes.count(node) == 1 and axes[0] == at:
                products[user] = None
            elif reads_shape_only(user):
                continue
            elif (carried := carried_axis(program, user, node, at)) is not None:
                carriers[user] = None
                stack.append((user, carried))
            else:
                return f"it is also read by {operator_name(user)}"
    return Readers(tuple(sorted(products)), tuple(sorted(carriers)))  # by their places in the graph
