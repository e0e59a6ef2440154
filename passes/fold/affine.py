"""Affine maps between channels: what linear layers, convolutions, norms in eval mode and their sums have in common.

An `AffineMap` is `y[o] = sum_j K[j] x[s o - p + d j] + b` over the positions `j` of a window, for every axis of the
window by itself; a linear layer has no window. Maps can be followed by one another, added, scaled and shifted, with
tensors of any dtype, also without values (on the device `meta`), which is enough to know what a merged map would weigh.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

_CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class AffineMap:
    """See the module.

    Args:
        kernel: `[out, in / groups, *window]`.
        bias: `[out]`, or None for zero.
        stride: of each axis of the window.
        padding: zeros on each side; negative where positions are cropped.
        dilation: distance of the window's positions.
        groups: channels are mapped group by group; as many as channels make a diagonal map.
    """

    kernel: Tensor
    bias: Tensor | None = None
    stride: Sizes = ()
    padding: Sizes = ()
    dilation: Sizes = ()
    groups: int = 1

    @property
    def window(self) -> Sizes:
        """Positions that one output reads, along each axis."""
        return tuple(self.kernel.shape[2:])

    @property
    def inputs(self) -> int:
        """Input channels."""
        return int(self.kernel.shape[1]) * self.groups

    @property
    def outputs(self) -> int:
        """Output channels."""
        return int(self.kernel.shape[0])

    @property
    def pointwise(self) -> bool:
        """Whether every output reads its own position alone."""
        still = all(stride == 1 for stride in self.stride) and not any(self.padding)
        return still and all(size == 1 for size in self.window)

    @property
    def diagonal(self) -> bool:
        """Whether it multiplies every channel by a number."""
        return self.pointwise and self.groups == self.inputs == self.outputs


class Impossible(Exception):
    """Two maps have no sum or composition that is a map; says why."""


def diagonal(factors: Tensor, rank: int, bias: Tensor | None = None) -> AffineMap:
    """`y = factors * x + b` for every channel, `[channels]`, with a window of `rank` axes."""
    ones = (1,) * rank
    kernel = factors.reshape(-1, *[1] * (1 + rank))
    return AffineMap(kernel, bias, ones, (0,) * rank, ones, groups=factors.numel())


def then(first: AffineMap, second: AffineMap) -> AffineMap:
    """`second(first(x))`.

    Raises:
        Impossible: zeros that `second` pads with stand where `first` would give something else, or the positions of
            both windows lie on different grids.
    """
    bias = _then_bias(first, second)
    if second.diagonal:
        column = second.kernel.reshape(-1, *[1] * (first.kernel.ndim - 1))
        return replace(first, kernel=first.kernel * column, bias=bias)
    if first.diagonal and (first.bias is None or not any(second.padding)):
        return replace(second, kernel=second.kernel * _columns(second, first.kernel.flatten()), bias=bias)
    dilation = []
    for axis, (size, other) in enumerate(zip(first.window, second.window, strict=True)):
        if second.padding[axis] > 0 and (size > 1 or first.bias is not None):
            raise Impossible("the second pads with zeros, which are not what the first gives beyond the border")
        wide, fine = first.stride[axis] * second.dilation[axis], first.dilation[axis]
        if size > 1 and other > 1 and wide != fine:
            raise Impossible("the windows' positions lie on different grids")
        dilation.append(fine if other == 1 else wide)
    groups = math.gcd(first.groups, second.groups)
    kernel = _convolved(regrouped(first, groups), regrouped(second, groups), groups)
    stride = tuple(a * b for a, b in zip(first.stride, second.stride, strict=True))
    padding = tuple(p + s * q for p, s, q in zip(first.padding, first.stride, second.padding, strict=True))
    return AffineMap(kernel, bias, stride, padding, tuple(dilation), groups)


def plus(first: AffineMap, second: AffineMap) -> AffineMap:
    """`first(x) + second(x)`; the smaller window lies inside the larger one.

    Raises:
        Impossible: strides differ, or one output does not read around the same position in both.
    """
    if first.stride != second.stride:
        raise Impossible("the branches have different strides")
    dilation = []
    for axis, (size, other) in enumerate(zip(first.window, second.window, strict=True)):
        if size > 1 and other > 1 and first.dilation[axis] != second.dilation[axis]:
            raise Impossible("the branches have different dilations")
        dilation.append(first.dilation[axis] if size > 1 else second.dilation[axis])
    groups = math.gcd(first.groups, second.groups)
    padding = tuple(max(pair) for pair in zip(first.padding, second.padding, strict=True))
    pair = [replace(each, kernel=regrouped(each, groups), groups=groups) for each in (first, second)]
    left, right = (_widened(each, padding, tuple(dilation)) for each in pair)
    if left.shape != right.shape:
        raise Impossible("the branches' windows do not lie around the same position")
    biases = [each.bias for each in (first, second) if each.bias is not None]
    bias = sum(biases[1:], biases[0]) if biases else None
    return AffineMap(left + right, bias, first.stride, padding, tuple(dilation), groups)


def regrouped(found: AffineMap, groups: int) -> Tensor:
    """The kernel with fewer groups, which divide its own: blocks of zeros stand between them."""
    kernel, own = found.kernel, found.groups
    if own == groups:
        return kernel
    inside = own // groups  # groups that become one
    rows, columns = kernel.shape[0] // own, kernel.shape[1]
    blocks = kernel.reshape(groups, inside, rows, columns, -1)
    wide = blocks.new_zeros(groups, inside, rows, inside, columns, blocks.shape[-1])
    wide = torch.diagonal_scatter(wide, blocks.permute(0, 2, 3, 4, 1), dim1=1, dim2=3)
    return wide.reshape(kernel.shape[0], inside * columns, *kernel.shape[2:])


def _columns(found: AffineMap, factors: Tensor) -> Tensor:
    """`[in]` as a tensor that multiplies the kernel's columns."""
    rows, columns = found.kernel.shape[:2]
    each = factors.reshape(found.groups, 1, columns).expand(found.groups, rows // found.groups, columns)
    return each.reshape(rows, columns, *[1] * (found.kernel.ndim - 2))


def _then_bias(first: AffineMap, second: AffineMap) -> Tensor | None:
    if first.bias is None:
        return second.bias
    moved = (second.kernel * _columns(second, first.bias)).flatten(1).sum(1)
    return moved if second.bias is None else moved + second.bias


def _convolved(first: Tensor, second: Tensor, groups: int) -> Tensor:
    """The kernel of `second` after `first`: the full convolution of both, channels contracted group by group."""
    rows = second.shape[0]
    inner, columns = first.shape[0] // groups, first.shape[1]
    if first.ndim == 2:
        product = torch.einsum("gom,gmi->goi", second.reshape(groups, -1, inner), first.reshape(groups, inner, columns))
        return product.reshape(rows, columns)
    axes = tuple(range(2, first.ndim))
    padding = [size - 1 for size in second.shape[2:]]
    convolve = _CONV[first.ndim - 2]
    found = convolve(first.transpose(0, 1), second.flip(axes), padding=padding, groups=groups)
    return found.transpose(0, 1)


def _widened(found: AffineMap, padding: Sizes, dilation: Sizes) -> Tensor:
    """The kernel in a window that begins `padding` before the position, and ends as far behind it."""
    amounts: list[int] = []
    for axis, own in enumerate(found.padding):
        steps, rest = divmod(padding[axis] - own, dilation[axis])
        if rest:
            raise Impossible("the branches' windows do not lie around the same position")
        amounts = [steps, steps, *amounts]
    return functional.pad(found.kernel, amounts) if any(amounts) else found.kernel
