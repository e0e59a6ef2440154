"""Rounding by a sweep over columns (GPTQ, Frantar et al. 2022), which chooses a mask of N:M on the way.

The grid is fitted before the sweep, to the original weights ("static groups" in GPTQ's code): the columns may then be
treated in any order and the stored layout stays the usual one. A row whose products end up with more error than
rounding to nearest gives keeps the nearest values.
"""

from dataclasses import replace

import torch
from torch import Tensor

from sparc.analysis.sites import Site
from sparc.encoding.base import ElementEncoding, Encoding
from sparc.encoding.compose import compose
from sparc.encoding.grid import Grid
from sparc.encoding.mask import MaskEncoding
from sparc.encoding.nm import NM
from sparc.passes.round.fit import Fit, fit_grid
from sparc.passes.round.importance import damped
from sparc.passes.second_order.descend import descended
from sparc.passes.second_order.factor import Factor
from sparc.passes.second_order.gram import better_rows
from sparc.passes.second_order.rescale import rescaled
from sparc.passes.second_order.selection import KeepNM
from sparc.passes.second_order.sweep import Column, sweep
from sparc.program import Program


def why_not_by_column(encoding: Encoding) -> str:
    """Why an encoding cannot be rounded to column by column; empty when it can."""
    inner = encoding.of if isinstance(encoding, MaskEncoding) else encoding
    if isinstance(inner, ElementEncoding) and type(inner).at_column is not ElementEncoding.at_column:
        return ""
    return f"{inner} does not round single columns"


def round_by_sweep(
    program: Program,
    site: Site,
    encoding: Encoding,
    gram: Tensor,
    factor: Factor,
    importance: Tensor | None,
    fit: Fit,
) -> tuple[Tensor, Grid]:
    """A site's weight on a grid, and the grid: an N:M mask is chosen by the sweep, any mask that exists is kept.

    Args:
        program: holds the weight and the grid that it lies on, if any.
        site: the site.
        encoding: what to round to.
        gram: of the site's inputs, `[groups, reduce, reduce]`.
        factor: of `gram`; with an order that keeps m columns together where a mask of N:M is to be chosen.
        importance: `[groups, reduce]`, what a squared error costs when the grid is fitted; None for uniform.
        fit: how the grid is found.
    """
    old = program.weights[site.weight]
    matrix = site.view.to_matrix(old)
    runs = matrix.reshape(gram.shape[0], -1, matrix.shape[-1])
    existing = program.grid(site.weight)
    pattern = chosen_pattern(existing.spec if existing is not None else None, encoding)
    if pattern is not None and importance is None:
        importance = gram.diagonal(dim1=-2, dim2=-1)  # the grid is fitted to what Wanda's mask would keep
    costs = damped(importance.float()) if importance is not None else None
    if costs is not None:
        costs = costs.unsqueeze(1).expand(runs.shape).reshape(matrix.shape)
    grid = fit_grid(existing, matrix, encoding, fit, costs)
    nearest = grid.spec.round(matrix, grid).reshape(runs.shape)
    column = column_of(grid, matrix.shape, masked=pattern is None)
    swept = sweep(runs, factor, column, KeepNM(pattern) if pattern is not None else None)
    better = better_rows(swept.weight, nearest, runs, gram)
    result = torch.where(better, swept.weight, nearest).reshape(matrix.shape)
    if swept.kept is not None:
        kept = torch.where(better, swept.kept, grid.tensors["mask"].reshape(runs.shape))
        grid = replace(grid, tensors={**grid.tensors, "mask": kept.reshape(matrix.shape)})
    if fit == "search":
        result, grid = refined(grid, matrix.shape, result.reshape(runs.shape), runs, gram, factor)
    rounded = grid.spec.round(result.reshape(matrix.shape), grid)
    return site.view.from_matrix(rounded, old.shape), replace(grid, view=str(site.view))


def refined(
    grid: Grid, shape: torch.Size, rounded: Tensor, wanted: Tensor, gram: Tensor, factor: Factor
) -> tuple[Tensor, Grid]:
    """Fit scales to the codes that were chosen, choose codes again (by a sweep, and descent), and fit scales to those.

    Only rows whose products come nearer to the wanted ones are changed. Encodings whose rows or groups of rows have no
    scales of their own keep those they have.

    Args:
        grid: of `rounded`; its mask stays.
        shape: of the matrix that the grid is of.
        rounded: `[groups, rows, reduce]`, on the grid.
        wanted: the weight before, the same shape.
        gram: of the inputs, `[groups, reduce, reduce]`.
        factor: of `gram`.
    """
    first, grid = _with_best_scales(grid, rounded, wanted, gram, factor)
    column = column_of(grid, shape, masked=True)
    swept = sweep(wanted, factor, column).weight
    best = torch.where(better_rows(swept, first, wanted, gram), swept, first)
    descent = descended(best, wanted, gram, factor, column)
    best = torch.where(better_rows(descent, best, wanted, gram), descent, best)
    return _with_best_scales(grid, best, wanted, gram, factor)


def _with_best_scales(grid: Grid, rounded: Tensor, wanted: Tensor, gram: Tensor, factor: Factor) -> tuple[Tensor, Grid]:
    """The same codes in the rows that no other scales are better for."""
    found = rescaled(grid, rounded, wanted, gram, factor.ridge)
    if found is None:
        return rounded, grid
    values, scaled = found
    better = better_rows(values, rounded, wanted, gram)
    old, new = grid.tensors["scale"], scaled.tensors["scale"]
    scale = torch.where(better.reshape(*old.shape[:-1], 1), new, old)
    return torch.where(better, values, rounded), replace(grid, tensors={**grid.tensors, "scale": scale})


def chosen_pattern(existing: Encoding | None, encoding: Encoding) -> NM | None:
    """The pattern whose mask the sweep has yet to choose when a weight on `existing` is rounded to `encoding`."""
    composed = compose(existing, encoding)
    kept = existing is not None and isinstance(composed, NM) and composed.same_pattern(existing)
    return composed if isinstance(composed, NM) and not kept else None


def column_of(grid: Grid, shape: torch.Size, masked: bool) -> Column:
    """Rounds a column `[groups, rows]` of the matrix to the grid; `masked`: what its mask drops is 0."""
    spec = grid.spec
    inner, kept = grid, None
    if isinstance(spec, MaskEncoding):
        inner = spec.inner(grid)
        kept = spec.spread(grid.tensors["mask"], shape) if masked else None
    own = inner.spec
    assert isinstance(own, ElementEncoding)

    def rounded(values: Tensor, column: int) -> Tensor:
        at = own.at_column(inner, column)
        assert at is not None
        found = at.spec.round(values.reshape(*shape[:-1], 1), at).reshape(values.shape)
        return found if kept is None else found * kept[..., column].reshape(values.shape)

    return rounded
