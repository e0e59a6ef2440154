"""Scales of a grid, fitted anew to the codes that a sweep chose."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from sparc.encoding.grid import Grid
from sparc.encoding.groups import column, grouped
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.mask import MaskEncoding

_ROWS = 1024  # at a time: each needs a matrix of groups by groups


def rescaled(grid: Grid, rounded: Tensor, wanted: Tensor, gram: Tensor, ridge: Tensor) -> tuple[Tensor, Grid] | None:
    """The scales that make `tr((R - W) H (R - W)ᵀ)` least while all codes stay, and what R becomes with them.

    Row by row, with u its codes less their zero points, and u_g those of group g: `A s = b`, where
    `A[g, h] = u_g H[g, h] u_hᵀ`, `b[g] = u_g (H wᵀ)[g]` and `H = gram + ridge I`. The search before a sweep weighs
    columns one by one; this knows what other columns make up for. A row that would need a scale that is not positive
    keeps all of its scales.

    Args:
        grid: of R; integers around a zero point, in rows or groups, maybe with a mask.
        rounded: R, `[groups, rows, reduce]`, on the grid.
        wanted: W, the same shape.
        gram: of the inputs, `[groups, reduce, reduce]`.
        ridge: `[groups]`.

    Returns:
        None where the encoding has no such scales.
    """
    inner = grid.spec.inner(grid) if isinstance(grid.spec, MaskEncoding) else grid
    spec = inner.spec
    if not isinstance(spec, IntGrid) or spec.group == "tensor" or "minimum" in inner.tensors:
        return None
    old = inner.tensors["scale"]
    scales = old.float().reshape(*rounded.shape[:-1], -1)
    units = (rounded.float() / _spread(spec, scales, rounded.shape)).round()
    damped = gram.float() + ridge.float()[:, None, None] * torch.eye(gram.shape[-1])
    found = torch.cat(list(_solved(spec, units, wanted.float(), scales, damped)))
    stored = spec.stored_scale(found.reshape(old.shape))
    values = units * _spread(spec, stored.float().reshape(scales.shape), rounded.shape)
    return values.to(rounded.dtype), replace(grid, tensors={**grid.tensors, "scale": stored})


def _solved(spec: IntGrid, units: Tensor, wanted: Tensor, scales: Tensor, damped: Tensor) -> Iterator[Tensor]:
    for each, weight, scale, matrix in zip(units, wanted, scales, damped, strict=True):
        for start in range(0, each.shape[0], _ROWS):
            rows = slice(start, start + _ROWS)
            yield _solve_rows(spec, each[rows], weight[rows], scale[rows], matrix)


def _spread(spec: IntGrid, scale: Tensor, shape: torch.Size) -> Tensor:
    """Scales `[..., rows, groups]` as `[..., rows, reduce]`."""
    width = shape[-1] if spec.group == "channel" else int(spec.group)
    return column(scale).expand(*scale.shape, width).flatten(-2)[..., : shape[-1]]


def _solve_rows(spec: IntGrid, units: Tensor, wanted: Tensor, scale: Tensor, damped: Tensor) -> Tensor:
    """New scales `[rows, groups]`."""
    width = units.shape[-1] if spec.group == "channel" else int(spec.group)
    target = _sums(spec, units * (wanted @ damped))
    columns = [
        _sums(spec, (units[:, start : start + width] @ damped[start : start + width]) * units)
        for start in range(0, units.shape[-1], width)
    ]
    system = torch.stack(columns, dim=-1)
    empty = system.diagonal(dim1=-2, dim2=-1) <= 0  # all codes are zero: any scale will do
    system = system + torch.diag_embed(empty.double())
    solved, failed = torch.linalg.solve_ex(system, torch.where(empty, scale.double(), target))
    good = (failed == 0) & ((solved > 0) & solved.isfinite()).all(-1)
    return torch.where(good[:, None], solved.float(), scale)


def _sums(spec: IntGrid, numbers: Tensor) -> Tensor:
    """Sums over groups, `[rows, groups]` float64."""
    return grouped(numbers, spec.group, fill="zero").sum(-1, dtype=torch.float64)
