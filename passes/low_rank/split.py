"""A product with a matrix of low rank, as two products in a graph."""

from typing import Any

import torch
from torch import Tensor, fx

from sparc.analysis.sites import Site, Use
from sparc.passes.second_order.gram import convolution_geometry
from sparc.program import Program

aten = torch.ops.aten

_CONVOLUTIONS = {3: aten.conv1d.default, 4: aten.conv2d.default, 5: aten.conv3d.default}
OPERATORS = ("linear", "matmul", "grouped", "conv")


def split_product(program: Program, site: Site, up: Tensor, down: Tensor, *, beside: bool) -> None:
    """`product(x, w)` => `product(product(x, A), B)`, or `product(x, w) + product(product(x, A), B)`.

    A convolution's A has its kernel, and B is one of size 1. The node of the product stays the one that gives the
    result.

    Args:
        program: is edited.
        site: a weight with one use.
        up: B, `[groups, rows, rank]`, where the weight's matrix is `[groups * rows, reduce]` or a batch of groups.
        down: A, `[groups, rank, reduce]`.
        beside: keep the product with the weight, and add the other to it.
    """
    (use,) = site.uses
    shape, rank = program.weights[site.weight].shape, down.shape[1]
    if use.operator == "conv":
        a = down.reshape(-1, *shape[1:])
        b = up.reshape(shape[0], rank, *[1] * (len(shape) - 2))
    else:
        batch = site.view.matrix_shape(shape)[:-2]
        a = site.view.from_matrix(down.reshape(*batch, rank, -1), ())
        b = site.view.from_matrix(up.reshape(*batch, -1, rank), ())
    names = add_factors(program, site, a, b)
    node, entry = use.node, program.entry_of(use.node)
    first = _with(node, use, node.args[_place(use)], names[0], bias=None)
    inner = entry.call(_without_bias(node), *first, before=node, like=node, **node.kwargs)
    outer, kwargs = _outer(node, use, inner, names[1], len(shape), down.shape[0], None if beside else product_bias(use))
    put(program, node, outer, kwargs, beside=beside)


def split_spatially(program: Program, site: Site, up: Tensor, down: Tensor, *, beside: bool) -> None:
    """`conv(x, w)` => `conv(conv(x, A), B)`, where A reaches along the first axis of an image only and B along the
    second (Jaderberg et al. 2014, scheme 2).

    Args:
        program: is edited.
        site: a weight with one use, a convolution of images in one group.
        up: B, `[1, out * width, rank]`.
        down: A, `[1, rank, in * height]`.
        beside: as for `split_product`.
    """
    (use,) = site.uses
    node, entry = use.node, program.entry_of(use.node)
    out, channels, height, width = program.weights[site.weight].shape
    rank = down.shape[1]
    b = up.reshape(out, width, rank).transpose(1, 2).reshape(out, rank, 1, width)
    names = add_factors(program, site, down.reshape(rank, channels, height, 1), b)
    found = convolution_geometry(node)
    assert found is not None
    (top, left), (above, right), (rows, columns) = found.stride, (side for side, _ in found.padding), found.dilation
    inner = entry.call(
        aten.conv2d.default, node.args[0], names[0], None, [top, 1], [above, 0], [rows, 1], 1, before=node, like=node
    )
    bias = None if beside else product_bias(use)
    second = (inner, names[1], bias, [1, left], [0, right], [1, columns], 1)
    put(program, node, (aten.conv2d.default, second), {}, beside=beside)


def spatial_matrix(weight: Tensor) -> Tensor:
    """`[1, out * width, in * height]`: a convolution's weight `[out, in, height, width]` as `split_spatially` takes its
    factors.
    """
    return weight.permute(0, 3, 1, 2).flatten(0, 1).flatten(1).unsqueeze(0)


def from_spatial(matrix: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `spatial_matrix`."""
    out, channels, height, width = shape
    return matrix.reshape(out, width, channels, height).permute(0, 2, 3, 1).contiguous()


def why_not_spatially(use: Use) -> str:
    """Why a product cannot be split along the axes of an image; empty when it can."""
    found = convolution_geometry(use.node) if use.operator == "conv" else None
    if found is None or len(found.kernel) != 2 or found.groups != 1:
        return "it is no convolution of images in one group"
    if any(before != after for before, after in found.padding):
        return "its padding is not even"
    return "" if min(found.kernel) > 1 else "its kernel has one axis"


def add_factors(program: Program, site: Site, a: Tensor, b: Tensor) -> tuple[fx.Node, fx.Node]:
    """Store the factors beside the weight they come from, in its dtype."""
    like: Any = site.uses[0].node.args[site.uses[0].argument]
    dtype = program.weights[site.weight].dtype
    first, second = (
        program.add_weight(f"{site.weight}_{name}", tensor.to(dtype).contiguous(), like, own=True)
        for name, tensor in (("a", a), ("b", b))
    )
    return first, second


def put(
    program: Program, node: fx.Node, outer: tuple[Any, tuple[Any, ...]], kwargs: dict[str, Any], *, beside: bool
) -> None:
    """Let a node compute the outer product, or the sum of it and of what it computed."""
    entry = program.entry_of(node)
    if beside:
        kept = entry.call(node.target, *node.args, before=node, like=node, **node.kwargs)
        other = entry.call(outer[0], *outer[1], before=node, like=node, **kwargs)
        node.target, node.args, node.kwargs = aten.add.Tensor, (kept, other), {}
    else:
        node.target, node.args, node.kwargs = *outer, kwargs
    entry.infer(node)


def _place(use: Use) -> int:
    return 1 if use.node.target is aten.addmm.default else 0


def product_bias(use: Use) -> Any:
    """The bias argument of a product; None when it has none."""
    node = use.node
    if node.target is aten.addmm.default:
        return node.args[0]
    return node.args[2] if use.operator in ("linear", "conv") and len(node.args) > 2 else None


def _without_bias(node: fx.Node) -> Any:
    return aten.mm.default if node.target is aten.addmm.default else node.target


def _with(node: fx.Node, use: Use, x: Any, weight: fx.Node, bias: Any) -> tuple[Any, ...]:
    """The arguments of a product of the same kind."""
    if node.target is aten.addmm.default:
        return (x, weight) if bias is None else (bias, x, weight)
    rest = node.args[2:]
    if use.operator in ("linear", "conv"):
        rest = (bias, *node.args[3:]) if bias is not None or len(node.args) > 3 else ()
    return (x, weight, *rest)


def _outer(
    node: fx.Node, use: Use, inner: fx.Node, weight: fx.Node, rank: int, groups: int, bias: Any
) -> tuple[tuple[Any, tuple[Any, ...]], dict[str, Any]]:
    if use.operator == "conv":
        axes = rank - 2
        sizes = ([1] * axes, [0] * axes, [1] * axes, groups)
        return (_CONVOLUTIONS[rank], (inner, weight, bias, *sizes)), {}
    target = node.target if bias is not None else _without_bias(node)
    return (target, _with(node, use, inner, weight, bias)), dict(node.kwargs)
