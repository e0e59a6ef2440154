"""Complex numbers, kept as pairs on a last axis; what is not here goes to torch.onnx's registry."""

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from sparc.codegen.onnx.emit import Emitter, Translation


def cast(e: Emitter, node: fx.Node, x: fx.Node, *_: Any, **named: Any) -> ir.Value | None:
    """Real numbers as complex ones; complex ones of the same width as they are."""
    fake, out = x.meta["val"], node.meta["val"]
    if fake.dtype == out.dtype:
        return e.value(x)
    if fake.dtype.is_complex or not out.dtype.is_complex:
        return None
    real = e.op("Unsqueeze", e.cast(x, torch.float32 if out.dtype == torch.complex64 else torch.float64), [-1])
    return e.op("Pad", real, [0, 1], None, [-1])


def part(index: int) -> Translation:
    """The real or the imaginary part."""

    def translate(e: Emitter, node: fx.Node, x: fx.Node) -> ir.Value:
        return e.op("Gather", x, e.const(index, torch.int64), axis=-1)

    return translate


def pairs(e: Emitter, node: fx.Node, x: fx.Node) -> ir.Value:
    """Complex numbers as pairs, which they are."""
    return e.value(x)


def polar(e: Emitter, node: fx.Node, length: fx.Node, angle: fx.Node) -> ir.Value:
    """Complex numbers of lengths and angles."""
    return _pair(e, *(e.op("Mul", length, e.op(function, angle)) for function in ("Cos", "Sin")))


def multiply(e: Emitter, node: fx.Node, x: Any, y: Any) -> ir.Value | None:
    """A product of complex numbers, or of complex and real ones."""
    if isinstance(x, complex) or isinstance(y, complex):
        return None
    if not _is_complex(x):
        x, y = y, x
    if not _is_complex(y):
        kind = torch.float32 if node.meta["val"].dtype == torch.complex64 else torch.float64
        factor = e.cast(y, kind)
        return e.op("Mul", x, e.op("Unsqueeze", factor, [-1]) if isinstance(y, fx.Node) else factor)
    (a, b), (c, d) = ([part(index)(e, node, each) for index in (0, 1)] for each in (x, y))
    real = e.op("Sub", e.op("Mul", a, c), e.op("Mul", b, d))
    return _pair(e, real, e.op("Add", e.op("Mul", a, d), e.op("Mul", b, c)))


def unsqueeze(e: Emitter, node: fx.Node, x: fx.Node, axis: int) -> ir.Value:
    """A new axis before the pairs."""
    return e.op("Unsqueeze", x, [axis if axis >= 0 else axis - 1])


def _pair(e: Emitter, real: ir.Value, imaginary: ir.Value) -> ir.Value:
    return e.op("Concat", *(e.op("Unsqueeze", each, [-1]) for each in (real, imaginary)), axis=-1)


def _is_complex(x: Any) -> bool:
    return isinstance(x, fx.Node) and bool(x.meta["val"].dtype.is_complex)


COMPLEX: dict[str, Translation] = {
    **{f"aten.{name}": cast for name in ("to.dtype", "to.dtype_layout", "_to_copy.default")},
    "aten.real.default": part(0),
    "aten.imag.default": part(1),
    "aten.view_as_real.default": pairs,
    "aten.view_as_complex.default": pairs,
    "aten.polar.default": polar,
    "aten.mul.Tensor": multiply,
    "aten.unsqueeze.default": unsqueeze,
}
