"""Residual streams: values that are added to each other and so share one basis of their features.

A *writer* (embedding, product, constant, norm) starts a stream. Operators that carry features pass it on, sums and
concatenations join streams. A *reader* (product, norm, gain per feature) ends it. Whatever else reads a value freezes
its stream: its features cannot be mixed.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx

from sparc.analysis.features import (
    carried_axis,
    is_norm,
    operator_name,
    packet,
    product_axes,
    reads_shape_only,
    vector,
)
from sparc.analysis.values import same_shape, same_size, shape_of, tensor_type
from sparc.pattern import normalized_arguments
from sparc.program import Program, is_weight

aten = torch.ops.aten

_SUMS = frozenset({aten.add, aten.sub})


@dataclass
class Stream:
    """Values whose features have one basis.

    Args:
        size: how many features.
        values: the values, with the axis of their features, from the end.
        writers: what writes them: products, embeddings, constants (`get_attr`), norms and gains per feature.
        readers: what reads their features: products, norms and gains per feature.
        sums: the additions among them.
        frozen: why the features cannot be mixed; empty when they can.
    """

    size: int
    values: dict[fx.Node, int] = field(default_factory=dict)
    writers: list[fx.Node] = field(default_factory=list)
    readers: list[fx.Node] = field(default_factory=list)
    sums: int = 0
    frozen: str = ""

    @property
    def residual(self) -> bool:
        """Whether it is a residual stream: what several operators write is summed, and a norm reads it."""
        return self.sums > 0 and len(self.writers) > 1 and any(is_norm(reader) for reader in self.readers)

    def freeze(self, why: str) -> None:
        """Say why the features cannot be mixed; the first reason counts."""
        self.frozen = self.frozen or why

    def absorb(self, other: "Stream") -> None:
        """Take over everything of a stream that this one is added to."""
        self.values |= other.values
        self.writers += other.writers
        self.readers += other.readers
        self.sums += other.sums
        self.freeze(other.frozen)

    def __str__(self) -> str:
        parts = [
            f"{verb} " + ", ".join(f"{count} {name}" for name, count in sorted(Counter(map(_kind, nodes)).items()))
            for verb, nodes in (("written by", self.writers), ("read by", self.readers))
            if nodes
        ]
        end = f"; frozen: {self.frozen}" if self.frozen else ""
        return f"{self.size} features, {', '.join(parts)}{end}"


def _kind(node: fx.Node) -> str:
    return "constant" if is_weight(node) else operator_name(node)


class Streams:
    """The streams of one graph."""

    def __init__(self, program: Program, graph: fx.Graph) -> None:
        """Args: the program, and one of its graphs."""
        self._program = program
        self._of: dict[fx.Node, tuple[Stream, int]] = {}
        self._adopted: list[fx.Node] = []
        for node in graph.nodes:
            self._visit(node)
        for node in self._adopted:
            self._freeze_earlier_uses(node)

    def __iter__(self) -> Iterator[Stream]:
        return iter({id(found): found for found, _ in self._of.values()}.values())

    def of(self, node: fx.Node) -> Stream | None:
        """The stream of a value; None when it has none."""
        return self._of[node][0] if node in self._of else None

    def _visit(self, node: fx.Node) -> None:
        axes = product_axes(node)
        if axes is not None:
            self._read(node, axes[0])
            self._start(node, axes[1])
        elif packet(node) is aten.embedding:
            self._freeze(node, node.all_input_nodes)
            self._start(node, -1)
        elif is_norm(node):
            self._read(node, -1)
            self._start(node, -1)
        elif packet(node) is aten.mul and (axis := self._gain_axis(node)) is not None:
            self._read(node, axis)
            self._start(node, axis)
        elif packet(node) in _SUMS and len(node.all_input_nodes) == 2:
            self._join(node, node.all_input_nodes, None)
            if node in self._of:
                self._of[node][0].sums += 1
        elif packet(node) is aten.cat:
            axis = int(normalized_arguments(node)["dim"])
            self._join(node, list(node.args[0]), axis % node.meta["val"].ndim - node.meta["val"].ndim)  # type: ignore[arg-type]
        elif not self._pass_on(node) and not reads_shape_only(node):
            self._freeze(node, node.all_input_nodes)

    def _start(self, node: fx.Node, axis: int) -> None:
        size = tensor_type(node).shape[axis]  # type: ignore[union-attr]
        if isinstance(size, int):
            self._of[node] = (Stream(size, {node: axis}, [node]), axis)

    def _read(self, node: fx.Node, axis: int) -> None:
        """The first argument is read along its features; every other one in a way that freezes it."""
        inputs = node.all_input_nodes
        found = next((self._of[x] for x in inputs if x in self._of), None)
        x = next((x for x in inputs if x in self._of), None)
        if found is not None and found[1] == axis and (x is node.args[0] or packet(node) is aten.mul):
            found[0].readers.append(node)
            inputs = [used for used in inputs if used is not x]
        self._freeze(node, inputs)

    def _gain_axis(self, node: fx.Node) -> int | None:
        """The axis of features that a product with a constant per feature scales; None when it is none."""
        for x, constant in (node.args[:2], node.args[1::-1]):
            if isinstance(x, fx.Node) and x in self._of and x is not constant:
                found, axis = self._of[x]
                fits = vector(self._program, constant, axis, found.size) is not None
                return axis if fits and found.size > 1 and same_shape(shape_of(x), shape_of(node)) else None
        return None

    def _join(self, node: fx.Node, parts: list[fx.Node], along: int | None) -> None:
        """A sum, or a concatenation along an axis: one stream, if every part has one with its features in one place."""
        known = next((self._of[part] for part in parts if part in self._of), None)
        if known is None:
            return
        axis = known[1]
        found = [self._adopt(part, *known) for part in parts]
        if along == axis:
            self._freeze(node, parts)
            return
        stream = self._of[next(part for part in parts if part in self._of)][0]
        for part, other in zip(parts, found, strict=True):
            if other is None:
                self._freeze(node, parts, f"it is added to what {operator_name(part)} writes")
                return
            if other[1] != axis or other[0].size != stream.size:
                self._freeze(node, parts)
                return
        for gone in {id(other[0]): other[0] for other in found if other is not None}.values():
            if gone is not stream:
                stream.absorb(gone)
                self._of |= {value: (stream, at) for value, at in gone.values.items()}
        self._put(node, stream, axis)

    def _adopt(self, node: fx.Node, like: Stream, axis: int) -> tuple[Stream, int] | None:
        """The stream of a part of a sum; a constant with as many features becomes one."""
        if node in self._of:
            return self._of[node]
        kind = tensor_type(node)
        if (
            kind is None
            or not kind.is_floating_point()
            or kind.ndim < -axis
            or not same_size(kind.shape[axis], like.size)
        ):
            return None
        if is_weight(node):
            self._start(node, axis)
            return self._of[node]
        x = node.args[0] if node.args else None
        rank = 0 if not isinstance(x, fx.Node) or tensor_type(x) is None else x.meta["val"].ndim
        for at in range(-1, -rank - 1, -1):
            fits = carried_axis(self._program, node, x, at) == axis  # type: ignore[arg-type]
            inner = self._adopt(x, like, at) if fits else None  # type: ignore[arg-type]
            if inner is not None:
                self._put(node, inner[0], axis)
                self._adopted.append(node)
                return self._of[node]
        return None

    def _freeze_earlier_uses(self, node: fx.Node) -> None:
        """What read a constant before it was added to a stream was not known to read one."""
        found = self._of[node][0]
        for user in node.users:
            if user not in found.values and user not in found.readers and not reads_shape_only(user):
                self._freeze(user, [node])

    def _pass_on(self, node: fx.Node) -> bool:
        for x in node.all_input_nodes:
            if x in self._of:
                found, axis = self._of[x]
                carried = carried_axis(self._program, node, x, axis)
                if carried is not None:
                    self._put(node, found, carried)
                    self._freeze(node, [used for used in node.all_input_nodes if used is not x])
                    return True
        return False

    def _put(self, node: fx.Node, found: Stream, axis: int) -> None:
        found.values[node] = axis
        self._of[node] = (found, axis)

    def _freeze(self, node: fx.Node, values: list[fx.Node], why: str = "") -> None:
        for value in values:
            found = self.of(value)
            if found is not None:
                found.freeze(why or f"it is read by {operator_name(node)}")
