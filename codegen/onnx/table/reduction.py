"""Reductions, cumulative sums, sorting and searching."""

import math
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from sparc.codegen.onnx.emit import Emitter, Translation
from sparc.codegen.onnx.types import onnx_type


def _axes(e: Emitter, dims: Any, rank: int) -> ir.Value | None:
    """The axes input of a reduction; None for all."""
    if dims is None or dims == [] or rank == 0:
        return None
    return e.ints([dim % rank for dim in ([dims] if isinstance(dims, int) else dims)])


def reduce(operator: str) -> Translation:
    """A reduction over given axes, or over all; computed in the output's dtype."""

    def translate(
        e: Emitter, node: fx.Node, x: fx.Node, dim: Any = None, keepdim: bool = False, **named: Any
    ) -> ir.Value:
        rank = x.meta["val"].ndim
        return e.op(operator, e.cast(x, node.meta["val"].dtype), _axes(e, dim, rank), keepdims=int(keepdim))

    return translate


def total(operator: str) -> Translation:
    """A reduction over all axes."""

    def translate(e: Emitter, node: fx.Node, x: fx.Node, **named: Any) -> ir.Value:
        return e.op(operator, e.cast(x, node.meta["val"].dtype), None, keepdims=0)

    return translate


def quantifier(operator: str) -> Translation:
    """`any` (as a maximum) or `all` (as a minimum)."""

    def translate(e: Emitter, node: fx.Node, x: fx.Node, dim: Any = None, keepdim: bool = False) -> ir.Value:
        flags = e.op("Cast", e.cast(x, torch.bool), to=ir.DataType.INT32)
        reduced = e.op(operator, flags, _axes(e, dim, x.meta["val"].ndim), keepdims=int(keepdim))
        return e.op("Cast", reduced, to=ir.DataType.BOOL)

    return translate


def extreme(operator: str, arg_operator: str) -> Translation:
    """Maximum or minimum along an axis, with its index."""

    def translate(e: Emitter, node: fx.Node, x: fx.Node, dim: int, keepdim: bool = False) -> Sequence[ir.Value]:
        if x.meta["val"].ndim == 0:
            return [e.value(x), e.const(0, torch.int64)]
        values = e.op(operator, x, [dim], keepdims=int(keepdim))
        return [values, e.op(arg_operator, x, axis=dim, keepdims=int(keepdim))]

    return translate


def arg_extreme(operator: str) -> Translation:
    """The index of the maximum or minimum along an axis, or in the flattened tensor."""

    def translate(
        e: Emitter, node: fx.Node, x: fx.Node, dim: int | None = None, keepdim: bool = False
    ) -> ir.Value | None:
        value = e.cast(x, torch.int32) if x.meta["val"].dtype == torch.bool else x
        if dim is None:
            return None if keepdim else e.op(operator, e.op("Reshape", value, [-1]), axis=0, keepdims=0)
        return e.op(operator, value, axis=dim, keepdims=int(keepdim))

    return translate


def variance(root: bool) -> Translation:
    """Variance or standard deviation with a correction of the divisor (1 by default)."""

    def translate(
        e: Emitter,
        node: fx.Node,
        x: fx.Node,
        dim: Any = None,
        unbiased: Any = None,
        keepdim: bool = False,
        correction: Any = None,
    ) -> ir.Value | None:
        if isinstance(dim, bool):
            dim, unbiased = None, dim
        if correction is None:
            correction = 1 if unbiased in (None, True) else 0
        fake = x.meta["val"]
        dims = list(range(fake.ndim)) if dim is None or dim == [] else [dim] if isinstance(dim, int) else list(dim)
        sizes = [fake.shape[axis] for axis in dims]
        if not all(isinstance(size, int) for size in sizes):
            return None
        axes = e.ints([axis % fake.ndim for axis in dims])
        centred = e.op("Sub", x, e.op("ReduceMean", x, axes, keepdims=1))
        mean = e.op("ReduceMean", e.op("Mul", centred, centred), axes, keepdims=int(keepdim))
        count = math.prod(sizes)
        if correction:
            mean = e.op(
                "Mul", mean, e.const(count / max(count - correction, 0) if count > correction else math.nan, fake.dtype)
            )
        return e.op("Sqrt", mean) if root else mean

    return translate


def vector_norm(
    e: Emitter, node: fx.Node, x: fx.Node, order: Any = 2, dim: Any = None, keepdim: bool = False, **named: Any
) -> ir.Value | None:
    """The 1-, 2- or infinity-norm along axes."""
    axes = _axes(e, dim, x.meta["val"].ndim)
    value = e.cast(x, node.meta["val"].dtype)
    if order == math.inf:
        return e.op("ReduceMax", e.op("Abs", value), axes, keepdims=int(keepdim))
    if order not in (1, 2):
        return None
    return e.op("ReduceL1" if order == 1 else "ReduceL2", value, axes, keepdims=int(keepdim))


def norm(
    e: Emitter, node: fx.Node, x: fx.Node, order: Any = 2, dim: Any = None, keepdim: bool = False, **named: Any
) -> ir.Value | None:
    """`vector_norm` under its older name."""
    return vector_norm(e, node, x, 2 if order is None else order, dim, keepdim)


def cumsum(e: Emitter, node: fx.Node, x: fx.Node, dim: int, **named: Any) -> ir.Value:
    """Running sums along an axis."""
    if x.meta["val"].ndim == 0:
        return e.cast(x, node.meta["val"].dtype)
    return e.op("CumSum", e.cast(x, node.meta["val"].dtype), e.const(dim, torch.int64))


def topk(
    e: Emitter, node: fx.Node, x: fx.Node, k: Any, dim: int = -1, largest: bool = True, is_sorted: bool = True
) -> Sequence[ir.Value]:
    """The k greatest or least elements along an axis, and where they were."""
    values, indices = e.op("TopK", x, [k], axis=dim, largest=int(largest), sorted=1, outputs=2)
    return [values, indices]


def sort(e: Emitter, node: fx.Node, x: fx.Node, dim: int = -1, descending: bool = False) -> Sequence[ir.Value]:
    """All elements in order along an axis, and where they were."""
    fake = x.meta["val"]
    wide = e.cast(x, torch.int64 if fake.dtype in (torch.bool, torch.int16, torch.int8, torch.uint8) else fake.dtype)
    values, indices = e.op("TopK", wide, [fake.shape[dim]], axis=dim, largest=int(descending), sorted=1, outputs=2)
    if wide is not e.value(x):
        values = e.op("Cast", values, to=onnx_type(fake.dtype))
    return [values, indices]


def argsort(e: Emitter, node: fx.Node, x: fx.Node, dim: int = -1, descending: bool = False) -> ir.Value:
    """Where the elements in order along an axis were."""
    return sort(e, node, x, dim, descending)[1]


def stable_sort(
    e: Emitter, node: fx.Node, x: fx.Node, *, stable: Any = None, dim: int = -1, descending: bool = False
) -> Sequence[ir.Value]:
    """`sort`; equal elements keep their order, as ONNX's TopK prefers the lower index."""
    return sort(e, node, x, dim, descending)


TABLE: dict[str, Translation] = {
    "aten.mean.dim": reduce("ReduceMean"),
    "aten.mean.default": total("ReduceMean"),
    "aten.sum.dim_IntList": reduce("ReduceSum"),
    "aten.sum.default": total("ReduceSum"),
    "aten.prod.dim_int": reduce("ReduceProd"),
    "aten.prod.default": total("ReduceProd"),
    "aten.amax.default": reduce("ReduceMax"),
    "aten.amin.default": reduce("ReduceMin"),
    "aten.max.default": total("ReduceMax"),
    "aten.min.default": total("ReduceMin"),
    "aten.logsumexp.default": reduce("ReduceLogSumExp"),
    "aten.max.dim": extreme("ReduceMax", "ArgMax"),
    "aten.min.dim": extreme("ReduceMin", "ArgMin"),
    "aten.argmax.default": arg_extreme("ArgMax"),
    "aten.argmin.default": arg_extreme("ArgMin"),
    **{f"aten.any.{overload}": quantifier("ReduceMax") for overload in ("default", "dim", "dims")},
    **{f"aten.all.{overload}": quantifier("ReduceMin") for overload in ("default", "dim", "dims")},
    **{f"aten.var.{overload}": variance(False) for overload in ("default", "dim", "correction")},
    **{f"aten.std.{overload}": variance(True) for overload in ("default", "dim", "correction")},
    "aten.linalg_vector_norm.default": vector_norm,
    **{f"aten.norm.{overload}": norm for overload in ("ScalarOpt_dim", "Scalar")},
    "aten.cumsum.default": cumsum,
    "aten.topk.default": topk,
    "aten.sort.default": sort,
    "aten.sort.stable": stable_sort,
    "aten.argsort.default": argsort,
    "aten.argsort.stable": lambda e, node, x, *, stable=True, dim=-1, descending=False: argsort(
        e, node, x, dim, descending
    ),
}
