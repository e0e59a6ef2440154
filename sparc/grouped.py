"""`sparc::grouped_linear`: rows in runs, each times its own matrix, as mixtures of experts compute.

`grouped_linear(x, weight, ends)` means `result[row] = weight[run] @ x[row]`, where run `g` is the rows from
`ends[g - 1]` (0 for the first) up to `ends[g]`; rows behind the last run are zeros. Its weight has the layout of a
linear layer, once for each run, so that it is compressed like one.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.library import Library, impl, register_autograd, register_fake

_ALIGNED = 8  # elements of 16 bits, whose rows torch's kernel on CUDA reads by 16 bytes
_library = Library("sparc", "FRAGMENT")
_library.define("grouped_linear(Tensor x, Tensor weight, Tensor ends) -> Tensor")


@impl(_library, "grouped_linear", "CompositeExplicitAutograd")
def _grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`x` `[rows, in]`, `weight` `[runs, out, in]` of the same dtype, `ends` `[runs]` integers => `[rows, out]`."""
    if x.is_cuda and x.dtype == torch.bfloat16 and not (x.shape[1] % _ALIGNED or weight.shape[1] % _ALIGNED):
        return at_once(x, weight, ends)
    result = x.new_zeros(x.shape[0], weight.shape[1])
    for matrix, rows in zip(weight, runs(ends), strict=True):
        torch.mm(x[rows], matrix.t(), out=result[rows])
    return result


def at_once(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`grouped_linear` by torch's own kernel, which asks the GPU for no number, so that a CUDA graph can record it."""
    product = torch._grouped_mm(x, weight.transpose(-1, -2), offs=ends.to(torch.int32))
    inside = torch.arange(x.shape[0], device=x.device) < ends[-1]
    return torch.where(inside.unsqueeze(1), product, 0)


@register_fake("sparc::grouped_linear", lib=_library)  # type: ignore[untyped-decorator]
def _grouped_linear_type(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    torch._check(x.ndim == 2 and weight.ndim == 3 and ends.ndim == 1, lambda: "grouped_linear: ranks must be 2, 3, 1")
    torch._check(x.shape[1] == weight.shape[2], lambda: "grouped_linear: x and weight differ in their last axis")
    torch._check(ends.shape[0] == weight.shape[0], lambda: "grouped_linear: there must be one end for each matrix")
    torch._check(x.dtype == weight.dtype, lambda: "grouped_linear: x and weight differ in dtype")
    return x.new_empty(x.shape[0], weight.shape[1])


def runs(ends: Tensor) -> Iterator[slice]:
    """The rows of every run."""
    start = 0
    for end in ends.tolist():
        yield slice(start, end)
        start = end


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, ends = ctx.saved_tensors
    of_x = of_weight = None
    if ctx.needs_input_grad[0]:
        of_x = torch.ops.sparc.grouped_linear(gradient, weight.transpose(-1, -2), ends)
    if ctx.needs_input_grad[1]:
        of_weight = torch.stack([gradient[rows].t() @ x[rows] for rows in runs(ends)])
    return of_x, of_weight, None


register_autograd("sparc::grouped_linear", _backward, setup_context=_keep, lib=_library)


def grouped_mm(x: Tensor, matrices: Tensor, offs: Tensor | None = None, *rest: Any, **options: Any) -> Tensor:
    """`aten::_grouped_mm`, also in float64 where it is a product of runs of rows: torch has no kernel for that."""
    plain = not any(each is not None for each in (*rest, *options.values()))
    if offs is None or x.ndim != 2 or matrices.ndim != 3 or not plain:
        return torch._grouped_mm(x, matrices, offs, *rest, **options)
    return torch.ops.sparc.grouped_linear(x, matrices.transpose(-1, -2), offs)  # type: ignore[no-any-return]


def is_grouped_linear(value: object) -> bool:
    """Whether a value is a node that multiplies runs of rows with a matrix each."""
    return isinstance(value, fx.Node) and value.target is torch.ops.sparc.grouped_linear.default
