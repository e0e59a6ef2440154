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


COMPLEX: dict[str, Translation] = {
    **{f"aten.{name}": cast for name in ("to.dtype", "to.dtype_layout", "_to_copy.default")},
    "aten.real.default": part(0),
    "aten.imag.default": part(1),
    "aten.view_as_real.default": pairs,
    "aten.view_as_complex.default": pairs,
}
