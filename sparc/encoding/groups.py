"""Groups of columns that share a scale: how grids by group, row or tensor see a matrix."""

from collections.abc import Sequence
from typing import Any, Literal

import sympy
import torch
from torch import Tensor

from sparc import codes
from sparc.diag import PassError

Group = int | Literal["channel", "tensor"]
ScaleDtype = Literal["float32", "float16", "bfloat16"]


def bad_option(what: str, hint: str) -> PassError:
    """SPARC209, for an encoding with an option that it does not have."""
    return PassError(codes.BAD_OPTION, what, hint=hint)


def check_group(encoding: Any, group: Any) -> None:
    """Raise PassError SPARC209 for what is no group: a number of columns, `"channel"` or `"tensor"`."""
    if group not in ("channel", "tensor") and (type(group) is not int or group < 2):
        raise bad_option(f"{type(encoding).__name__} cannot group by {group!r}", 'a number ≥ 2, "channel" or "tensor"')


def check_scale_dtype(encoding: Any, dtype: Any) -> None:
    """Raise PassError SPARC209 for a dtype that scales are not stored in."""
    if dtype not in ("float32", "float16", "bfloat16"):
        hint = '"float32", "float16" or "bfloat16"'
        raise bad_option(f"{type(encoding).__name__} has no scale_dtype={dtype!r}", hint)


def why_no_matrix(shape: Sequence[int]) -> str | None:
    """Why a shape is not that of a matrix with at least one element; None when it is."""
    if len(shape) < 2:
        return f"a tensor of rank {len(shape)} is no matrix"
    return "it is empty" if 0 in shape else None


def grouped(matrix: Tensor, group: Group, *, fill: Literal["last", "zero"] = "last") -> Tensor:
    """`[..., out, reduce]` as `[..., out, groups, group]`; a short last group is filled with its last value, or 0."""
    if group == "tensor":
        return matrix.reshape(*[1] * (matrix.ndim - 1), 1, -1)
    if group == "channel":
        return matrix.unsqueeze(-2)
    short = -matrix.shape[-1] % group
    if short and fill == "zero":
        matrix = torch.nn.functional.pad(matrix, (0, short))
    elif short:
        matrix = torch.cat([matrix, matrix[..., -1:].expand(*matrix.shape[:-1], short)], dim=-1)
    return matrix.reshape(*matrix.shape[:-1], -1, group)


def ungrouped(groups: Tensor, shape: Sequence[int], group: Group) -> Tensor:
    """The inverse of `grouped`; contiguous."""
    if isinstance(group, int) and shape[-1] % group:
        return groups.flatten(-2)[..., : shape[-1]].contiguous()
    return groups.reshape(tuple(shape))


def column(per_group: Tensor) -> Tensor:
    """A grid tensor `[..., out, groups]` in float32, to broadcast over the elements of each group."""
    return per_group.float().unsqueeze(-1)


def group_at(per_group: Tensor, group: Group, column: int, axis: int = -1) -> Tensor:
    """What a grid tensor `[..., out, groups]` says of one column, as a tensor of one group.

    Args:
        per_group: a grid's tensor.
        group: how many columns share an entry.
        column: which one.
        axis: the axis of groups.
    """
    return per_group.narrow(axis, column // group, 1) if isinstance(group, int) else per_group


def alone(group: Group) -> Group:
    """How a single column is grouped that was cut out of a matrix with such groups."""
    return "channel" if isinstance(group, int) else group


def group_count(shape: Sequence["int | sympy.Expr"], group: Group) -> sympy.Expr:
    """How many groups a matrix of this shape, which may be symbolic, has."""
    if group == "tensor":
        return sympy.Integer(1)
    each = 1 if group == "channel" else sympy.ceiling(sympy.sympify(shape[-1]) / group)
    return sympy.prod(shape[:-1]) * each


def magnitudes(weight: Tensor, group: Group, importance: Tensor | None) -> Tensor:
    """The greatest magnitude in each group of what has importance, `[..., out, groups]`, float32; NaN counts as 0.

    Args:
        weight: `[..., out, reduce]`, floating.
        group: the columns of a group.
        importance: as for `Encoding.fit`.
    """
    magnitude = weight.float().abs().nan_to_num()
    if importance is not None:
        magnitude = magnitude.masked_fill((importance == 0).expand(weight.shape), 0)
    return grouped(magnitude, group).amax(-1)


_NOTHING = 2.0**-40


def stored_scale(scale: Tensor, dtype: ScaleDtype, reach: float) -> Tensor:
    """Scales as stored.

    Those that are not positive, of groups of zeros, become next to nothing: ONNX Runtime keeps an 8-bit code of 0 as
    128 and takes `128 * sum(x) * scale` away again, in float32, so that at a scale of 1 what is left would not be 0.
    Those below the dtype's normal numbers are rounded up, so that a tiny range is still covered; those so great that a
    value would overflow are cut.

    Args:
        scale: floating.
        dtype: what they are stored in.
        reach: the magnitude of the greatest number that a code stands for, before scaling.
    """
    stored: torch.dtype = getattr(torch, dtype)
    limits = torch.finfo(stored)
    step = limits.tiny * limits.eps
    scale = torch.where(scale < limits.tiny, torch.ceil(scale / step) * step, scale)
    greatest = min(limits.max, torch.finfo(torch.bfloat16).max / reach)
    return torch.where(scale > 0, scale, max(limits.tiny, _NOTHING)).clamp(max=greatest).to(stored)
