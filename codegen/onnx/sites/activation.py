"""Quantized activations: codes with their scale and zero point, and the two operators on their own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx

from sparc import codes as diagnostic_codes
from sparc.codegen.encoded import Activation, match_activation
from sparc.codegen.onnx.emit import Emitter
from sparc.codegen.onnx.types import onnx_type
from sparc.diag import LoweringError
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.operators import find_spec

MIDDLE = 128
_U8 = ir.DataType.UINT8


@dataclass(frozen=True)
class Codes:
    """An activation as integers: `(values - zero) * scale`.

    Args:
        values: uint8.
        scale: float32, a scalar, or `[..., rows, 1]`.
        zero: uint8, a scalar.
        per_row: whether each row has a scale.
    """

    values: ir.Value
    scale: ir.Value
    zero: ir.Value
    per_row: bool = False


def unsigned_codes(e: Emitter, x: Activation, scale: ir.Value | None = None) -> Codes:
    """The uint8 codes of an activation, signed ones offset by 128; `scale` is a static scale, if it is known."""
    assert x.spec is not None
    middle, source = e.const(MIDDLE, _U8), e.cast(x.source, torch.float32)
    if x.kind == "static":
        scale = scalar(e, x.params[0]) if scale is None else scale
        zero = middle if x.spec.symmetric else scalar(e, x.params[1])
        return Codes(e.op("QuantizeLinear", source, scale, zero), scale, zero)
    if x.kind == "tensor" and not x.spec.symmetric:
        made = e.op("DynamicQuantizeLinear", source, outputs=3)
        return Codes(*made)
    scale = symmetric_scale(e, source, None if x.kind == "tensor" else -1)
    if x.kind == "tensor":
        return Codes(e.op("QuantizeLinear", source, scale, middle), scale, middle)
    shares = e.op("Div", source, scale)
    return Codes(e.op("QuantizeLinear", shares, e.const(1.0, torch.float32), middle), scale, middle, per_row=True)


def symmetric_scale(e: Emitter, x: Any, axis: int | None) -> ir.Value:
    """`max |x| / 127` of everything, or along an axis that is kept; 1 where that is 0."""
    axes = None if axis is None else e.ints([axis])
    largest = e.op("ReduceMax", e.op("Abs", x), axes, keepdims=int(axis is not None))
    return positive(e, e.op("Div", largest, e.const(127, torch.float32)))


def positive(e: Emitter, scale: ir.Value) -> ir.Value:
    """The scale, or 1 where it is 0."""
    return e.op("Where", e.op("Greater", scale, e.const(0, torch.float32)), scale, e.const(1, torch.float32))


def scalar(e: Emitter, node: fx.Node) -> ir.Value:
    """A parameter without axes."""
    value = e.value(node)
    return value if node.meta["val"].ndim == 0 else e.op("Reshape", value, e.const(np.zeros(0), torch.int64))


# the operators on their own -------------------------------------------------------------------------------------------
def decode(
    e: Emitter, node: fx.Node, parts: Sequence[fx.Node], spec: str, view: str, shape: Any, dtype: torch.dtype
) -> ir.Value:
    """A decoded activation that no product takes in."""
    x = match_activation(node)
    if x.kind == "static" or (x.kind == "tensor" and e.target.flavour != "cuda"):
        return _cast(e, _dequantized(e, x), dtype)
    grid = find_spec(spec)
    if not isinstance(grid, IntGrid) or view != "matrix":
        raise LoweringError(
            diagnostic_codes.NO_TRANSLATION, f"an activation decoded by {spec} has no translation to ONNX"
        )
    fake = node.meta["val"]
    numbers = e.op("Cast", parts[0], to=ir.DataType.FLOAT)
    grouped = _split(e, numbers, fake, grid)
    named = dict(zip(grid.grid_names, parts[1:], strict=True))
    if "zero" in named:
        grouped = e.op("Sub", grouped, _per_group(e, named["zero"], grid))
    grouped = e.op("Mul", grouped, _per_group(e, named["scale"], grid))
    if "minimum" in named:
        grouped = e.op("Add", grouped, _per_group(e, named["minimum"], grid))
    return _cast(e, _join(e, grouped, fake, grid), dtype)


def _dequantized(e: Emitter, x: Activation) -> ir.Value:
    """A standard pair of quantize and dequantize; signed codes stay signed where 8-bit products take them."""
    assert x.spec is not None
    if x.kind == "static" and x.spec.symmetric and e.target.flavour != "cpu":
        scale, zero = scalar(e, x.params[0]), e.const(0, ir.DataType.INT8)
        source = e.cast(x.source, torch.float32)
        return e.op("DequantizeLinear", e.op("QuantizeLinear", source, scale, zero), scale, zero)
    codes = unsigned_codes(e, x)
    return e.op("DequantizeLinear", codes.values, codes.scale, codes.zero)


def quantize(e: Emitter, node: fx.Node, x: fx.Node, params: Sequence[fx.Node], spec: str) -> Sequence[ir.Value]:
    """Codes, and for dynamic grids the grid's tensors, from elementary operators.

    Raises:
        LoweringError: SPARC401 for an encoding that is no integer grid.
    """
    grid = find_spec(spec)
    if not isinstance(grid, IntGrid):
        raise LoweringError(
            diagnostic_codes.NO_TRANSLATION, f"an activation quantized by {spec} has no translation to ONNX"
        )
    if grid.bits < 8:
        raise LoweringError(
            diagnostic_codes.NO_TRANSLATION, f"an activation of {grid.bits} bits has no translation to ONNX"
        )
    fake = x.meta["val"]
    grouped = _split(e, e.cast(x, torch.float32), fake, grid)
    named = {name: _per_group(e, value, grid) for name, value in zip(grid.grid_names, params, strict=False)}
    if not params:
        named = _fit(e, grouped, grid)
    numbers = e.op("Sub", grouped, named["minimum"]) if "minimum" in named else grouped
    numbers = e.op("Round", e.op("Div", numbers, named["scale"]))
    if "zero" in named:
        numbers = e.op("Add", numbers, named["zero"])
    numbers = e.op("Clip", numbers, e.const(grid.low, torch.float32), e.const(grid.high, torch.float32))
    made = [e.op("Cast", _join(e, numbers, fake, grid), to=onnx_type(grid.code_dtype))]
    if not params:
        outs = node.meta["val"]
        for name, out in zip(grid.grid_names, outs[1:], strict=True):
            flat = e.op("Squeeze", named[name], [-1]) if isinstance(grid.group, int) else named[name]
            made.append(e.op("Cast", flat, to=onnx_type(out.dtype)))
    return made


def _fit(e: Emitter, grouped: ir.Value, grid: IntGrid) -> dict[str, ir.Value]:
    """`IntGrid.from_range` of each group's extremes; groups lie on the last axis."""
    axes = e.ints([-1]) if grid.group != "tensor" else None
    zero, high = e.const(0, torch.float32), e.const(grid.high, torch.float32)
    if grid.symmetric:
        largest = e.op("ReduceMax", e.op("Abs", grouped), axes, keepdims=1)
        return {"scale": _stored(e, positive(e, e.op("Div", largest, high)), grid)}
    least, greatest = (e.op(operator, grouped, axes, keepdims=1) for operator in ("ReduceMin", "ReduceMax"))
    if grid.zero == "integer":
        least, greatest = e.op("Min", least, zero), e.op("Max", greatest, zero)
    scale = _stored(e, positive(e, e.op("Div", e.op("Sub", greatest, least), high)), grid)
    if grid.zero == "minimum":
        return {"scale": scale, "minimum": _stored(e, least, grid)}
    point = e.op("Round", e.op("Div", e.op("Neg", least), scale))
    return {"scale": scale, "zero": e.op("Clip", point, e.const(grid.low, torch.float32), high)}


def _stored(e: Emitter, scale: ir.Value, grid: IntGrid) -> ir.Value:
    """Rounded to the dtype that scales are stored in."""
    if grid.scale_dtype == "float32":
        return scale
    narrow = e.op("Cast", scale, to=onnx_type(getattr(torch, grid.scale_dtype)))
    return e.op("Cast", narrow, to=ir.DataType.FLOAT)


def _split(e: Emitter, value: ir.Value, fake: Tensor, grid: IntGrid) -> ir.Value:
    """`[..., columns]` as `[..., groups, group]` for grids by groups of columns."""
    if not isinstance(grid.group, int):
        return value
    columns = fake.shape[-1]
    if not isinstance(columns, int):
        raise LoweringError(
            diagnostic_codes.NO_TRANSLATION, "an activation of dynamic width cannot be quantized in groups"
        )
    short = -columns % grid.group
    if short:
        value = e.op("Pad", value, [0, short], None, [-1], mode="edge")
    lead = list(fake.shape[:-1])
    return e.reshape(value, [*lead, columns + short], [*lead, (columns + short) // grid.group, grid.group])


def _join(e: Emitter, value: ir.Value, fake: Tensor, grid: IntGrid) -> ir.Value:
    """The inverse of `_split`."""
    if not isinstance(grid.group, int):
        return value
    columns, lead = fake.shape[-1], list(fake.shape[:-1])
    padded = columns + -columns % grid.group
    joined = e.reshape(value, [*lead, padded // grid.group, grid.group], [*lead, padded])
    return joined if padded == columns else e.op("Slice", joined, [0], [columns], [-1])


def _per_group(e: Emitter, tensor: fx.Node, grid: IntGrid) -> ir.Value:
    """A grid tensor as float32, broadcasting over each group."""
    value = e.cast(tensor, torch.float32)
    return e.op("Unsqueeze", value, [-1]) if isinstance(grid.group, int) else value


def _cast(e: Emitter, value: ir.Value, dtype: torch.dtype) -> ir.Value:
    return value if dtype == torch.float32 else e.op("Cast", value, to=onnx_type(dtype))
