"""Operators that treat every place of a sequence by itself: where the sequence lies in the result, and how the operator
is written again for a part of it.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from sparc.analysis.features import NORMS, packet
from sparc.analysis.values import is_deterministic, same_shape, same_size, shape_of, tensor_type
from sparc.pattern import normalized_arguments

aten = torch.ops.aten

_SAME = frozenset({aten.to, aten._to_copy, aten.clone, aten.contiguous, aten.alias, aten.detach, aten.dropout})
_FILLS = frozenset({aten.ones, aten.zeros, aten.full})


def is_pointwise(node: fx.Node) -> bool:
    """Whether every element of the result depends on the elements of the arguments at its own place."""
    if packet(node) in _SAME:
        return is_deterministic(node)
    return isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags and is_deterministic(node)


def is_row_wise(node: fx.Node) -> bool:
    """Whether axes along which the arguments are constant stay so and may be given as size one: all but the last."""
    return is_pointwise(node) or packet(node) in {aten.linear, aten.embedding, aten.unsqueeze, *NORMS}


def result_axis(node: fx.Node, axes: Mapping[fx.Node, int]) -> int | None:
    """The axis of the sequence in the result (in each result, for an operator with several).

    Args:
        node: a call.
        axes: the axis of the sequence in each of its arguments that has one, from the front.

    Returns:
        None when the operator mixes places of the sequence, or is not known not to.
    """
    if is_pointwise(node):
        return _pointwise_axis(node, axes)
    rule = _RULES.get(packet(node))
    return None if rule is None else rule(node, axes)


def _pointwise_axis(node: fx.Node, axes: Mapping[fx.Node, int]) -> int | None:
    rank = len(shape_of(node))
    found = {axis - len(shape_of(used)) for used, axis in axes.items()}
    if len(found) > 1:
        return None
    (back,) = found
    for used in node.all_input_nodes:
        kind = tensor_type(used)
        if kind is not None and used not in axes and kind.ndim >= -back and not same_size(kind.shape[back], 1):
            return None
    return rank + back


def _only(node: fx.Node, axes: Mapping[fx.Node, int], place: int = 0) -> int | None:
    """The axis of one argument, when no other has one."""
    x = node.args[place]
    return axes[x] if isinstance(x, fx.Node) and set(axes) == {x} else None


def _linear(node: fx.Node, axes: Mapping[fx.Node, int]) -> int | None:
    axis = _only(node, axes)
    return axis if axis is not None and axis < len(shape_of(node)) - 1 else None


def _norm(node: fx.Node, axes: Mapping[fx.Node, int]) -> int | None:
    axis = _only(node, axes)
    normalized = len(normalized_arguments(node)["normalized_shape"])
    return axis if axis is not None and axis < len(shape_of(node)) - normalized else None


def _embedding(node: fx.Node, axes: Mapping[fx.Node, int]) -> int | None:
    return _only(node, axes, 1)


def _permutation(node: fx.Node, axes: Mapping[fx.Node, int]) -> int | None:
    axis, rank = _only(node, axes), len(shape_of(node))
    if axis is None:
        return None
    order = list(range(rank))
    if packet(node) is aten.permute:
        order = [int(each) % rank for each in node.args[1]]  # type: ignore[arg-type, union-attr]
    else:
        a, b = (int(each) % rank for each in node.args[1:3])  # type: ignore[arg-type]
        order[a], order[b] = b, a
    return order.index(axis)


def _unsqueeze(node: fx.Node, axes: Mapping[fx.Node, int]) -> int | None:
    axis, new = _only(node, axes), int(node.args[1]) % len(shape_of(node))  # type: ignore[arg-type]
    return None if axis is None else axis + (new <= axis)


def _other_axis(node: fx.Node, axes: Mapping[fx.Node, int]) -> int | None:
    """What works along other axes, of fixed sizes, and may remove them."""
    axis = _only(node, axes)
    if axis is None:
        return None
    arguments, shape = normalized_arguments(node), shape_of(node.args[0])  # type: ignore[arg-type]
    dims = arguments.get("dim")
    listed = [each % len(shape) for each in (dims if isinstance(dims, (list, tuple)) else [dims]) if each is not None]
    if not listed or axis in listed or not all(isinstance(shape[each], int) for each in listed):
        return None
    kind = tensor_type(node)
    return axis - sum(each < axis for each in listed) if kind is not None and kind.ndim < len(shape) else axis


def _cat(node: fx.Node, axes: Mapping[fx.Node, int]) -> int | None:
    dim = normalized_arguments(node)["dim"] % len(shape_of(node))
    tensors: Any = node.args[0]
    found = {axes.get(each) for each in tensors}
    axis = found.pop()
    fixed = isinstance(shape_of(node)[dim], int)
    return axis if not found and axis is not None and axis != dim and fixed else None


def _stack(node: fx.Node, axes: Mapping[fx.Node, int]) -> int | None:
    new = normalized_arguments(node)["dim"] % len(shape_of(node))
    tensors: Any = node.args[0]
    found = {axes.get(each) for each in tensors}
    axis = found.pop()
    return axis + (new <= axis) if not found and axis is not None else None


def _regrouped(node: fx.Node, axes: Mapping[fx.Node, int]) -> int | None:
    """What changes nothing up to the sequence, and only fixed sizes behind it."""
    axis = _only(node, axes)
    if axis is None:
        return None
    old, new = shape_of(node.args[0]), shape_of(node)  # type: ignore[arg-type]
    fixed = all(isinstance(size, int) for size in (*old[axis + 1 :], *new[axis + 1 :]))
    return axis if fixed and same_shape(old[: axis + 1], new[: axis + 1]) else None


def _reshape(node: fx.Node, axes: Mapping[fx.Node, int]) -> int | None:
    axis = _regrouped(node, axes)
    given = zip(list(node.args[1])[:axis], shape_of(node), strict=False)  # type: ignore[arg-type]
    return axis if all(isinstance(size, int) for each, size in given if each == -1) else None


def _expand(node: fx.Node, axes: Mapping[fx.Node, int]) -> int | None:
    axis = _only(node, axes)
    return None if axis is None else axis + len(shape_of(node)) - len(shape_of(node.args[0]))  # type: ignore[arg-type]


_RULES: dict[Any, Callable[[fx.Node, Mapping[fx.Node, int]], int | None]] = {
    aten.linear: _linear,
    **dict.fromkeys(NORMS, _norm),
    aten.embedding: _embedding,
    aten.permute: _permutation,
    aten.transpose: _permutation,
    aten.unsqueeze: _unsqueeze,
    **dict.fromkeys(
        [aten.softmax, aten._softmax, aten.sum, aten.mean, aten.amax, aten.slice, aten.select], _other_axis
    ),
    **dict.fromkeys([aten.split, aten.split_with_sizes, aten.chunk, aten.repeat_interleave], _other_axis),
    operator.getitem: _only,
    aten.cat: _cat,
    aten.stack: _stack,
    aten.flatten: _regrouped,
    aten.unflatten: _regrouped,
    aten.reshape: _reshape,
    aten.view: _reshape,
    aten.expand: _expand,
}


# arguments of a part -------------------------------------------------------------------------------------------------
def part_target(node: fx.Node) -> Any:
    """The operator that stands for another on a part, which may lie otherwise in memory."""
    return aten.reshape.default if packet(node) is aten.view else node.target


def part_arguments(
    node: fx.Node, parts: Mapping[fx.Node, fx.Node], axis: int, *, front: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of an operator on a part of the sequence.

    Args:
        node: the operator on the whole, for which `result_axis` gave `axis`.
        parts: the part of each argument that is replaced.
        axis: the axis of the sequence in the result.
        front: whether the part is the constant one, whose axes of varying size (the batch) have size one.
    """
    if packet(node) in (aten.reshape, aten.view):
        x = parts[node.args[0]]  # type: ignore[index]
        lead = list(shape_of(x)[:axis]) if front else list(node.args[1])[:axis]  # type: ignore[arg-type]
        lead = [size if each == -1 else each for each, size in zip(lead, shape_of(node), strict=False)]
        return (x, [*lead, -1, *shape_of(node)[axis + 1 :]]), {}
    if packet(node) is aten.expand:
        x = parts[node.args[0]]  # type: ignore[index]
        sizes = expanded_sizes(node) if front else list(node.args[1])  # type: ignore[arg-type]
        return (x, [-1 if place == axis else size for place, size in enumerate(sizes)]), {}
    return fx.node.map_arg((node.args, node.kwargs), lambda used: parts.get(used, used))  # type: ignore[return-value]


def expanded_sizes(node: fx.Node) -> list[int]:
    """The sizes of an `expand` that leaves axes of varying size out."""
    old, new = shape_of(node.args[0]), shape_of(node)  # type: ignore[arg-type]
    missing = len(new) - len(old)
    sizes: list[int] = []
    for place, size in enumerate(new):
        kept = place >= missing and (not isinstance(size, int) or same_size(old[place - missing], size))
        sizes.append(-1 if kept else size if isinstance(size, int) else 1)
    return sizes


def filled_sizes(node: fx.Node) -> list[int] | None:
    """The sizes of a tensor filled with one number, those that vary as one; None for other operators."""
    if packet(node) not in _FILLS:
        return None
    return [size if isinstance(size, int) else 1 for size in shape_of(node)]
