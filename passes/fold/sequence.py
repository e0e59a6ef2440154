"""A program along a sequence that starts with a constant: every value as a constant front and a rest."""

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sparc.analysis.elements import index_symbols, mask_condition
from sparc.analysis.features import operator_name, packet
from sparc.analysis.logic import at_least_zero
from sparc.analysis.values import (
    is_deterministic,
    is_static,
    same_size,
    scalar_value,
    shape_of,
    size_expression,
    tensor_type,
)
from sparc.passes.canonicalize.scores import LOW
from sparc.passes.fold.rows import is_pointwise, part_arguments, result_axis
from sparc.passes.fold.unbatched import Unbatched, is_learned
from sparc.pattern import normalized_arguments
from sparc.program import Entry, Program

aten = torch.ops.aten

_END = 2**63 - 1  # what slices to the end are exported with
BIDIRECTIONAL = "attention is not causal: what stands at the prompt depends on what follows it"


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
        attentions: those that were divided.
        refused: attentions at the prompt that were not, with the reason.
        stopped: the first other operator at the prompt that was not.
        stored: the constants that the rest reads, with what they are.
    """

    program: Program
    entry: Entry
    count: int
    total: Any
    parts: dict[fx.Node, Split] = field(default_factory=dict)
    replaced: dict[fx.Node, fx.Node] = field(default_factory=dict)
    attentions: list[fx.Node] = field(default_factory=list)
    refused: dict[fx.Node, str] = field(default_factory=dict)
    stopped: fx.Node | None = None
    stored: dict[fx.Node, str] = field(default_factory=dict)
    _sources: set[fx.Node] = field(default_factory=set)
    _wholes: dict[fx.Node, fx.Node] = field(default_factory=dict)
    _readers: list[tuple[fx.Node, fx.Node, fx.Node]] = field(default_factory=list)
    _lower: fx.Node | None = None

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
                found = self._attention(node) if packet(node) is aten.scaled_dot_product_attention else self._row(node)
                if found is None and packet(node) is not aten.scaled_dot_product_attention:
                    self._stop(node)
            if found is not None and self._fits(node, found):
                self.parts[node] = found

    def _stop(self, node: fx.Node) -> None:
        if self.stopped is None and any(
            each in self.parts and self.parts[each].learned for each in node.all_input_nodes
        ):
            self.stopped = node

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
    def _call(self, before: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
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
                sizes.append(-1 if kept else self._size(before, split.rest, axis))
            if any(size != -1 for size in sizes):
                front = self._call(before, aten.expand.default, front, sizes)
            self._wholes[node] = self._call(before, aten.cat.default, [front, split.rest], split.axis)
        return self._wholes[node]

    def _size(self, before: fx.Node, node: fx.Node, axis: int) -> Any:
        size = shape_of(node)[axis]
        return size if isinstance(size, int) else self._call(before, aten.sym_size.int, node, axis)

    # where a sequence comes from ------------------------------------------------------------------------------------
    def _source(self, node: fx.Node) -> Split | None:
        if packet(node) is aten.cat:
            return self._cat(node)
        kind = tensor_type(node)
        if kind is None:
            return None
        if packet(node) is aten.arange and kind.ndim == 1 and same_size(kind.shape[0], self.total):
            return self._arange(node)
        return self._table(node) if packet(node) is aten.slice else None

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
        found = tensors[0] if len(tensors) == 1 else self._call(node, aten.cat.default, list(tensors), axis)
        wanted = node.meta["val"].dtype
        return found if found.meta["val"].dtype == wanted else self._call(node, aten.to.dtype, found, wanted)

    def _arange(self, node: fx.Node) -> Split | None:
        arguments = normalized_arguments(node)
        start, end = arguments.get("start", 0), arguments["end"]
        if not isinstance(start, int) or arguments.get("step", 1) != 1:
            return None
        options = {"dtype": node.meta["val"].dtype, "device": node.meta["val"].device}
        front = self._call(node, aten.arange.start, start, start + self.count, **options)
        rest = self._call(node, aten.arange.start, start + self.count, end, **options)
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
        front = self._call(node, aten.slice.Tensor, table, axis, start, start + self.count)
        rest = self._call(node, aten.slice.Tensor, node.args[0], axis, start + self.count, arguments["end"])
        return Split(axis, front, rest, learned=False)

    # operators ------------------------------------------------------------------------------------------------------
    def _row(self, node: fx.Node) -> Split | None:
        """An operator that treats every place by itself."""
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
        front = self._call(node, node.target, *args, **kwargs)
        if any(isinstance(each.meta["val"], torch.SymInt) for each in front.all_input_nodes):
            return None
        args, kwargs = part_arguments(node, {each: split.rest for each, split in used.items()}, axis, front=False)
        rest = self._call(node, node.target, *args, **kwargs)
        return Split(axis, front, rest, any(split.learned for split in used.values()))

    def _divide_constants(self, node: fx.Node) -> None:
        """Divide the constants that meet a divided value along the whole sequence, as positions of fixed sizes do."""
        back = {self.parts[each].axis - len(shape_of(each)) for each in node.all_input_nodes if each in self.parts}
        for each in node.all_input_nodes:
            kind = tensor_type(each)
            if each in self.parts or kind is None or len(back) > 1 or kind.ndim < -max(back):
                continue
            axis, constant = kind.ndim + max(back), self.constants.of(each)
            if constant is not None and same_size(kind.shape[axis], self.total):
                front = self._call(node, aten.slice.Tensor, constant, axis, 0, self.count)
                rest = self._call(node, aten.slice.Tensor, each, axis, self.count, _END)
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
            size = self._call(node, aten.sym_size.int, split.rest, axis)
            return size if axis % len(shape_of(x)) != split.axis else self._call(node, operator.add, size, self.count)
        if axis % len(shape_of(x)) != split.axis:
            return None
        if packet(node) is aten.select:
            at = self._in_rest(split, arguments["index"])
            return None if at is None else self._call(node, aten.select.int, split.rest, axis, at)
        start, end = self._in_rest(split, arguments["start"] or 0), arguments["end"]
        if start is None or end not in (None, _END) or arguments["step"] != 1:
            return None
        return split.rest if start == 0 else self._call(node, aten.slice.Tensor, split.rest, axis, start, _END)

    def _in_rest(self, split: Split, place: Any) -> int | None:
        """A place of the whole, from the front or from the end, as one of the rest; None when it may lie before it."""
        if not isinstance(place, int):
            return None
        if place >= 0:
            return place - self.count if place >= self.count else None
        env, size = self.entry.fake_mode.shape_env, size_expression(shape_of(split.rest)[split.axis])
        least = size if env is None else env.bound_sympy(size).lower
        return place if bool(least >= -place) else None

    # attention ------------------------------------------------------------------------------------------------------
    def _attention(self, node: fx.Node) -> Split | None:
        """The prompt attends to itself, the rest to both; only where no place of the prompt looks behind the prompt."""
        arguments = normalized_arguments(node)
        given = [arguments[name] for name in ("query", "key", "value")]
        if given[0] not in self.parts:  # the prompt asks nothing: its keys and values are joined with the rest
            return None
        learned = any(each in self.parts and self.parts[each].learned for each in given)
        why, fronts = self._visible(node, arguments)
        if why:
            if learned:
                self.refused[node] = why
            return None
        q, k, v = (self.parts[each] for each in given)
        options = {name: arguments[name] for name in ("scale", "enable_gqa") if arguments[name]}
        own = self._front_mask(node, fronts)
        front_options = options if own is not None else {"is_causal": True, **options}
        front = self._call(node, node.target, q.front, k.front, v.front, *([own] if fronts else []), **front_options)
        key, value = self.whole(given[1], node, "prompt_key"), self.whole(given[2], node, "prompt_value")
        rest = self._call(node, node.target, q.rest, key, value, self._rest_mask(node, arguments, q), **options)
        if learned:
            self.attentions.append(node)
        return Split(q.axis, front, rest, learned)

    def _visible(self, node: fx.Node, arguments: dict[str, Any]) -> tuple[str, list[fx.Node]]:
        """Why attention cannot be divided; else an empty text, and the constant part of each mask over keys."""
        given = [self.parts.get(arguments[name]) for name in ("query", "key", "value")]
        if any(each is None or each.axis != len(shape_of(node)) - 2 for each in given):
            return "its keys and values do not begin with the prompt, or depend on the inputs there", []
        if not is_deterministic(node):
            return "attention drops elements at random", []
        if arguments["is_causal"]:
            return "", []
        if arguments["attn_mask"] is None:
            return BIDIRECTIONAL, []
        causal, fronts = False, []
        for each in _conditions(self.program, arguments["attn_mask"]):
            split, rank = self.parts.get(each), len(shape_of(each))
            if rank >= 2 and mask_condition(self.program, each, LOW) == _causal(rank):
                causal = True
            elif split is not None and split.axis == rank - 1 and (rank == 1 or same_size(shape_of(each)[-2], 1)):
                fronts.append(split.front)
            else:
                return f"what {operator_name(each)} hides from the prompt is not known", []
        return ("" if causal else BIDIRECTIONAL), fronts

    def _front_mask(self, node: fx.Node, fronts: list[fx.Node]) -> fx.Node | None:
        """`[..., count, count]` bool: what the prompt sees of itself; None for all that is not behind."""
        if not fronts:
            return None
        ones = self._call(node, aten.ones.default, [self.count, self.count], dtype=torch.bool)
        mask = self._call(node, aten.tril.default, ones)
        for each in fronts:
            mask = self._call(node, aten.logical_and.default, mask, each)
        return mask

    def _rest_mask(self, node: fx.Node, arguments: dict[str, Any], q: Split) -> fx.Node:
        """`[..., rest, total]`: the rows of the mask behind the prompt."""
        mask = arguments["attn_mask"]
        if mask is not None:
            return self._call(node, aten.slice.Tensor, mask, len(shape_of(mask)) - 2, self.count, _END)
        if self._lower is None:
            size = self._size(node, q.rest, q.axis)
            total = self.count + size if isinstance(size, int) else self._call(node, operator.add, size, self.count)
            keys = self._call(node, aten.unsqueeze.default, self._call(node, aten.arange.default, total), 0)
            places = self._call(node, aten.arange.start, self.count, total)
            queries = self._call(node, aten.unsqueeze.default, places, 1)
            self._lower = self._call(node, aten.le.Tensor, keys, queries)
        return self._lower


def _causal(rank: int) -> Any:
    symbols = index_symbols(rank)
    return at_least_zero(symbols[-2] - symbols[-1])


def _conditions(program: Program, mask: fx.Node) -> Iterator[fx.Node]:
    """The conditions that must all hold for a mask to let a key be seen."""
    if packet(mask) in (aten.__and__, aten.bitwise_and, aten.logical_and):
        for each in mask.args[:2]:
            yield from _conditions(program, each)  # type: ignore[arg-type]
        return
    if packet(mask) is aten.where:
        yes, no = (scalar_value(program, each) for each in mask.args[1:3])
        if yes == 0 and no is not None and no <= LOW:
            yield from _conditions(program, mask.args[0])  # type: ignore[arg-type]
            return
    yield mask
