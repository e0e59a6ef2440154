"""Tensors made from nothing: ranges, constants, triangles; and casts."""

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx

from sparc.codegen.onnx.emit import Emitter, Translation
from sparc.codegen.onnx.table.shape import broadcast
from sparc.codegen.onnx.types import onnx_type

_SMALL = 4096


def filled(e: Emitter, fake: Tensor, number: Any) -> ir.Value:
    """A tensor of one number: a constant if small and static, else expanded from a scalar."""
    value = e.cast(number, fake.dtype)
    if fake.ndim == 0:
        return value
    array = e.constant_array(value)
    if array is not None and all(isinstance(size, int) for size in fake.shape) and fake.numel() <= _SMALL:
        return e.const(np.full(tuple(fake.shape), array), onnx_type(fake.dtype))
    return broadcast(e, value, fake.new_empty(()), fake)


def fill(number: Any) -> Translation:
    """A tensor of the output's shape filled with one number."""

    def translate(e: Emitter, node: fx.Node, *_: Any, **named: Any) -> ir.Value:
        return filled(e, node.meta["val"], number)

    return translate


def full(e: Emitter, node: fx.Node, _: Any, number: Any, **named: Any) -> ir.Value:
    """A tensor of the output's shape filled with a given number."""
    return filled(e, node.meta["val"], number)


def new_full(e: Emitter, node: fx.Node, x: fx.Node, size: Any, number: Any, **named: Any) -> ir.Value:
    """A tensor of the output's shape filled with a given number."""
    return filled(e, node.meta["val"], number)


def scalar(e: Emitter, node: fx.Node, number: Any, **named: Any) -> ir.Value:
    """A tensor without axes."""
    return e.cast(number, node.meta["val"].dtype)


def arange(e: Emitter, node: fx.Node, *bounds: Any, **named: Any) -> ir.Value:
    """`start, start + step, ... < end`."""
    dtype = node.meta["val"].dtype
    start, end, step = (0, bounds[0], 1) if len(bounds) == 1 else (*bounds, 1) if len(bounds) == 2 else bounds
    wide = torch.int64 if not dtype.is_floating_point else torch.float32 if dtype != torch.float64 else torch.float64
    limits = [_limit(e, bound, wide) for bound in (start, end, step)]
    if all(isinstance(bound, (int, float)) for bound in (start, end, step)) and node.meta["val"].numel() <= _SMALL:
        return e.const(torch.arange(start, end, step, dtype=wide).numpy(), onnx_type(dtype))
    if e.target.flavour == "cuda" and wide == torch.int64 and (start, step) == (0, 1) and isinstance(end, fx.Node):
        made = counted(e, e.size(end))
        return made if dtype == torch.int64 else e.op("Cast", made, to=onnx_type(dtype))
    made = e.op("Range", *limits)
    return made if wide == dtype else e.op("Cast", made, to=onnx_type(dtype))


def counted(e: Emitter, count: Any) -> ir.Value:
    """`0, 1, ... count - 1`, int64; on CUDA from running sums of ones, so that no size is computed on the CPU."""
    if e.target.flavour != "cuda":
        return e.op("Range", e.const(0, torch.int64), e.sizes.scalar(count), e.const(1, torch.int64))
    ones = e.op("ConstantOfShape", e.sizes.length(count), value=ir.tensor(np.ones(1, dtype=np.int64)))
    return e.op("Sub", e.op("CumSum", ones, e.const(0, torch.int64)), e.const(1, torch.int64))


def _limit(e: Emitter, bound: Any, dtype: torch.dtype) -> ir.Value:
    if isinstance(bound, fx.Node) and not isinstance(bound.meta["val"], Tensor):
        value = e.sizes.scalar(e.size(bound))
        return value if dtype == torch.int64 else e.op("Cast", value, to=onnx_type(dtype))
    return e.cast(bound, dtype)


def triangle(upper: bool) -> Translation:
    """Keep one triangle of the last two axes, zero the other."""

    def translate(e: Emitter, node: fx.Node, x: fx.Node, diagonal: int = 0) -> ir.Value:
        fake = node.meta["val"]
        if fake.dtype in (torch.bool, torch.float16, torch.bfloat16, torch.int32):
            wide = torch.int64 if not fake.dtype.is_floating_point else torch.float32
            return e.op(
                "Cast",
                e.op("Trilu", e.cast(x, wide), e.const(diagonal, torch.int64), upper=int(upper)),
                to=onnx_type(fake.dtype),
            )
        return e.op("Trilu", x, e.const(diagonal, torch.int64), upper=int(upper))

    return translate


def cast(e: Emitter, node: fx.Node, x: fx.Node, *_: Any, **named: Any) -> ir.Value:
    """A cast to the output's dtype; nothing when the dtype stays."""
    return e.cast(x, node.meta["val"].dtype)


def one_hot(e: Emitter, node: fx.Node, x: fx.Node, classes: int = -1) -> ir.Value | None:
    """Ones where the class is, zeros elsewhere, on a new last axis."""
    if classes < 0:
        return None
    return e.op("OneHot", x, e.const(classes, torch.int64), e.const([0, 1], torch.int64), axis=-1)


def linspace(e: Emitter, node: fx.Node, start: Any, end: Any, steps: int, **named: Any) -> ir.Value | None:
    """Evenly spaced numbers, when all is known."""
    fake = node.meta["val"]
    if not all(isinstance(value, (int, float)) for value in (start, end, steps)):
        return None
    return e.const(torch.linspace(start, end, steps, dtype=torch.float64).numpy(), onnx_type(fake.dtype))


def item(e: Emitter, node: fx.Node, x: fx.Node) -> ir.Value:
    """A tensor of one element as a scalar."""
    value = e.op("Reshape", x, e.const(np.zeros(0), torch.int64)) if x.meta["val"].ndim else e.value(x)
    fake = node.meta["val"]
    return (
        e.op("Cast", value, to=ir.DataType.INT64)
        if isinstance(fake, torch.SymInt) and x.meta["val"].dtype != torch.int64
        else value
    )


def size_of(e: Emitter, node: fx.Node, x: fx.Node, dim: int) -> ir.Value:
    """A size that no input shows: read from the tensor."""
    return e.op("Squeeze", e.op("Shape", x, start=dim, end=dim + 1 if dim != -1 else None))


_CASTS = [
    "to.dtype",
    "to.dtype_layout",
    "to.device",
    "to.other",
    "type_as.default",
    "_to_copy.default",
    "float.default",
    "half.default",
    "double.default",
    "long.default",
    "int.default",
    "bool.default",
]

TABLE: dict[str, Translation] = {
    **{f"aten.{name}": cast for name in _CASTS},
    **{
        f"aten.{name}.default": fill(0)
        for name in ("zeros", "zeros_like", "new_zeros", "empty", "empty_like", "new_empty")
    },
    "aten.empty.memory_format": fill(0),
    **{f"aten.{name}.default": fill(1) for name in ("ones", "ones_like", "new_ones")},
    **{f"aten.{name}.default": full for name in ("full", "full_like")},
    "aten.new_full.default": new_full,
    **{f"aten.fill.{overload}": full for overload in ("Scalar", "Tensor")},
    **{f"aten.arange.{overload}": arange for overload in ("default", "start", "start_step")},
    "aten.scalar_tensor.default": scalar,
    "aten.tril.default": triangle(False),
    "aten.triu.default": triangle(True),
    "aten.one_hot.default": one_hot,
    "aten.linspace.default": linspace,
    "aten.item.default": item,
    "aten._local_scalar_dense.default": item,
    "aten.sym_size.int": size_of,
}
