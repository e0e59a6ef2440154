"""Channel classes: values that can only be rescaled together, channel by channel.

A *writer* (linear or a piece of one, convolution, gain of a norm or of a multiplication) starts a class for what it
writes. Operators that commute with a positive factor per channel (relu, add, pooling, ...) pass it on, joining the
classes of what they add. A *reader* (linear, convolution) ends it: the factor can be undone in its columns. Whatever
else reads a value freezes its class.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from sparc.analysis.features import packet
from sparc.analysis.values import tensor_type
from sparc.passes.rotate.heads import piece_of
from sparc.program import Program, is_weight, weight_nodes

aten = torch.ops.aten

PRODUCTS = (aten.linear, aten.conv1d, aten.conv2d, aten.conv3d)
NORMS = {aten.layer_norm: (2, 3), aten.rms_norm: (2,)}
_POINTWISE = frozenset(
    {aten.relu, aten.leaky_relu, aten.dropout, aten.clone, aten.contiguous, aten.neg, aten.abs, aten.to}
)
_SPATIAL = frozenset({aten.max_pool2d, aten.avg_pool2d, aten.adaptive_avg_pool2d, aten.upsample_nearest2d})


@dataclass
class ChannelClass:
    """Values that share one factor per channel.

    Args:
        size: how many channels.
        values: the values, with the axis of their channels.
        writers: the products, pieces of products, norms and multiplications that write them.
        readers: the products that read them.
        frozen: why they cannot be rescaled; empty when they can.
    """

    size: int
    values: dict[fx.Node, int] = field(default_factory=dict)
    writers: list[fx.Node] = field(default_factory=list)
    readers: list[fx.Node] = field(default_factory=list)
    frozen: str = ""

    def freeze(self, why: str) -> None:
        """Say why the class cannot be rescaled; the first reason counts."""
        self.frozen = self.frozen or why


class Classes:
    """The channel classes of one graph.

    Attributes:
        closed: products whose input belongs to no class, and why.
    """

    def __init__(self, program: Program, graph: fx.Graph) -> None:
        """Args: the program, and one of its graphs."""
        self._program = program
        self._of: dict[fx.Node, tuple[ChannelClass, int]] = {}
        self.closed: dict[fx.Node, str] = {}
        for node in graph.nodes:
            self._visit(node)

    def __iter__(self) -> Iterator[ChannelClass]:
        return iter({id(found): found for found, _ in self._of.values()}.values())

    def of(self, node: Any) -> ChannelClass | None:
        """The class of a value; None when nothing with channels writes it."""
        return self._of[node][0] if node in self._of else None

    def _visit(self, node: fx.Node) -> None:
        kind = packet(node)
        if kind in PRODUCTS:
            self._product(node)
        elif kind in NORMS:
            self._freeze(node, node.all_input_nodes)
            if is_weight(_argument(node, 2)) and self._owns(node):
                self._start(node, -1)
        elif kind is aten.add and len(node.all_input_nodes) == 2:
            self._join(node)
        elif kind in (aten.mul, aten.div):
            self._factor(node)
        elif (part := piece(node)) is not None and self._owns(part[0]):
            self._start(node, -1)
        elif not self._pass_on(node):
            self._freeze(node, node.all_input_nodes)

    def _product(self, node: fx.Node) -> None:
        x, axis = node.args[0], -1 if packet(node) is aten.linear else 1
        if not self._owns(node):
            self.closed[node] = "its weight or bias is computed, or used elsewhere as well"
            self._freeze(node, node.all_input_nodes, self.closed[node])
            return
        found = self._of.get(x)  # type: ignore[arg-type]
        if found is not None and _same_axis(node, found[1], axis, _rank(x)):
            found[0].readers.append(node)
        else:
            self._freeze(node, [x])  # type: ignore[list-item]
            writer = getattr(packet(x), "__name__", x.op)  # type: ignore[arg-type, union-attr]
            self.closed[node] = f"{writer}, which writes it, does not commute with factors"
        self._start(node, axis)

    def _start(self, node: fx.Node, axis: int) -> None:
        size = int(node.meta["val"].shape[axis])
        self._of[node] = (ChannelClass(size, {node: axis}, [node]), axis)

    def _join(self, node: fx.Node) -> None:
        """add(a, b): one class, if both have one and neither is broadcast."""
        found = [self._of.get(used) for used in node.all_input_nodes]
        shapes = {str(getattr(used.meta["val"], "shape", ())) for used in (node, *node.all_input_nodes)}
        first, second = found
        if first is None or second is None or first[1] != second[1] or len(shapes) > 1:
            self._freeze(node, node.all_input_nodes)
            return
        kept, gone = first[0], second[0]
        if kept is not gone:
            kept.values |= gone.values
            kept.writers += gone.writers
            kept.readers += gone.readers
            kept.freeze(gone.frozen)
            self._of |= {value: (kept, axis) for value, axis in gone.values.items()}
        self._put(node, kept, first[1])

    def _factor(self, node: fx.Node) -> None:
        """mul(a, b): the class of one of them; the other one's is frozen."""
        known = [used for used in node.all_input_nodes if used in self._of]
        if not known and self._is_gain(node):
            self._start(node, -1)
            return
        kept = known[-1] if known else None
        if kept is None or (packet(node) is aten.div and node.args[0] is not kept) or node.args[0] is node.args[1]:
            self._freeze(node, known)
            return
        self._freeze(node, [used for used in known if used is not kept])
        found, axis = self._of[kept]
        if str(node.meta["val"].shape) != str(kept.meta["val"].shape):
            self._freeze(node, known)
        else:
            self._put(node, found, axis)

    def _is_gain(self, node: fx.Node) -> bool:
        """mul(x, w), with one weight for each entry of the last axis."""
        weights, shape = written(node), node.meta["val"].shape
        if packet(node) is not aten.mul or len(weights) != 1 or len(node.all_input_nodes) != 2:
            return False
        return tuple(weights[0].meta["val"].shape) == tuple(shape[-1:]) and len(shape) > 1 and self._owns(node)

    def _pass_on(self, node: fx.Node) -> bool:
        """Whether the operator commutes with factors of its first argument's channels; then it joins that class."""
        x = node.args[0] if node.args else None
        if not isinstance(x, fx.Node) or x not in self._of or node.all_input_nodes != [x]:
            return False
        found, axis = self._of[x]
        kind = tensor_type(node)
        if kind is None or not kind.is_floating_point():
            return False
        if not (packet(node) in _POINTWISE or (packet(node) in _SPATIAL and axis == 1) or _keeps_channels(node, axis)):
            return False
        self._put(node, found, axis)
        return True

    def _put(self, node: fx.Node, found: ChannelClass, axis: int) -> None:
        found.values[node] = axis
        self._of[node] = (found, axis)

    def _freeze(self, node: fx.Node, values: list[fx.Node], why: str = "") -> None:
        name = getattr(packet(node), "__name__", node.op)
        for value in values:
            found = self.of(value)
            if found is not None:
                found.freeze(why or f"it is read by {name}")

    def _owns(self, node: fx.Node) -> bool:
        """Whether the weights of a writer are plain ones that nothing else reads, in any entry."""
        for weight in written(node):
            if not is_weight(weight):
                return False
            graphs = [entry.graph for entry in self._program.entries.values()]
            reads = [read for graph in graphs for read in weight_nodes(graph, weight.target)]
            if [user for read in reads for user in read.users] != [node]:
                return False
        return True


def piece(node: fx.Node) -> tuple[fx.Node, int] | None:
    """The linear layer whose result a node is a piece of, and the piece's first channel, when nothing but the division
    into pieces reads that result; None for other nodes.
    """
    pieces = node.args[0] if getattr(node.target, "__name__", "") == "getitem" else None
    found = piece_of(node, pieces) if isinstance(pieces, fx.Node) else None
    if found is None or packet(found[1]) is not aten.linear or list(found[1].users) != [pieces]:
        return None
    again = [user for user in pieces.users if user.args[1] == node.args[1]]  # type: ignore[union-attr]
    return (found[1], found[0]) if again == [node] else None


def written(writer: fx.Node) -> list[Any]:
    """What a writer multiplies or adds for each channel: the weight and bias of a product, the gain and shift of a
    norm, the vector of a multiplication. Of a piece, those of the whole.
    """
    part = piece(writer)
    if part is not None:
        writer = part[0]
    if packet(writer) is aten.mul:
        return [each for each in writer.args if is_weight(each)]
    positions = NORMS.get(packet(writer), (1, 2))
    return [weight for position in positions if (weight := _argument(writer, position)) is not None]


def first_row(writer: fx.Node) -> int:
    """The row of its weights that writes the first channel."""
    part = piece(writer)
    return 0 if part is None else part[1]


def _argument(node: fx.Node, position: int) -> Any:
    return node.args[position] if len(node.args) > position else None


def _rank(x: Any) -> int:
    value = x.meta["val"] if isinstance(x, fx.Node) else None
    return value.ndim if isinstance(value, Tensor) else 0


def _same_axis(node: fx.Node, axis: int, wanted: int, rank: int) -> bool:
    return axis % rank == wanted % rank if rank else False


def _keeps_channels(node: fx.Node, axis: int) -> bool:
    """Zero padding and means over other axes than that of the channels, which is 1."""
    if axis != 1:
        return False
    if packet(node) is aten.pad:
        widths: Any = node.args[1]
        plain = len(node.args) < 3 or (node.args[2] == "constant" and not (node.args[3] if len(node.args) > 3 else 0))
        return plain and len(widths) <= 2 * (_rank(node) - 2)
    if packet(node) is aten.mean:
        rank, dims = _rank(node.args[0]), _argument(node, 1)
        return bool(dims) and all(dim % rank > 1 for dim in dims)
    return False
