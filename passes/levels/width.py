"""Merging features: where a graph says how many there are, and how every weight follows."""

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from sparc.passes.levels.axes import Axis
from sparc.passes.levels.depth import refused
from sparc.passes.levels.maps import AxisMap, Part
from sparc.passes.levels.spaces import Spaces
from sparc.program import Entry, Program

aten = torch.ops.aten

_SIZES = {aten.reshape: 1, aten.view: 1, aten._unsafe_view: 1, aten.expand: 1}


def merge_features(program: Program, inside: Collection[fx.Node], width: int) -> dict[str, tuple[AxisMap, ...]]:
    """Rewrite the sizes in a graph for features merged by `width`, in place.

    A weight that is both written and contracted along an axis, such as an embedding that is also the head, can only be
    averaged. What contracts it then multiplies its input by `width` first, which is the same as summing its columns: so
    tied weights stay tied, and decoalescing, which takes the factor out again, preserves the function.

    Args:
        program: edited: sizes and factors in its graph. Weights keep their values and types are stale.
        inside: nodes of the repeated blocks, whose features must all be merged.
        width: how many units become one.

    Returns:
        The maps of every weight that changes.

    Raises:
        PassError: SPARC220 when features inside the blocks cannot be merged.
    """
    entry = program.main
    spaces = Spaces(entry)
    merge = _Merge(spaces, width)
    for node, name, _ in spaces.products:
        for axis in spaces.weights[name] if node in inside else ():
            why = merge.obstacle(axis)
            if why is not None:
                raise refused(node, f"the features of {name} cannot be merged by {width}: {why}")
    for node in list(entry.graph.nodes):
        if node.op == "call_function":
            merge.resize(node)
    for node, name, contracted in spaces.products:
        if not spaces.contracts(name, contracted):
            _scale_input(entry, node, merge, spaces.weights[name][contracted])
    maps = {name: merge.maps(name) for name in spaces.weights}
    return {name: found for name, found in maps.items() if found}


class _Merge:
    """What merging by `width` does to axes."""

    def __init__(self, spaces: Spaces, width: int) -> None:
        self._spaces = spaces
        self.width = width
        axes = (axis for shape in spaces.weights.values() for axis in shape if axis is not None)
        self._carriers = {leaf.root for axis in axes for leaf in axis.leaves}

    def merges(self, leaf: Axis) -> bool:
        """Whether an axis that is no concatenation is merged."""
        root = leaf.root
        return root in self._carriers and not root.frozen and root.units % self.width == 0

    def obstacle(self, axis: Axis | None) -> str | None:
        """Why not all of an axis is merged."""
        if axis is None:
            return "there is one feature"
        kept = next((leaf.root for leaf in axis.leaves if not self.merges(leaf)), None)
        return None if kept is None else kept.frozen or f"they make {kept.units} units"

    def size(self, axis: Axis) -> int:
        """The size of an axis in the coarser level."""
        return sum(leaf.size // self.width if self.merges(leaf) else leaf.size for leaf in axis.leaves)

    def maps(self, name: str) -> tuple[AxisMap, ...]:
        """The maps of a weight along the axes that change."""
        found = []
        for index, axis in enumerate(self._spaces.weights[name]):
            if axis is None or self.size(axis) == axis.size:
                continue
            parts = tuple(Part(leaf.size, leaf.root.units if self.merges(leaf) else 0) for leaf in axis.leaves)
            found.append(AxisMap(index, self._spaces.contracts(name, index), parts, self.width))
        return tuple(found)

    def resize(self, node: fx.Node) -> None:
        """Rewrite the sizes among a node's arguments."""
        packet = getattr(node.target, "overloadpacket", node.target)
        axes: Any = self._spaces.axes[node]
        if packet in _SIZES:
            self._update(node, _SIZES[packet], axes)
        elif packet is aten.unflatten:
            first = int(node.args[1]) % len(self._spaces[node.args[0]])  # type: ignore[arg-type, index]
            self._update(node, 2, axes[first:])
        elif packet in (aten.layer_norm, aten.rms_norm):
            self._update(node, 1, axes[-1:])
        elif packet is aten.split or packet is aten.split_with_sizes:
            dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
            parts = [part[dim] for part in axes]
            if isinstance(node.args[1], int):
                node.update_arg(1, node.args[1] if parts[0] is None else self.size(parts[0]))
            else:
                self._update(node, 1, parts)

    def _update(self, node: fx.Node, position: int, axes: Any) -> None:
        sizes: Any = node.args[position]
        pairs = zip(sizes, axes, strict=False)
        node.update_arg(
            position,
            [
                self.size(axis) if isinstance(size, int) and size > 0 and axis is not None else size
                for size, axis in pairs
            ],
        )


def _scale_input(entry: Entry, node: fx.Node, merge: _Merge, axis: Axis | None) -> None:
    if axis is None or merge.size(axis) == axis.size:
        return
    if merge.obstacle(axis) is not None:
        raise refused(node, "a tied weight is merged along a part of an axis only")
    node.update_arg(0, entry.call(aten.mul.Tensor, node.args[0], float(merge.width), before=node))
