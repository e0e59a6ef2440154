"""Constants without the batch that they are repeated along."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sparc.analysis.features import packet
from sparc.analysis.values import is_deterministic, is_static, same_shape, same_size, shape_of, tensor_type
from sparc.passes.fold.rows import expanded_sizes, filled_sizes, is_row_wise
from sparc.pattern import normalized_arguments
from sparc.program import Entry, is_weight
from sparc.region import cone

aten = torch.ops.aten


def float_weights(node: fx.Node) -> Iterator[fx.Node]:
    """The floating-point weights that a value is made of."""
    for each in (node, *cone([node])):
        for used in (each, *each.all_input_nodes):
            if is_weight(used) and used.meta["val"].is_floating_point():
                yield used


def is_learned(node: fx.Node) -> bool:
    """Whether a value is made of floating-point numbers that some weight holds."""
    kind = tensor_type(node)
    return kind is not None and kind.is_floating_point() and any(True for _ in float_weights(node))


@dataclass
class Unbatched:
    """Finds the values of an entry that depend on no input but for sizes that they are repeated along.

    Args:
        entry: the entry; new nodes are inserted before those that they stand for.
    """

    entry: Entry
    _known: dict[fx.Node, fx.Node | None] = field(default_factory=dict)

    def leading(self, tensors: list[fx.Node], axis: int, count: int | None = None) -> list[fx.Node] | None:
        """The constants that stand first among tensors to be joined along an axis, without their batch.

        Args:
            tensors: of equal rank.
            axis: from the front.
            count: places that the constants must have together; by default all that stand first.

        Returns:
            None when there are none, when nothing stands behind them, or when they do not have `count` places.
        """
        found: list[fx.Node] = []
        places = 0
        for each in tensors:
            size: Any = shape_of(each)[axis] if len(shape_of(each)) > axis else None
            part = self.of(each) if isinstance(size, int) and places != count else None
            if part is None:
                break
            found.append(part)
            places += size
        known = found and len(found) < len(tensors) and (count is None or places == count)
        return found if known else None

    def of(self, node: fx.Node) -> fx.Node | None:
        """A value that depends on no input, with size one for axes of varying size along which it is repeated; None
        when it is no constant.
        """
        if node not in self._known:
            self._known[node] = self._constant(node)
        return self._known[node]

    def _constant(self, node: fx.Node) -> fx.Node | None:
        if is_weight(node):
            return node
        if node.op != "call_function" or not is_deterministic(node) or tensor_type(node) is None:
            return None
        sizes = filled_sizes(node)
        if sizes is not None:
            return node if is_static(node) else self._call(node, node.target, sizes, *node.args[1:], **node.kwargs)
        tensors = [used for used in node.all_input_nodes if tensor_type(used) is not None]
        parts: dict[fx.Node, fx.Node] = {}
        for used in tensors:
            part = self.of(used)
            if part is None:
                return None
            parts[used] = part
        if packet(node) in (aten.expand, aten.repeat, aten.slice) and len(tensors) == 1:
            return self._repeated(node, parts[tensors[0]])
        if len(tensors) < len(node.all_input_nodes):
            return None
        if all(part is used for used, part in parts.items()):
            return node
        if not (is_row_wise(node) or all(same_shape(shape_of(each), shape_of(part)) for each, part in parts.items())):
            return None
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda used: parts[used])
        return self._checked(node, self._call(node, node.target, *args, **kwargs))

    def _repeated(self, node: fx.Node, part: fx.Node) -> fx.Node | None:
        """What repeats a constant along axes of varying size, or takes one of the repetitions."""
        x: Any = node.args[0]
        if packet(node) is aten.expand:
            return self._call(node, aten.expand.default, part, expanded_sizes(node))
        if packet(node) is aten.repeat:
            given: Any = node.args[1]
            times = [1 if isinstance(each, fx.Node) else each for each in given]
            missing = len(times) - len(shape_of(x))
            old = [1] * missing + list(shape_of(part))
            if any(isinstance(each, fx.Node) and size != 1 for each, size in zip(given, old, strict=True)):
                return None
            return self._call(node, aten.repeat.default, part, times)
        arguments = normalized_arguments(node)
        axis = arguments["dim"] % len(shape_of(x))
        if same_size(shape_of(part)[axis], shape_of(x)[axis]):
            return self._checked(node, self._call(node, aten.slice.Tensor, part, *node.args[1:]))
        return self._checked(node, part)

    def _checked(self, node: fx.Node, part: fx.Node) -> fx.Node | None:
        """A constant if it has the type of what it stands for, but for axes of varying size."""
        old, new = node.meta["val"], part.meta["val"]
        same = old.dtype == new.dtype and old.ndim == new.ndim and is_static(part)
        pairs = zip(old.shape, new.shape, strict=False)
        return part if same and all(same_size(a, b) or (not isinstance(a, int) and b == 1) for a, b in pairs) else None

    def _call(self, before: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.entry.call(target, *args, before=before, like=before, **kwargs)
