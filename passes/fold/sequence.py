"""A program along a sequence that starts with a constant: every value as a constant front and a rest."""

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from sparc.analysis.features import packet
from sparc.analysis.values import (
    is_static,
    same_size,
    shape_of,
    size_expression,
    tensor_type,
)
from sparc.passes.fold.rows import filled_sizes, is_pointwise, part_arguments, part_target, result_axis
from sparc.passes.fold.unbatched import Unbatched, is_learned
from sparc.pattern import normalized_arguments
from sparc.program import Entry, Program

aten = torch.ops.aten

END = 2**63 - 1  # what slices to the end are exported with


@dataclass(frozen=True)
class Split:
    """A value in two parts.

    Args:
        axis: of the sequence, from the front.
        front: the constant part; axes whose size varies have size one in it.
        rest: what stands behind it.
        learned: whether the front says something of the prompt, not of positions and masks alone.
    """

    axis: int
    front: fx.Node
    rest: fx.Node
    learned: bool


@dataclass
class Sequence:
    """All values of an entry along a sequence of `total` places whose first `count` are constant.

    The new nodes stand before the ones they replace; nothing reads them until `connect`.

    Args:
        program: the program.
        entry: one of its entries.
        count: constant places.
        total: all places: a size.

    Attributes:
        parts: the values that were divided.
        replaced: what stands for values that are taken from the rest alone.
        stopped: the first operator at the prompt that was not.
        stored: the constants that the rest reads, with what they are.
    """

    program: Program
    entry: Entry
    count: int
    total: Any
    parts: dict[fx.Node, Split] = field(default_factory=dict)
    replaced: dict[fx.Node, fx.Node] = field(default_factory=dict)
    stopped: fx.Node | None = None
    stored: dict[fx.Node, str] = field(default_factory=dict)
    _sources: set[fx.Node] = field(default_factory=set)
    _wholes: dict[fx.Node, fx.Node] = field(default_factory=dict)
    _readers: list[tuple[fx.Node, fx.Node, fx.Node]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.constants = Unbatched(self.entry)

    def divide(self) -> None:
        """Divide every value that can be, in graph order."""
        for node in list(self.entry.graph.nodes):
            if node.op != "call_function":
                continue
            found = self._source(node)
            if found is not None:
                self._sources.add(node)
            elif any(used in self.parts for used in node.all_input_nodes):
                shorter = self._shorter(node)
                if shorter is not None:
                    self.replaced[node] = shorter
                    continue
                found = self.operator(node)
            if found is not None and self._fits(node, found):
                self.parts[node] = found

    def operator(self, node: fx.Node) -> Split | None:
        """A call that reads divided values, divided; None when it cannot be."""
        found = self._row(node)
        read = (self.parts[each] for each in node.all_input_nodes if each in self.parts)
        if found is None and self.stopped is None and any(split.learned for split in read):
            self.stopped = node
        return found

    def join(self) -> None:
        """Make the wholes of divided values that something reads which was not divided."""
        for node, split in self.parts.items():
            if split.learned and node not in self._sources:
                for user in self._others(node):
                    self._readers.append((user, node, self.whole(node, user)))

    def connect(self) -> None:
        """Let the program read what was made, and the old values no more."""
        for user, node, whole in self._readers:
            user.replace_input_with(node, whole)
        for node, new in self.replaced.items():
            node.replace_all_uses_with(new)

    def _others(self, node: fx.Node) -> list[fx.Node]:
        """The old nodes that read a value and neither were divided nor replaced, in graph order."""
        return sorted(user for user in node.users if user not in self.parts and user not in self.replaced)

    # nodes ----------------------------------------------------------------------------------------------------------
    def call(self, before: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert an operator."""
        return self.entry.call(target, *args, before=before, like=before, **kwargs)

    def whole(self, node: fx.Node, before: fx.Node, name: str = "prompt") -> fx.Node:
        """Both parts of a value, one behind the other, the front repeated along the batch."""
        if node in self._sources:
            return node
        if node not in self._wholes:
            split = self.parts[node]
            self.stored.setdefault(split.front, name)
            front, shape, sizes = split.front, shape_of(split.rest), []
            for axis, (own, size) in enumerate(zip(shape_of(front), shape, strict=True)):
                kept = axis == split.axis or same_size(own, size)
                sizes.append(-1 if kept else self.size(before, split.rest, axis))
            if any(size != -1 for size in sizes):
                front = self.call(before, aten.expand.default, front, sizes)
            self._wholes[node] = self.call(before, aten.cat.default, [front, split.rest], split.axis)
        return self._wholes[node]

    def size(self, before: fx.Node, node: fx.Node, axis: int) -> Any:
        """A size, read off a node where it varies."""
        size = shape_of(node)[axis]
        return size if isinstance(size, int) else self.call(before, aten.sym_size.int, node, axis)

    # where a sequence comes from ------------------------------------------------------------------------------------
    def _source(self, node: fx.Node) -> Split | None:
        if packet(node) is aten.cat:
            return self._cat(node)
        kind = tensor_type(node)
        if kind is None:
            return None
        if packet(node) is aten.arange and kind.ndim == 1 and same_size(kind.shape[0], self.total):
            return self._arange(node)
        if packet(node) is aten.slice:
            return self._table(node)
        return self._filled(node, kind)

    def _cat(self, node: fx.Node) -> Split | None:
        """`cat([constant, ...])`."""
        tensors: Any = node.args[0]
        axis = normalized_arguments(node)["dim"] % len(shape_of(node))
        leading = self.constants.leading(tensors, axis, self.count)
        if leading is None or not same_size(shape_of(node)[axis], self.total):
            return None
        front, rest = (self._joined(node, part, axis) for part in (leading, tensors[len(leading) :]))
        return Split(axis, front, rest, any(is_learned(each) for each in tensors[: len(leading)]))

    def _joined(self, node: fx.Node, tensors: list[fx.Node], axis: int) -> fx.Node:
        """Some of what a `cat` joins, in its dtype."""
        found = tensors[0] if len(tensors) == 1 else self.call(node, aten.cat.default, list(tensors), axis)
        wanted = node.meta["val"].dtype
        return found if found.meta["val"].dtype == wanted else self.call(node, aten.to.dtype, found, wanted)

    def _arange(self, node: fx.Node) -> Split | None:
        arguments = normalized_arguments(node)
        start, end = arguments.get("start", 0), arguments["end"]
        if not isinstance(start, int) or arguments.get("step", 1) != 1:
            return None
        options = {"dtype": node.meta["val"].dtype, "device": node.meta["val"].device}
        front = self.call(node, aten.arange.start, start, start + self.count, **options)
        rest = self.call(node, aten.arange.start, start + self.count, end, **options)
        return Split(0, front, rest, learned=False)

    def _table(self, node: fx.Node) -> Split | None:
        """`table[:total]`."""
        arguments = normalized_arguments(node)
        axis, start = arguments["dim"] % len(shape_of(node)), arguments["start"] or 0
        table = self.constants.of(node.args[0])  # type: ignore[arg-type]
        if table is None or not isinstance(start, int) or start < 0 or arguments["step"] != 1:
            return None
        if isinstance(shape_of(node)[axis], int) or not same_size(shape_of(node)[axis], self.total):
            return None
        front = self.call(node, aten.slice.Tensor, table, axis, start, start + self.count)
        rest = self.call(node, aten.slice.Tensor, node.args[0], axis, start + self.count, arguments["end"])
        return Split(axis, front, rest, learned=False)

    def _filled(self, node: fx.Node, kind: Tensor) -> Split | None:
        """`ones([batch, total])`."""
        axes = [axis for axis, size in enumerate(kind.shape) if same_size(size, self.total)]
        sizes = filled_sizes(node)
        if sizes is None or len(axes) != 1:
            return None
        sizes[axes[0]] = self.count
        front = self.call(node, node.target, sizes, *node.args[1:], **node.kwargs)
        return Split(axes[0], front, self._tail(node, axes[0]), learned=False)

    def _tail(self, node: fx.Node, axis: int) -> fx.Node:
        """What stands behind the prompt, taken from the whole."""
        return self.call(node.next, aten.slice.Tensor, node, axis, self.count, END)

    # operators ------------------------------------------------------------------------------------------------------
    def _row(self, node: fx.Node) -> Split | None:
        """An operator that treats every place by itself."""
        if packet(node) is aten.cumsum:
            return self._counted(node)
        if is_pointwise(node):
            self._divide_constants(node)
        used = {each: self.parts[each] for each in node.all_input_nodes if each in self.parts}
        axis = result_axis(node, {each: split.axis for each, split in used.items()})
        others = [each for each in node.all_input_nodes if each not in used and tensor_type(each) is not None]
        fronts = {each: self.constants.of(each) for each in others}
        if axis is None or any(each is None for each in fronts.values()):
            return None
        known = {**{each: split.front for each, split in used.items()}, **fronts}
        args, kwargs = part_arguments(node, known, axis, front=True)  # type: ignore[arg-type]
        front = self.call(node, part_target(node), *args, **kwargs)
        if any(isinstance(each.meta["val"], torch.SymInt) for each in front.all_input_nodes):
            return None
        args, kwargs = part_arguments(node, {each: split.rest for each, split in used.items()}, axis, front=False)
        rest = self.call(node, part_target(node), *args, **kwargs)
        return Split(axis, front, rest, any(split.learned for split in used.values()))

    def _counted(self, node: fx.Node) -> Split | None:
        """`cumsum(mask)`, which counts positions."""
        split, dim = self.parts[node.args[0]], normalized_arguments(node)["dim"]  # type: ignore[index]
        if split.learned or dim % len(shape_of(node)) != split.axis:
            return None
        front = self.call(node, node.target, split.front, *node.args[1:], **node.kwargs)
        return Split(split.axis, front, self._tail(node, split.axis), learned=False)

    def _divide_constants(self, node: fx.Node) -> None:
        """Divide the constants that meet a divided value along the whole sequence, as positions of fixed sizes do."""
        back = {self.parts[each].axis - len(shape_of(each)) for each in node.all_input_nodes if each in self.parts}
        for each in node.all_input_nodes:
            kind = tensor_type(each)
            if each in self.parts or kind is None or len(back) > 1 or kind.ndim < -max(back):
                continue
            axis, constant = kind.ndim + max(back), self.constants.of(each)
            if constant is not None and same_size(kind.shape[axis], self.total):
                front = self.call(node, aten.slice.Tensor, constant, axis, 0, self.count)
                rest = self.call(node, aten.slice.Tensor, each, axis, self.count, END)
                self.parts[each] = Split(axis, front, rest, learned=False)

    def _fits(self, node: fx.Node, split: Split) -> bool:
        """Whether the parts have the types that the whole says; what has several results is known by them."""
        kind = tensor_type(node)
        if kind is None:
            return True
        front, rest = split.front.meta["val"], split.rest.meta["val"]
        if {front.dtype, rest.dtype} != {kind.dtype} or not front.ndim == rest.ndim == kind.ndim:
            return False
        for axis, size in enumerate(kind.shape):
            if axis == split.axis:
                if not same_size(front.shape[axis], self.count) or not same_size(rest.shape[axis] + self.count, size):
                    return False
            elif not same_size(rest.shape[axis], size) or not (
                same_size(front.shape[axis], 1) or same_size(front.shape[axis], size)
            ):
                return False
        return is_static(split.front)

    def _shorter(self, node: fx.Node) -> fx.Node | None:
        """What only the rest is read for: `x[:, count:]`, the last place, a size."""
        x: Any = node.args[0] if node.args else None
        split = self.parts.get(x) if isinstance(x, fx.Node) else None
        if split is None or not split.learned:
            return None
        arguments = normalized_arguments(node)
        axis = arguments.get("dim")
        if not isinstance(axis, int) or packet(node) not in (aten.slice, aten.select, aten.sym_size):
            return None
        if packet(node) is aten.sym_size:
            size = self.call(node, aten.sym_size.int, split.rest, axis)
            return size if axis % len(shape_of(x)) != split.axis else self.call(node, operator.add, size, self.count)
        if axis % len(shape_of(x)) != split.axis:
            return None
        if packet(node) is aten.select:
            at = self._in_rest(split, arguments["index"])
            return None if at is None else self.call(node, aten.select.int, split.rest, axis, at)
        start, end = self._in_rest(split, arguments["start"] or 0), arguments["end"]
        if start is None or end not in (None, END) or arguments["step"] != 1:
            return None
        return split.rest if start == 0 else self.call(node, aten.slice.Tensor, split.rest, axis, start, END)

    def _in_rest(self, split: Split, place: Any) -> int | None:
        """A place of the whole, from the front or from the end, as one of the rest; None when it may lie before it."""
        if not isinstance(place, int):
            return None
        if place >= 0:
            return place - self.count if place >= self.count else None
        env, size = self.entry.fake_mode.shape_env, size_expression(shape_of(split.rest)[split.axis])
        least = size if env is None else env.bound_sympy(size).lower
        return place if bool(least >= -place) else None
