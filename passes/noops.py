"""When an operator is an identity, or has a plainer spelling: decided from types and literals alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sparc.analysis.values import same_shape, same_type, scalar_value, tensor_type
from sparc.pattern import normalized_arguments
from sparc.program import Program, is_weight

aten = torch.ops.aten


@dataclass(frozen=True)
class Plainer:
    """What a node may be replaced by.

    Args:
        value: a node that already holds the value; the simplified node itself when there is a call.
        call: an operator and its arguments.
        kwargs: its arguments by name.
        copies: whether the operator makes a tensor of its own, which the replacement does not.
    """

    value: fx.Node
    call: tuple[Any, tuple[Any, ...]] | None = None
    copies: bool = False
    kwargs: Mapping[str, Any] = field(default_factory=dict)


Rule = Callable[[Program, fx.Node], Plainer | None]


def replacement(program: Program, node: fx.Node) -> Plainer | None:
    """The plainer form of a call, if the types prove it equal."""
    name = str(getattr(node.target, "_opname", None) or getattr(node.target, "__name__", ""))
    if name in _OTHER_NAMES:
        target: Any = node.target
        other = getattr(getattr(aten, _OTHER_NAMES[name]), target._overloadname)
        return Plainer(node, (other, node.args), kwargs=node.kwargs)
    rule = _RULES.get(name)
    return rule(program, node) if rule is not None and node.args else None


def _input(node: fx.Node) -> fx.Node | None:
    """The first argument, when it has exactly the type of the result."""
    first = node.args[0]
    if isinstance(first, fx.Node) and same_type(first.meta.get("val"), node.meta.get("val")):
        return first
    return None


# other names ---------------------------------------------------------------------------------------------------------
_OTHER_NAMES = {
    **{"multiply": "mul", "divide": "div", "true_divide": "div", "subtract": "sub", "negative": "neg"},
    **{"absolute": "abs", "clip": "clamp", "concat": "cat", "concatenate": "cat"},
}


def _narrow(program: Program, node: fx.Node) -> Plainer | None:
    same = _alias(program, node)
    given = normalized_arguments(node)
    start, length = given["start"], given["length"]
    if same is not None or not (isinstance(start, int) and isinstance(length, int)):
        return same
    end = torch.iinfo(torch.int64).max if start == -length else start + length  # 0 would be the front
    return Plainer(node, (aten.slice.Tensor, (given["self"], given["dim"], start, end)))


def _stacked(program: Program, node: fx.Node) -> Plainer | None:
    """`hstack`, `vstack`, which join what has such an axis already."""
    axis = {"hstack": 1, "vstack": 0}[str(getattr(node.target, "_opname", ""))]
    parts: Any = node.args[0]
    ranks = {part.meta["val"].ndim for part in parts}
    if min(ranks) < 2:
        return None
    return Plainer(node, (aten.cat.default, (parts, axis)))


# identities ----------------------------------------------------------------------------------------------------------
def _alias(program: Program, node: fx.Node) -> Plainer | None:
    """The operator never changes a value, only a type."""
    value = _input(node)
    return Plainer(value) if value is not None else None


def _copy(program: Program, node: fx.Node) -> Plainer | None:
    """The same, into a tensor of its own, or with other strides."""
    value = _input(node)
    return Plainer(value, copies=True) if value is not None else None


def _slice(program: Program, node: fx.Node) -> Plainer | None:
    arguments = normalized_arguments(node)
    full = arguments.get("start") in (None, 0) and arguments.get("step", 1) == 1
    return _alias(program, node) if full else None


_SWAPPED_AXES = (aten.transpose.int, aten.swapaxes.default, aten.swapdims.default)
_MOVED_AXES = (aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist)


def _permute(program: Program, node: fx.Node) -> Plainer | None:
    inner, dims = node.args[0], node.args[1]
    rank = len(dims)  # type: ignore[arg-type]
    order = [int(dim) % rank for dim in dims]  # type: ignore[arg-type, union-attr]
    if order == list(range(rank)):
        return _alias(program, node)
    before = axes_order(inner)
    if before is None:
        return None
    source, first = before
    return _reordered(node, source, [first[axis] for axis in order])


def _transpose(program: Program, node: fx.Node) -> Plainer | None:
    found = axes_order(node)
    if found is None:
        return None
    inner, order = found
    if order == list(range(len(order))):
        return _alias(program, node)
    before = axes_order(inner)
    if before is None:
        return _transpose_form(node, inner, order) if node.target is not aten.transpose.int else None
    source, first = before
    return _reordered(node, source, [first[axis] for axis in order])


def axes_order(node: Any) -> tuple[fx.Node, list[int]] | None:
    """The input and the order of its axes, when a node is a transpose or permute."""
    if (
        not isinstance(node, fx.Node)
        or node.op != "call_function"
        or not isinstance(node.args[0] if node.args else None, fx.Node)
    ):
        return None
    inner: Any = node.args[0]
    if not isinstance(inner.meta.get("val"), torch.Tensor):
        return None
    rank = inner.meta["val"].ndim
    order = list(range(rank))
    if node.target is aten.permute.default:
        return inner, [dim % rank for dim in node.args[1]]  # type: ignore[operator, union-attr]
    if node.target in _MOVED_AXES and rank:
        given: Any = node.args[1:3]
        source, target = ([each % rank for each in ([axes] if isinstance(axes, int) else axes)] for axes in given)
        return inner, _moved(source, target, rank)
    if node.target in _SWAPPED_AXES and rank:
        a, b = (int(axis) % rank for axis in node.args[1:3])  # type: ignore[arg-type]
    elif node.target in (aten.t.default, aten.numpy_T.default, aten.mT.default) and rank == 2:
        a, b = 0, 1
    elif node.target is aten.mT.default:
        a, b = rank - 2, rank - 1
    else:
        return None
    order[a], order[b] = order[b], order[a]
    return inner, order


def _moved(source: list[int], target: list[int], rank: int) -> list[int]:
    """The order of axes when some are moved and the others stay as they were among themselves."""
    there = dict(zip(target, source, strict=True))
    others = iter(axis for axis in range(rank) if axis not in source)
    return [there[axis] if axis in there else next(others) for axis in range(rank)]


def _reordered(node: fx.Node, source: fx.Node, order: list[int]) -> Plainer | None:
    if order == list(range(len(order))):
        return Plainer(source)
    return _transpose_form(node, source, order)


def _transpose_form(node: fx.Node, source: fx.Node, order: list[int]) -> Plainer:
    moved = [axis for axis, old in enumerate(order) if axis != old]
    if len(moved) == 2:
        return Plainer(node, (aten.transpose.int, (source, moved[0], moved[1])))
    return Plainer(node, (aten.permute.default, (source, order)))


def _reshape(program: Program, node: fx.Node) -> Plainer | None:
    same = _alias(program, node)
    if same is not None:
        return same
    inner, shape = node.args[0], node.args[1]
    if isinstance(inner, fx.Node) and inner.target is aten.reshape.default:
        return Plainer(node, (aten.reshape.default, (inner.args[0], shape)))
    if node.target is not aten.reshape.default and isinstance(shape, (list, tuple)):
        return Plainer(node, (aten.reshape.default, (inner, shape)))
    return None


def _flatten(program: Program, node: fx.Node) -> Plainer | None:
    return _alias(program, node)


def _to(program: Program, node: fx.Node) -> Plainer | None:
    arguments = normalized_arguments(node)
    same = _copy(program, node)
    if same is not None:
        return (
            same
            if arguments.get("copy") or arguments.get("memory_format") not in (None, torch.preserve_format)
            else Plainer(same.value)
        )
    kind = tensor_type(node)
    plain = node.target is aten.to.dtype and len(node.args) == 2 and not node.kwargs
    if plain or kind is None or not isinstance(node.args[0], fx.Node):
        return None
    return Plainer(
        node,
        (aten.to.dtype, (node.args[0], kind.dtype)),
        copies=arguments.get("memory_format") not in (None, torch.preserve_format),
    )


def _dropout(program: Program, node: fx.Node) -> Plainer | None:
    return _alias(program, node) if normalized_arguments(node).get("train") is False else None


# arithmetic ----------------------------------------------------------------------------------------------------------
def _is_number(program: Program, value: Any, number: float) -> bool:
    """Whether a value is a number for good: a parameter that happens to have this value may still be trained."""
    if is_weight(value) and program.weights.record(str(value.target)).trainable:
        return False
    return scalar_value(program, value) == number


def _multiply(program: Program, node: fx.Node) -> Plainer | None:
    for index in (0, 1):
        value, other = node.args[index], node.args[1 - index]
        if (
            isinstance(value, fx.Node)
            and same_type(value.meta.get("val"), node.meta.get("val"))
            and _is_number(program, other, 1)
        ):
            return Plainer(value, copies=True)
    return None


def _by_one(program: Program, node: fx.Node) -> Plainer | None:
    """`x / 1`, `x ** 1`."""
    return _copy(program, node) if _is_number(program, node.args[1], 1) and not node.kwargs else None


def _minus_zero(program: Program, node: fx.Node) -> Plainer | None:
    """`x - 0`. With floats `-0.0 - 0.0` is still `-0.0`; the constant must be +0."""
    value = scalar_value(program, node.args[1])
    return _copy(program, node) if value is not None and str(float(value)) == "0.0" else None


def _plus_zero(program: Program, node: fx.Node) -> Plainer | None:
    """`x + 0` on integers only: with floats it turns `-0.0` into `0.0`."""
    kind = tensor_type(node)
    if kind is None or kind.dtype.is_floating_point or kind.dtype.is_complex:
        return None
    for index in (0, 1):
        value, other = node.args[index], node.args[1 - index]
        if isinstance(value, fx.Node) and same_type(value.meta.get("val"), kind) and _is_number(program, other, 0):
            return Plainer(value, copies=True)
    return None


def _and_true(program: Program, node: fx.Node) -> Plainer | None:
    """`x & True` on booleans."""
    kind = tensor_type(node)
    if kind is None or kind.dtype != torch.bool:
        return None
    for index in (0, 1):
        value, other = node.args[index], node.args[1 - index]
        if isinstance(value, fx.Node) and same_type(value.meta.get("val"), kind) and _is_number(program, other, 1):
            return Plainer(value, copies=True)
    return None


def _single(program: Program, node: fx.Node) -> Plainer | None:
    """`cat([x])`."""
    parts = node.args[0]
    if isinstance(parts, (list, tuple)) and len(parts) == 1 and isinstance(parts[0], fx.Node):
        return Plainer(parts[0], copies=True)
    return None


def _getitem(program: Program, node: fx.Node) -> Plainer | None:
    """The only piece of a split, and `getitem(unbind)` or `getitem(split)` stay otherwise."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or not str(getattr(source.target, "_opname", "")).startswith(
        ("split", "chunk", "tensor_split")
    ):
        return None
    pieces, whole = source.meta.get("val"), source.args[0]
    if (
        isinstance(pieces, (list, tuple))
        and len(pieces) == 1
        and isinstance(whole, fx.Node)
        and same_shape(pieces[0].shape, whole.meta["val"].shape)
    ):
        return Plainer(whole)
    return None


def _pad(program: Program, node: fx.Node) -> Plainer | None:
    return _copy(program, node) if all(isinstance(amount, int) and amount == 0 for amount in node.args[1]) else None  # type: ignore[union-attr]


def _roll(program: Program, node: fx.Node) -> Plainer | None:
    return _copy(program, node) if all(shift == 0 for shift in node.args[1]) else None  # type: ignore[union-attr]


def _repeat(program: Program, node: fx.Node) -> Plainer | None:
    return _copy(program, node) if all(times == 1 for times in node.args[1]) else None  # type: ignore[union-attr]


_RULES: dict[str, Rule] = {
    **dict.fromkeys(
        [
            "alias",
            "detach",
            "lift_fresh",
            "expand",
            "expand_as",
            "broadcast_to",
            "squeeze",
            "view_as",
            "unflatten",
        ],
        _alias,
    ),
    **dict.fromkeys(["clone", "contiguous", "lift_fresh_copy"], _copy),
    **dict.fromkeys(["to", "_to_copy", "type_as"], _to),
    **dict.fromkeys(["dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"], _dropout),
    **dict.fromkeys(["view", "reshape", "_unsafe_view"], _reshape),
    **dict.fromkeys(["transpose", "t", "mT", "numpy_T", "swapaxes", "swapdims", "movedim", "moveaxis"], _transpose),
    **dict.fromkeys(["div", "pow"], _by_one),
    **dict.fromkeys(["__and__", "bitwise_and", "logical_and"], _and_true),
    **dict.fromkeys(["hstack", "vstack"], _stacked),
    **dict.fromkeys(["repeat", "tile"], _repeat),
    **dict.fromkeys(["constant_pad_nd", "pad"], _pad),
    "cat": _single,
    "narrow": _narrow,
    "slice": _slice,
    "permute": _permute,
    "flatten": _flatten,
    "mul": _multiply,
    "sub": _minus_zero,
    "add": _plus_zero,
    "getitem": _getitem,
    "roll": _roll,
}
