"""Feature spaces: which axes of which values must be merged alike when features are merged.

Every axis of fixed size is an `Axis`. Operators join the axes that run over the same features: the residual stream is
one class through all layers, the heads of queries, keys and values another one in every layer, the hidden features of a
feed-forward layer a third. An operator that is not known to commute with merging freezes what it reads, with a reason.
"""

from collections.abc import Callable, Sequence
from math import prod
from operator import getitem
from typing import Any

import torch
from torch import fx

from sparc.analysis.values import same_size, tensor_type
from sparc.passes.levels.axes import Shape, freeze, fresh, join, join_all
from sparc.pattern import normalized_arguments
from sparc.program import Entry, is_weight
from sparc.text import operator_name

aten = torch.ops.aten


class Spaces:
    """The feature spaces of a program's entry.

    Attributes:
        weights: the axes of every weight, by name.
        products: every linear layer and convolution, with its weight's name and the axis that it contracts.
        written: the weights' axes along which something is written, as (name, axis).
    """

    def __init__(self, entry: Entry) -> None:
        """Args: the entry to look at."""
        self.axes: dict[fx.Node, Any] = {}
        self.weights: dict[str, Shape] = {}
        self.products: list[tuple[fx.Node, str, int]] = []
        self.written: set[tuple[str, int]] = set()
        for node in entry.graph.nodes:
            self._visit(node)

    def __getitem__(self, node: fx.Node) -> Shape:
        """The axes of a value."""
        return self.axes[node]  # type: ignore[no-any-return]

    def contracts(self, name: str, axis: int) -> bool:
        """Whether a weight is contracted along an axis, and written along it nowhere."""
        return (name, axis) not in self.written and any([name, axis] == rest for _, *rest in self.products)

    # visiting -------------------------------------------------------------------------------------------------------
    def _visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.axes[node] = fresh(node.meta["val"], "it is an input of the program")
        elif is_weight(node):
            name = str(node.target)
            self.axes[node] = self.weights.setdefault(name, fresh(node.meta["val"]))
        elif node.op == "output":
            for used in node.all_input_nodes:
                freeze(self.axes.get(used), "it is an output of the program")
        elif node.op == "call_function":
            self.axes[node] = fresh(node.meta.get("val"))
            handler = HANDLERS.get(getattr(node.target, "overloadpacket", node.target))
            if handler is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
                handler = _pointwise
            if handler is None or not handler(self, node):
                self._freeze(node)

    def _freeze(self, node: fx.Node) -> None:
        why = f"{operator_name(node.target)} reads or writes it"
        for used in (node, *node.all_input_nodes):
            freeze(self.axes.get(used), why)

    def write(self, node: Any, *axes: int) -> None:
        """Note that a weight is written along axes; of any other value nothing is noted."""
        if is_weight(node):
            self.written |= {(str(node.target), axis) for axis in axes}


# operators: each returns whether it understood the call ---------------------------------------------------------------
def _pointwise(spaces: Spaces, node: fx.Node) -> bool:
    for used in node.all_input_nodes:
        if tensor_type(used) is not None:
            join_all(spaces[node], spaces[used])
            spaces.write(used, *range(len(spaces[used])))
    return True


def _linear(spaces: Spaces, node: fx.Node) -> bool:
    arguments = normalized_arguments(node)
    x, weight, bias = arguments["input"], arguments["weight"], arguments["bias"]
    if not is_weight(weight) or not (bias is None or is_weight(bias)) or is_weight(x):
        return False
    join_all(spaces[node][:-1], spaces[x][:-1])
    join(spaces[x][-1], spaces[weight][1])
    join(spaces[node][-1], spaces[weight][0])
    spaces.write(weight, 0)
    if bias is not None:
        join(spaces[node][-1], spaces[bias][0])
        spaces.write(bias, 0)
    spaces.products.append((node, str(weight.target), 1))
    return True


def _convolution(spaces: Spaces, node: fx.Node) -> bool:
    arguments = normalized_arguments(node)
    x, weight, bias = arguments["input"], arguments["weight"], arguments["bias"]
    spatial = len(spaces[node]) - 2
    if not is_weight(weight) or is_weight(x) or arguments["groups"] != 1 or len(spaces[x]) != spatial + 2:
        return False
    join(spaces[node][1], spaces[weight][0])
    join(spaces[x][1], spaces[weight][1])
    for axis in (*spaces[node][2:], *spaces[x][2:], *spaces[weight][2:]):
        freeze([axis], "it is an axis of positions")
    spaces.write(weight, 0)
    if bias is not None:
        join(spaces[node][1], spaces[bias][0])
        spaces.write(bias, 0)
    spaces.products.append((node, str(weight.target), 1))
    return True


def _embedding(spaces: Spaces, node: fx.Node) -> bool:
    weight, indices = node.args[:2]
    if not is_weight(weight):
        return False
    freeze(spaces[weight][:1], "it is an axis of entries")  # type: ignore[index]
    join(spaces[node][-1], spaces[weight][1])  # type: ignore[index]
    join_all(spaces[node][:-1], spaces[indices])  # type: ignore[index]
    spaces.write(weight, 1)
    return True


def _norm(spaces: Spaces, node: fx.Node) -> bool:
    arguments = normalized_arguments(node)
    if len(arguments["normalized_shape"]) != 1:
        return False
    join_all(spaces[node], spaces[arguments["input"]])
    for name in ("weight", "bias"):
        value = arguments.get(name)
        if value is not None:
            join(spaces[node][-1], spaces[value][0])
            spaces.write(value, 0)
    return True


def _attention(spaces: Spaces, node: fx.Node) -> bool:
    arguments = normalized_arguments(node)
    query, key, value = (spaces[arguments[name]] for name in ("query", "key", "value"))
    out, mask = spaces[node], arguments["attn_mask"]
    if min(map(len, (query, key, value))) < 4:
        return False
    freeze([query[-1], key[-1], value[-1], out[-1]], "it is an axis inside a head")
    join(query[-2], out[-2])
    join(key[-2], value[-2])
    for side in (key, value, out):
        join_all(query[:-2], side[:-2])
    if mask is not None:
        join_all(spaces[mask], [*query[:-2], query[-2], key[-2]])
    return True


def _permute(spaces: Spaces, node: fx.Node) -> bool:
    arguments = normalized_arguments(node)
    x = spaces[arguments["input" if "input" in arguments else "self"]]
    order = list(range(len(x)))
    if "dims" in arguments:
        order = [dim % len(x) for dim in arguments["dims"]]
    elif "dim0" in arguments:
        a, b = arguments["dim0"] % len(x), arguments["dim1"] % len(x)
        order[a], order[b] = order[b], order[a]
    else:
        order.reverse()
    join_all(spaces[node], [x[axis] for axis in order])
    _pass_on(spaces, node)
    return True


def _pass_on(spaces: Spaces, node: fx.Node) -> None:
    """A weight that is rearranged before it is used is written along all of its axes."""
    for used in node.all_input_nodes:
        if is_weight(used):
            spaces.write(used, *range(len(spaces[used])))


def _reshape(spaces: Spaces, node: fx.Node) -> bool:
    """Sizes that stand on both sides keep their axes; one axis may be cut into several, or made of several, of which
    the first counts the units.
    """
    x = node.args[0]
    old, new = list(x.meta["val"].shape), list(node.meta["val"].shape)  # type: ignore[union-attr]
    before, after = spaces[x], spaces[node]  # type: ignore[index]
    front, back = _matching(old, new)
    for i in range(front):
        join(before[i], after[i])
    for i in range(1, back + 1):
        join(before[-i], after[-i])
    inner = [shape[front : len(shape) - back] for shape in (before, after)]
    sizes = [shape[front : len(shape) - back] for shape in (old, new)]
    _pass_on(spaces, node)
    if not any(axis is not None for axis in (*inner[0], *inner[1])):
        return True
    whole, cut = sorted(([a for a in axes if a is not None] for axes in inner), key=len)
    if len(whole) != 1 or not all(isinstance(size, int) for each in sizes for size in each):
        return False
    if prod(axis.size for axis in cut) != whole[0].size:
        return False
    if len(cut) > 1:
        freeze(cut[1:], "it is an axis inside a unit")
    join(whole[0], cut[0])
    return True


def _matching(old: Sequence[Any], new: Sequence[Any]) -> tuple[int, int]:
    """How many sizes are equal in front, and behind."""
    front = 0
    while front < min(len(old), len(new)) and same_size(old[front], new[front]):
        front += 1
    back = 0
    while back < min(len(old), len(new)) - front and same_size(old[-1 - back], new[-1 - back]):
        back += 1
    return front, back


def _aligned(spaces: Spaces, node: fx.Node) -> bool:
    """unsqueeze, squeeze: axes of size 1 come and go."""
    x = node.args[0]
    before = [axis for axis in spaces[x] if axis is not None]  # type: ignore[index]
    after = [axis for axis in spaces[node] if axis is not None]
    for a, b in zip(before, after, strict=True):
        join(a, b)
    _pass_on(spaces, node)
    return True


def _expand(spaces: Spaces, node: fx.Node) -> bool:
    join_all(spaces[node], spaces[node.args[0]])  # type: ignore[index]
    _pass_on(spaces, node)
    return True


def _along(spaces: Spaces, node: fx.Node) -> bool:
    """slice, cat, softmax, cumsum: the axis they work along is frozen, the others go through."""
    arguments = normalized_arguments(node)
    inputs = [used for used in node.all_input_nodes if tensor_type(used) is not None]
    axis = arguments.get("dim", 0) % len(spaces[node])
    for value in (node, *inputs):
        freeze(spaces[value][axis : axis + 1], f"{operator_name(node.target)} works along it")
    for value in inputs:
        join_all(spaces[node], spaces[value])
    _pass_on(spaces, node)
    return True


def _stack(spaces: Spaces, node: fx.Node) -> bool:
    axis = normalized_arguments(node)["dim"] % len(spaces[node])
    freeze(spaces[node][axis : axis + 1], "stack makes it")
    for used in node.all_input_nodes:
        x = spaces[used]
        join_all(spaces[node], [*x[:axis], None, *x[axis:]])
    _pass_on(spaces, node)
    return True


def _select(spaces: Spaces, node: fx.Node) -> bool:
    arguments = normalized_arguments(node)
    x = spaces[arguments["self"]]
    axis = arguments["dim"] % len(x)
    freeze(x[axis : axis + 1], "select takes one of it")
    join_all(spaces[node], [*x[:axis], *x[axis + 1 :]])
    _pass_on(spaces, node)
    return True


def _split(spaces: Spaces, node: fx.Node) -> bool:
    """split, chunk: the axis is a concatenation of the results'."""
    arguments = normalized_arguments(node)
    x = spaces[arguments["self"]]
    axis, results = arguments["dim"] % len(x), spaces[node]
    parts = [result[axis] for result in results]  # type: ignore[index]
    for result in results:
        for other in range(len(x)):
            if other != axis:
                join(x[other], result[other])  # type: ignore[index]
    _pass_on(spaces, node)
    if x[axis] is None or any(part is None for part in parts):
        return x[axis] is None
    x[axis].concatenate([part for part in parts if part is not None])  # type: ignore[union-attr]
    return True


def _getitem(spaces: Spaces, node: fx.Node) -> bool:
    value, index = node.args
    spaces.axes[node] = spaces[value][index]  # type: ignore[index]
    return True


def _mean(spaces: Spaces, node: fx.Node) -> bool:
    """mean, sum: the axes they reduce are frozen, the others go through."""
    arguments = normalized_arguments(node)
    x = spaces[arguments["self"]]
    dims = arguments.get("dim")
    if not dims:
        return False
    reduced = {dim % len(x) for dim in dims}
    freeze([x[axis] for axis in reduced], f"{operator_name(node.target)} reduces it")
    kept = arguments.get("keepdim")
    join_all(spaces[node], [None if i in reduced else a for i, a in enumerate(x) if kept or i not in reduced])
    return True


def _each(*packets: Any, handler: Callable[[Spaces, fx.Node], bool]) -> dict[Any, Callable[[Spaces, fx.Node], bool]]:
    return dict.fromkeys(packets, handler)


HANDLERS: dict[Any, Callable[[Spaces, fx.Node], bool]] = {
    aten.linear: _linear,
    aten.embedding: _embedding,
    aten.scaled_dot_product_attention: _attention,
    aten.select: _select,
    aten.stack: _stack,
    **_each(aten.conv1d, aten.conv2d, handler=_convolution),
    **_each(aten.layer_norm, aten.rms_norm, handler=_norm),
    **_each(aten.permute, aten.transpose, aten.t, handler=_permute),
    **_each(aten.reshape, aten.view, aten._unsafe_view, aten.flatten, aten.unflatten, handler=_reshape),
    **_each(aten.unsqueeze, aten.squeeze, handler=_aligned),
    **_each(aten.slice, aten.cat, aten.softmax, aten.cumsum, handler=_along),
    **_each(aten.split, aten.split_with_sizes, aten.chunk, handler=_split),
    **_each(aten.mean, aten.sum, handler=_mean),
    **_each(
        aten.to, aten.clone, aten.contiguous, aten.dropout, aten.detach, aten.alias, aten.where, handler=_pointwise
    ),
    aten.expand: _expand,
    getitem: _getitem,
}
