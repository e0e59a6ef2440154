"""Activation functions."""

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from sparc.codegen.onnx.emit import MS, Emitter, Translation
from sparc.codegen.onnx.table.arithmetic import unary


def gelu(e: Emitter, node: fx.Node, x: fx.Node, *, approximate: str = "none") -> ir.Value:
    """`x * Phi(x)`, exact or by tanh; before opset 20 from its parts."""
    if e.target.opset >= 20:
        return e.op("Gelu", x, approximate=approximate)
    dtype = node.meta["val"].dtype
    if approximate == "none":
        inner = e.op("Erf", e.op("Div", x, e.const(2**0.5, dtype)))
        return e.op("Mul", e.op("Mul", x, e.op("Add", inner, e.const(1, dtype))), e.const(0.5, dtype))
    cube = e.op("Mul", e.op("Mul", e.op("Mul", x, x), x), e.const(0.044715, dtype))
    inner = e.op("Tanh", e.op("Mul", e.op("Add", x, cube), e.const((2 / torch.pi) ** 0.5, dtype)))
    return e.op("Mul", e.op("Mul", x, e.const(0.5, dtype)), e.op("Add", inner, e.const(1, dtype)))


def silu(e: Emitter, node: fx.Node, x: fx.Node) -> ir.Value:
    """`x * sigmoid(x)`."""
    if e.target.flavour == "cpu" and x.meta["val"].dtype == torch.float32:
        return e.op("QuickGelu", x, domain=MS, alpha=1.0)
    return e.op("Mul", x, e.op("Sigmoid", x))


def relu6(e: Emitter, node: fx.Node, x: fx.Node) -> ir.Value:
    """`min(max(x, 0), 6)`."""
    dtype = node.meta["val"].dtype
    return e.op("Clip", x, e.const(0, dtype), e.const(6, dtype))


def hardtanh(e: Emitter, node: fx.Node, x: fx.Node, low: Any = -1, high: Any = 1) -> ir.Value:
    """`min(max(x, low), high)`."""
    dtype = node.meta["val"].dtype
    return e.op("Clip", x, e.const(low, dtype), e.const(high, dtype))


def hardsigmoid(e: Emitter, node: fx.Node, x: fx.Node) -> ir.Value:
    """`min(max(x / 6 + 1/2, 0), 1)`."""
    return e.op("HardSigmoid", x, alpha=1 / 6, beta=0.5)


def leaky_relu(e: Emitter, node: fx.Node, x: fx.Node, slope: Any = 0.01) -> ir.Value:
    """`x` where positive, else `slope * x`."""
    return e.op("LeakyRelu", x, alpha=float(slope))


def elu(e: Emitter, node: fx.Node, x: fx.Node, alpha: Any = 1, scale: Any = 1, input_scale: Any = 1) -> ir.Value | None:
    """`x` where positive, else `alpha * (exp(x) - 1)`."""
    return e.op("Elu", x, alpha=float(alpha)) if scale == 1 and input_scale == 1 else None


def prelu(e: Emitter, node: fx.Node, x: fx.Node, slope: fx.Node) -> ir.Value:
    """`x` where positive, else `slope * x`, one slope per channel (axis 1) or for all."""
    rank, count = x.meta["val"].ndim, slope.meta["val"].numel()
    shaped = e.op("Reshape", slope, [count, *[1] * (rank - 2)] if rank >= 2 else [count])
    return e.op("PRelu", x, shaped)


def softplus(e: Emitter, node: fx.Node, x: fx.Node, beta: Any = 1, threshold: Any = 20) -> ir.Value:
    """`log(1 + exp(beta * x)) / beta`, and `x` where `beta * x` exceeds the threshold."""
    dtype = node.meta["val"].dtype
    inner = x if beta == 1 else e.op("Mul", x, e.const(beta, dtype))
    smooth = e.op("Softplus", inner)
    if beta != 1:
        smooth = e.op("Div", smooth, e.const(beta, dtype))
    return e.op("Where", e.op("Greater", inner, e.const(threshold, dtype)), x, smooth)


def softmax(e: Emitter, node: fx.Node, x: fx.Node, dim: int, dtype: Any = None, *_: Any, **named: Any) -> ir.Value:
    """`exp(x) / sum(exp(x))` along an axis."""
    return e.op("Softmax", e.cast(x, node.meta["val"].dtype), axis=dim)


def log_softmax(e: Emitter, node: fx.Node, x: fx.Node, dim: int, dtype: Any = None, *_: Any, **named: Any) -> ir.Value:
    """The logarithm of softmax."""
    return e.op("LogSoftmax", e.cast(x, node.meta["val"].dtype), axis=dim)


def glu(e: Emitter, node: fx.Node, x: fx.Node, dim: int = -1) -> ir.Value:
    """`a * sigmoid(b)` for the halves a, b of x."""
    a, b = e.op("Split", x, axis=dim, num_outputs=2, outputs=2)
    return e.op("Mul", a, e.op("Sigmoid", b))


def dropout(e: Emitter, node: fx.Node, x: fx.Node, p: float, train: bool) -> ir.Value | None:
    """The input itself, as the model is not trained."""
    return None if train else e.value(x)


TABLE: dict[str, Translation] = {
    "aten.relu.default": unary("Relu"),
    "aten.gelu.default": gelu,
    "aten.silu.default": silu,
    "aten.relu6.default": relu6,
    "aten.hardtanh.default": hardtanh,
    "aten.hardsigmoid.default": hardsigmoid,
    "aten.hardswish.default": unary("HardSwish"),
    "aten.leaky_relu.default": leaky_relu,
    "aten.elu.default": elu,
    "aten.selu.default": unary("Selu"),
    "aten.mish.default": unary("Mish"),
    "aten.prelu.default": prelu,
    "aten.softplus.default": softplus,
    "aten.log_sigmoid.default": lambda e, node, x: e.op("Neg", e.op("Softplus", e.op("Neg", x))),
    "aten.softmax.int": softmax,
    "aten._softmax.default": softmax,
    "aten.log_softmax.int": log_softmax,
    "aten._log_softmax.default": log_softmax,
    "aten.glu.default": glu,
    "aten.dropout.default": dropout,
    "aten.feature_dropout.default": dropout,
    "aten.alpha_dropout.default": dropout,
}
