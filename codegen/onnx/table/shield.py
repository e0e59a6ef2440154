"""Keeping ONNX Runtime from rounding what the program leaves in float."""

from typing import Any

import onnx_ir as ir
from torch import fx

from sparc.codegen.onnx.emit import Emitter


def shielded(e: Emitter, x: Any) -> ir.Value:
    """The input of a product or convolution with float weights, as a Sum of one term where the program is quantized.

    Between DequantizeLinear and QuantizeLinear, ONNX Runtime rounds the float weights of Conv, ConvTranspose and Gemm
    to 8 bits by itself; it does not look through Sum.
    """
    if not e.quantizes_statically or not isinstance(x, fx.Node) or x.op != "call_function":
        return e.value(x)
    return e.op("Sum", x)  # type: ignore[no-any-return]
