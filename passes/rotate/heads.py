"""Rotations of attention heads: between the layer that writes the values and the layer that reads what they become."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sparc.analysis.features import carried_axis, operator_name, packet, product_axes, reads_shape_only
from sparc.analysis.values import shape_of
from sparc.pass_base import PassContext
from sparc.passes.fold.norm import bias_of, uses, weight_reason
from sparc.passes.rotate.hadamard import Kind, rotation
from sparc.passes.rotate.weights import Refusal, Store, name_of, turned
from sparc.pattern import normalized_arguments
from sparc.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class Heads:
    """An attention whose values are written by one linear layer and whose result is read by one.

    Args:
        writer: the layer that writes the values, perhaps among others.
        reader: the layer that reads the result, `[..., heads * size]`.
        size: features of a head.
        start: the first row of `writer` that writes values.
        rows: how many do.
    """

    writer: fx.Node
    reader: fx.Node
    size: int
    start: int
    rows: int

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for attentions that change their weights alike."""
        names = (name_of(each.args[1]) for each in (self.writer, self.reader))
        return (*names, self.size, self.start, self.rows)


def rotate_heads(
    program: Program, context: PassContext, store: Store, selected: Mapping[str, bool], kind: Kind, seed: int
) -> None:
    """attention(q, k, v) => attention(q, k, v R), with R undone by the layer that reads it, for each head.

    Heads that share keys and values share a rotation; all heads of one size do.

    Args:
        program: is edited: weights only.
        context: is asked before each edit.
        store: takes the new weights.
        selected: whether the step's selector claims a weight.
        kind: of the rotations.
        seed: of the rotations.
    """
    found: dict[fx.Node, Heads] = {}
    for _, node in program.nodes():
        if packet(node) is not aten.scaled_dot_product_attention:
            continue
        try:
            heads = find_heads(program, node)
            _check(program, heads, selected)
        except Refusal as refusal:
            context.skip(node, f"its heads cannot be rotated: {refusal}")
        else:
            found |= {heads.writer: heads, heads.reader: heads}
    done = set()
    for node, heads in found.items():
        if heads.key in done:
            continue
        done.add(heads.key)
        names = {name_of(weight) for weight in _weights(heads)}
        others = [user for name in names for user in uses(program, name) if _key(found, user) != heads.key]
        if others or heads.writer is heads.reader:
            context.skip(
                node, f"its heads cannot be rotated: a weight is also read by {operator_name((others or [node])[0])}"
            )
        elif context.edit():
            _rotate(store, heads, rotation(heads.size, kind, seed))


def _key(found: Mapping[fx.Node, Heads], node: fx.Node) -> Any:
    return found[node].key if node in found else None


def _weights(heads: Heads) -> Iterator[fx.Node]:
    """What is rotated: two weights, and the bias of the writer."""
    yield heads.writer.args[1]  # type: ignore[misc]
    yield heads.reader.args[1]  # type: ignore[misc]
    if bias_of(heads.writer) is not None:
        yield bias_of(heads.writer)


def _check(program: Program, heads: Heads, selected: Mapping[str, bool]) -> None:
    for weight in _weights(heads):
        if (reason := weight_reason(program, weight)) is not None:
            raise Refusal(reason)
        if not selected.get(name_of(weight), True):
            raise Refusal(f"the selector leaves {name_of(weight)!r} out")


def find_heads(program: Program, attention: fx.Node) -> Heads:
    """The layers around an attention.

    Raises:
        Refusal: its values, or what reads its result, are not those of linear layers, head by head.
    """
    arguments = normalized_arguments(attention)
    value: Any = arguments["value"]
    if value in (arguments["query"], arguments["key"]):
        raise Refusal("its values are read elsewhere too")
    size = shape_of(value)[-1]
    if not isinstance(size, int):
        raise Refusal("the size of its heads is not fixed")
    writer, start, rows = _written(program, value, attention, size)
    return Heads(writer, _read(program, attention, size), size, start, rows)


def _written(program: Program, value: fx.Node, attention: fx.Node, size: int) -> tuple[fx.Node, int, int]:
    """The linear layer that writes the values, and which of its rows do."""
    node, user, width = value, attention, size
    while packet(node) is not aten.linear:
        if any(each is not user and not reads_shape_only(each) for each in node.users):
            raise Refusal("its values are read elsewhere too")
        x: Any = node.args[0] if node.args and node.op == "call_function" else None
        if not isinstance(x, fx.Node) or not isinstance(x.meta["val"], (Tensor, list, tuple)):
            raise Refusal(f"its values are written by {operator_name(node)}")
        piece = piece_of(node, x)
        if piece is not None and width == shape_of(node)[-1]:
            return _packed(node, piece[1], piece[0], width)
        if not isinstance(x.meta["val"], Tensor):
            raise Refusal(f"its values are written by {operator_name(node)}")
        if width == size and shape_of(node)[-1] == size and _is_split(x, node):
            width = shape_of(x)[-1]
        elif not _carries(program, node, x, width):
            raise Refusal(f"its values are written by {operator_name(node)}")
        node, user = x, node
    if any(each is not user and not reads_shape_only(each) for each in node.users):
        raise Refusal("its values are read elsewhere too")
    return node, 0, width


def _packed(values: fx.Node, source: fx.Node, start: int, width: int) -> tuple[fx.Node, int, int]:
    """A layer that writes queries, keys and values side by side; what else reads it reads other rows of it."""
    if packet(source) is not aten.linear:
        raise Refusal(f"its values are a piece of what {operator_name(source)} writes")
    for user in source.users:
        if reads_shape_only(user):
            continue
        pieces = [user] if packet(user) is aten.slice else list(user.users)
        for piece in pieces:
            other = piece_of(piece, piece.args[0])
            if other is None or other[1] is not source:
                raise Refusal("its values are read elsewhere too")
            begin, end = other[0], other[0] + int(shape_of(piece)[-1])
            if piece is not values and begin < start + width and start < end:
                raise Refusal("its values are read elsewhere too")
    return source, start, width


def piece_of(node: fx.Node, x: Any) -> tuple[int, fx.Node] | None:
    """Where a piece of the last axis begins, and what it is a piece of."""
    if packet(node) is aten.slice and isinstance(shape_of(node)[-1], int):
        arguments = normalized_arguments(node)
        last = arguments["dim"] % len(shape_of(node)) == len(shape_of(node)) - 1
        start = arguments.get("start") or 0
        return (start % shape_of(x)[-1], x) if last and arguments.get("step", 1) == 1 else None
    if getattr(node.target, "__name__", "") == "getitem" and packet(x) in (
        aten.split,
        aten.chunk,
        aten.split_with_sizes,
    ):
        arguments, whole = normalized_arguments(x), x.args[0]
        sizes = [shape[-1] for shape in (tuple(each.shape) for each in x.meta["val"])]
        last = arguments.get("dim", 0) % len(shape_of(whole)) == len(shape_of(whole)) - 1
        return (sum(sizes[: int(node.args[1])]), whole) if last else None  # type: ignore[arg-type]
    return None


def _is_split(x: fx.Node, node: fx.Node) -> bool:
    """Whether the last axis of x becomes the last two of node, `[..., heads, size]`."""
    whole, parts = shape_of(x)[-1], shape_of(node)[-2:]
    return (
        packet(node) in (aten.reshape, aten.view, aten.unflatten)
        and all(isinstance(each, int) for each in (whole, *parts))
        and len(parts) == 2
        and whole == parts[0] * parts[1]
    )


def _carries(program: Program, node: fx.Node, x: fx.Node, width: int) -> bool:
    """Whether the last axis of x is that of node, and only carried."""
    return shape_of(x)[-1] == width and carried_axis(program, node, x, -1) == -1


def _read(program: Program, attention: fx.Node, size: int) -> fx.Node:
    """The linear layer that reads the result of an attention, `[..., heads * size]`."""
    node, width = attention, size
    while True:
        users = [user for user in node.users if not reads_shape_only(user)]
        if len(users) != 1:
            raise Refusal("its result is read by several operators")
        user = users[0]
        if product_axes(user) is not None and packet(user) is aten.linear and user.args[0] is node:
            return user
        if width == size and _is_merge(node, user):
            width = shape_of(user)[-1]
        elif not _carries(program, user, node, width):
            raise Refusal(f"its result is read by {operator_name(user)}")
        node = user


def _is_merge(node: fx.Node, user: fx.Node) -> bool:
    parts, whole = shape_of(node)[-2:], shape_of(user)[-1] if packet(user) in (aten.reshape, aten.flatten) else None
    return isinstance(whole, int) and all(isinstance(each, int) for each in parts) and whole == parts[0] * parts[1]


def _rotate(store: Store, heads: Heads, matrix: Tensor) -> None:
    """`v R` is written, and read: rows of the writer and its bias, columns of the reader."""
    for weight in [heads.writer.args[1], *([bias] if (bias := bias_of(heads.writer)) is not None else [])]:
        new = store[name_of(weight)].clone()
        rows = new[heads.start : heads.start + heads.rows]
        new[heads.start : heads.start + heads.rows] = turned(rows.unflatten(0, (-1, heads.size)), 1, matrix).flatten(
            0, 1
        )
        store.put(name_of(weight), new)
    name = name_of(heads.reader.args[1])
    store.put(name, turned(store[name].unflatten(1, (-1, heads.size)), 2, matrix).flatten(1))
