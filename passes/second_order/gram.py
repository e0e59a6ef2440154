"""The Gram matrix of what a site's weight is multiplied with."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from sparc.analysis.sites import Site, Use
from sparc.observers import Geometry
from sparc.pass_base import PassContext
from sparc.pattern import normalized_arguments
from sparc.program import Program


def gram_watches(program: Program, context: PassContext) -> Iterator[tuple[fx.Node, str]]:
    """The statistics that `site_gram` wants of the selected sites, as (node, kind)."""
    for site in context.sites(program):
        for use in site.uses:
            if not isinstance(use.input, fx.Node):
                continue
            if use.operator == "grouped":
                yield use.node, "run_gram"
            elif kind := _kind(use):
                yield use.input, kind


def site_gram(program: Program, site: Site, context: PassContext) -> Tensor | None:
    """The mean of `x xᵀ` over the inputs x of a site's products, and over its uses.

    Returns:
        `[groups, reduce, reduce]` float64: the matrix `[batch..., out, reduce]` reshaped to `[groups, rows, reduce]`
        meets one each. A convolution has its own groups, stacked experts one for each; all others have one. None when
        no use of the site has data: an embedding's rows are looked up, a transposed convolution adds up overlaps, and
        squares of inputs may be too great for float32.
    """
    grams = [_of_use(use, context) for use in site.uses]
    known = [gram for gram in grams if gram is not None and bool(gram.isfinite().all())]
    return torch.stack(known).mean(0) if known else None


def reconstruction_error(change: Tensor, gram: Tensor) -> Tensor:
    """`diag(D G Dᵀ)`: the mean squared error of each row's products.

    Args:
        change: `W' - W`, `[groups, rows, reduce]`.
        gram: `[groups, reduce, reduce]`.

    Returns:
        `[groups, rows]` float64.
    """
    wide = change.double()
    return ((wide @ gram.double()) * wide).sum(-1)


def better_rows(first: Tensor, second: Tensor, wanted: Tensor, gram: Tensor) -> Tensor:
    """Which rows of `first` give products at least as near to those of `wanted` as the rows of `second` do.

    Args:
        first: `[groups, rows, reduce]`.
        second: the same shape.
        wanted: the same shape.
        gram: `[groups, reduce, reduce]`.

    Returns:
        Bool `[groups, rows, 1]`.
    """
    worse = reconstruction_error(first - wanted, gram) > reconstruction_error(second - wanted, gram)
    return ~worse.unsqueeze(-1)


def _kind(use: Use) -> str:
    if use.operator == "conv":
        geometry = convolution_geometry(use.node)
        return f"patches:{geometry}" if geometry is not None else ""
    return "" if use.operator == "conv_transposed" else "gram"


def convolution_geometry(node: fx.Node) -> Geometry | None:
    """Where a convolution over one or two axes reads; None for one over three."""
    given = normalized_arguments(node)
    weight = given["weight"].meta["val"]  # type: ignore[union-attr]
    axes = weight.ndim - 2
    if axes > 2:
        return None

    def each(name: str, default: int) -> tuple[int, ...]:
        value: Any = given.get(name)
        listed = [default] if value is None else [value] if isinstance(value, int) else list(value)
        return tuple(listed * axes if len(listed) == 1 else listed)

    kernel, dilation = tuple(map(int, weight.shape[2:])), each("dilation", 1)
    padding: Any = given.get("padding")
    if padding == "same":
        total = [reach * (size - 1) for reach, size in zip(dilation, kernel, strict=True)]
        sides = tuple((amount // 2, amount - amount // 2) for amount in total)
    else:
        amounts = (0,) * axes if padding == "valid" else each("padding", 0)
        sides = tuple((amount, amount) for amount in amounts)
    groups: Any = given.get("groups") or 1
    return Geometry(kernel, each("stride", 1), sides, dilation, int(groups))


def _of_use(use: Use, context: PassContext) -> Tensor | None:
    kind = "run_gram" if use.operator == "grouped" else _kind(use)
    if context.statistics is None or not isinstance(use.input, fx.Node) or not kind:
        return None
    gram: Tensor | None = context.statistics(use.node if use.operator == "grouped" else use.input, kind)
    return gram.unsqueeze(0) if gram is not None and gram.ndim == 2 else gram
