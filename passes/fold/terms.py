"""What a node of the graph is as an affine map of its inputs, channel by channel."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sparc.analysis.features import packet
from sparc.analysis.values import same_shape, scalar_value, tensor_type
from sparc.encoding.operators import is_decode
from sparc.passes.fold.affine import AffineMap, Impossible, Sizes, diagonal
from sparc.pattern import normalized_arguments
from sparc.program import Program, is_weight

aten = torch.ops.aten

MOST = 64  # nodes of a region
_RANK = {aten.linear: 0, aten.conv1d: 1, aten.conv2d: 2, aten.conv3d: 3}
_POOLS = {aten.avg_pool1d: 1, aten.avg_pool2d: 2, aten.avg_pool3d: 3}
_PADS = {aten.constant_pad_nd, aten.pad}
_AFFINE = {*_RANK, *_POOLS, aten.batch_norm, aten.add, aten.sub, aten.mul, aten.div, aten.neg, *_PADS}


@dataclass(frozen=True)
class Constants:
    """A program's weights as terms read them.

    Args:
        program: holds them.
        device: `cpu` for values in float64; `meta` for shapes alone.
    """

    program: Program
    device: str = "cpu"

    def weight(self, name: str) -> Tensor:
        """A weight in float64."""
        tensor = self.program.weights[name]
        return tensor.to(self.device).double() if self.device == "cpu" else tensor.to("meta", torch.float64)

    def filled(self, sizes: Sequence[int], value: float) -> Tensor:
        """A tensor filled with a number."""
        return torch.full(sizes, value, dtype=torch.float64, device=self.device)


@dataclass(frozen=True)
class Layout:
    """Where a value's channels are.

    Args:
        axis: -1 behind linear layers, 1 behind convolutions.
        rank: axes of a window.
    """

    axis: int
    rank: int


@dataclass(frozen=True)
class Term:
    """One summand of a node: a map of one of its inputs."""

    input: fx.Node
    map: AffineMap


def is_product(node: Any) -> bool:
    """A linear layer or a convolution."""
    return packet(node) in _RANK


def may_be_affine(node: Any) -> bool:
    """Whether a node is one of the operators that `terms` knows."""
    return packet(node) in _AFFINE


def layout_of(node: fx.Node) -> Layout | None:
    """The layout that the products among a node and its nearest producers have; None for none, or two of them."""
    found: set[Layout] = set()
    stack, seen = [node], {node}
    while stack and len(seen) <= MOST:
        current = stack.pop()
        if is_product(current):
            rank = _RANK[packet(current)]
            found.add(Layout(1 if rank else -1, rank))
            continue
        inputs = current.all_input_nodes if may_be_affine(current) else []
        stack += [each for each in inputs if each not in seen]
        seen.update(inputs)
    return found.pop() if len(found) == 1 else None


def channels(node: fx.Node, layout: Layout) -> int | None:
    """How many channels a value has; None when that is no number, or it has other axes than the layout."""
    kind = tensor_type(node)
    if kind is None or not kind.is_floating_point() or kind.ndim == 0:
        return None
    if layout.rank and kind.ndim != layout.rank + 2:
        return None
    size = kind.shape[layout.axis]
    return size if isinstance(size, int) else None


def terms(constants: Constants, node: fx.Node, layout: Layout) -> list[Term] | None:
    """A node as a sum of affine maps of its inputs; None when it is none.

    Args:
        constants: the weights.
        node: a call.
        layout: of its channels.

    Raises:
        Impossible: it looks like one, but is none; says why.
    """
    kind = packet(node)
    if kind not in _AFFINE or channels(node, layout) is None:
        return None
    read = _Reader(constants, node, layout)
    if kind in _RANK:
        return read.product() if _RANK[kind] == layout.rank else None
    if kind in _POOLS:
        return read.pool() if _POOLS[kind] == layout.rank else None
    if kind is aten.batch_norm:
        return read.batch_norm()
    if kind in _PADS:
        return read.pad()
    if kind in (aten.add, aten.sub):
        return read.sum(-1.0 if kind is aten.sub else 1.0)
    return read.scaled()


class _Reader:
    """One node, with what is needed to read it."""

    def __init__(self, constants: Constants, node: fx.Node, layout: Layout) -> None:
        self.constants, self.node, self.layout = constants, node, layout
        self.given = normalized_arguments(node)

    def weight(self, value: Any, what: str) -> Tensor | None:
        if value is None:
            return None
        if is_decode(value):
            raise Impossible(f"{what} is encoded already")
        if not is_weight(value):
            raise Impossible(f"{what} is computed")
        return self.constants.weight(str(value.target))

    def product(self) -> list[Term] | None:
        kernel = self.weight(self.given["weight"], "a weight")
        bias = self.weight(self.given.get("bias"), "a bias")
        assert kernel is not None
        if not self.layout.rank:
            return [Term(self.given["input"], AffineMap(kernel, bias))] if kernel.ndim == 2 else None
        stride, dilation = self.sizes("stride"), self.sizes("dilation")
        padding = self.padding(kernel, stride, dilation)
        return [Term(self.given["input"], AffineMap(kernel, bias, stride, padding, dilation, self.given["groups"]))]

    def sizes(self, name: str) -> Sizes:
        value = self.given[name]
        found = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        return found * self.layout.rank if len(found) == 1 else found

    def padding(self, kernel: Tensor, stride: Sizes, dilation: Sizes) -> Sizes:
        if not isinstance(self.given["padding"], str):
            return self.sizes("padding")
        if self.given["padding"] == "valid":
            return (0,) * self.layout.rank
        wanted = [step * (size - 1) for step, size in zip(dilation, kernel.shape[2:], strict=True)]
        if any(each % 2 for each in wanted):
            raise Impossible("more zeros are padded on one side than on the other")
        return tuple(each // 2 for each in wanted)

    def pool(self) -> list[Term] | None:
        given, rank = self.given, self.layout.rank
        size, padding = self.sizes("kernel_size"), self.sizes("padding")
        stride = self.sizes("stride") if given["stride"] else size
        counted = given["count_include_pad"] or not any(padding)
        if given["ceil_mode"] or not counted or given.get("divisor_override") is not None:
            return None
        count = channels(given["self"], self.layout)
        if count is None:
            return None
        kernel = self.constants.filled((count, 1, *size), 1.0 / math.prod(size))
        return [Term(given["self"], AffineMap(kernel, None, stride, padding, (1,) * rank, count))]

    def batch_norm(self) -> list[Term] | None:
        given, kind = self.given, tensor_type(self.node)
        mean, variance = given["running_mean"], given["running_var"]
        if given["training"] or mean is None or variance is None:
            return None
        if self.layout.axis == -1 and kind is not None and kind.ndim != 2:
            return None
        names = ("running_mean", "running_var", "weight", "bias")
        mean, variance, gain, shift = (self.weight(given[name], "a statistic") for name in names)
        assert mean is not None
        assert variance is not None
        factor = (variance + given["eps"]).rsqrt()
        factor = factor if gain is None else factor * gain
        offset = -mean * factor
        bias = offset if shift is None else offset + shift
        return [Term(given["input"], diagonal(factor, self.layout.rank, bias))]

    def pad(self) -> list[Term] | None:
        amounts, rank = list(self.given["pad"]), self.layout.rank
        constant = self.given.get("mode", "constant") == "constant"
        if not rank or not constant or self.given["value"] or not all(isinstance(each, int) for each in amounts):
            return None
        amounts += [0] * (2 * rank - len(amounts))
        pairs = [tuple(amounts[2 * axis : 2 * axis + 2]) for axis in reversed(range(rank))]
        if len(amounts) > 2 * rank or any(left != right or left < 0 for left, right in pairs):
            return None
        found = self.identity(self.given["self"])
        if found is None:
            return None
        moved = AffineMap(found.kernel, None, found.stride, tuple(p for p, _ in pairs), found.dilation, found.groups)
        return [Term(self.given["self"], moved)]

    def sum(self, sign: float) -> list[Term] | None:
        if isinstance(self.given.get("alpha", 1), fx.Node):
            return None
        sign *= float(self.given.get("alpha", 1))
        left, right = self.given["self"], self.given["other"]
        constant = self.constant(right)
        if constant is not None:
            return self.shifted(left, 1.0, sign * constant)
        constant = self.constant(left)
        if constant is not None:
            return self.shifted(right, sign, constant)
        pair = [self.identity(left), self.identity(right, sign)]
        if pair[0] is None or pair[1] is None:
            return None
        return [Term(each, map) for each, map in zip((left, right), pair, strict=True) if map is not None]

    def shifted(self, value: Any, factor: float, constant: Tensor) -> list[Term] | None:
        found = self.identity(value, factor)
        if found is None:
            return None
        bias = constant.expand(found.outputs)
        return [Term(value, AffineMap(found.kernel, bias, *_geometry(found)))]

    def scaled(self) -> list[Term] | None:
        kind, value = packet(self.node), self.given["self"]
        constant: Tensor | None = self.constants.filled((1,), -1.0)
        if kind is not aten.neg:
            constant = self.constant(self.given["other"])
        if constant is None and kind is aten.mul:
            value, constant = self.given["other"], self.constant(self.given["self"])
        found = self.identity(value)
        if constant is None or found is None or self.given.get("rounding_mode") is not None:
            return None
        factor = 1 / constant if kind is aten.div else constant
        return [Term(value, diagonal(factor.expand(found.outputs), self.layout.rank))]

    def identity(self, value: Any, factor: float = 1.0) -> AffineMap | None:
        """The value itself, times a factor, if it has the shape of the node, up to padding."""
        count = channels(value, self.layout) if isinstance(value, fx.Node) else None
        if count is None or value.meta["val"].dtype != self.node.meta["val"].dtype:
            return None
        same = same_shape(value.meta["val"].shape, self.node.meta["val"].shape)
        if not same and packet(self.node) not in _PADS:
            return None
        return diagonal(self.constants.filled((count,), factor), self.layout.rank)

    def constant(self, value: Any) -> Tensor | None:
        """A constant with one value for each channel, or one for all: `[channels]` or `[1]`."""
        number = scalar_value(self.constants.program, value)
        if number is not None:
            return self.constants.filled((1,), float(number))
        if not is_weight(value):
            return None
        tensor, kind = self.constants.program.weights[str(value.target)], self.node.meta["val"]
        axis = self.layout.axis % kind.ndim - kind.ndim  # from behind, as broadcasting counts
        sizes = [size for each, size in enumerate(tensor.shape, -tensor.ndim) if each != axis]
        if not tensor.is_floating_point() or tensor.ndim < -axis or any(size != 1 for size in sizes):
            return None
        return self.constants.weight(str(value.target)).flatten()


def _geometry(found: AffineMap) -> tuple[Any, ...]:
    return found.stride, found.padding, found.dilation, found.groups
