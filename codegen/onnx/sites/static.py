"""Static quantization as pairs of QuantizeLinear and DequantizeLinear around ordinary operators: runtimes fuse them."""

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from sparc.codegen.encoded import Activation, match_activation, match_encoded
from sparc.codegen.onnx.emit import Emitter
from sparc.codegen.onnx.sites.codes import IntMatrix, int_matrix
from sparc.codegen.onnx.sites.product import Product, requantized
from sparc.codegen.onnx.table.conv import conv_attributes, convolve
from sparc.target import KernelUse

_CONVOLUTIONS = tuple(f"aten.conv{rank}d.{overload}" for rank in (1, 2, 3) for overload in ("default", "padding"))


def static_product(e: Emitter, site: Product) -> ir.Value | None:
    """`dequantize(x) @ dequantize(w) + bias` for a static x: ONNX Runtime makes it an integer product."""
    w = site.matrix
    if w is None or site.x.kind != "static" or not w.per_channel or w.grid.bits != 8 or w.grid.zero != "integer":
        return None
    if len(site.weight.matrix_shape) != 2:
        return None
    if site.weight.dtype != torch.float32 and e.target.flavour != "cuda":
        return None  # ONNX Runtime's CPU would round the activations of such a product once more, in blocks
    axis = None if w.grid.group == "tensor" else 1
    dense = e.op("DequantizeLinear", w.codes_transposed(), w.scale(), w.zero_int8(), axis=axis)
    product = e.op("MatMul", site.x.node, dense)
    operator = "QLinearMatMul" if requantized(site.node) else "DequantizeLinear, MatMul"
    site.carried(e, KernelUse(operator, w.code_bytes + w.grid_bytes))
    return product if site.bias is None else e.op("Add", product, site.bias)


def convolution(e: Emitter, node: fx.Node) -> ir.Value | None:
    """A convolution with encoded weights and a static input, in the form that becomes QLinearConv.

    Where the result is quantized too, the bias is rounded to int32 steps of `x_scale * w_scale`, as QLinearConv wants.
    """
    if str(node.target) not in _CONVOLUTIONS:
        return None
    weight = match_encoded(e.program, node.args[1])
    w = int_matrix(e, weight) if weight is not None else None
    if weight is None or w is None or w.grid.bits != 8 or not w.per_channel or w.grid.zero != "integer":
        return None
    source, pads = _unpadded(node)
    x = match_activation(source)
    if x.kind != "static":
        return None
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    axis = None if w.grid.group == "tensor" else 0
    dense = e.op("DequantizeLinear", _kernel(w), w.scale(), w.zero_int8(), axis=axis)
    fused = _quantized_after(node)
    shift = None if bias is None else _integer_bias(e, x, w, bias) if fused else e.value(bias)
    operator = "QLinearConv" if fused else "DequantizeLinear, Conv"
    e.carry(weight.site, KernelUse(operator, w.code_bytes + w.grid_bytes))
    attributes = conv_attributes(node)
    attributes["pads"] = [own + more for own, more in zip(attributes["pads"], pads, strict=True)]
    return convolve(e, node, source, dense, shift, attributes)


def _unpadded(node: fx.Node) -> tuple[Any, list[int]]:
    """What a convolution reads, behind zero padding of its spatial axes, and that padding: befores, then afters."""
    x: Any = node.args[0]
    rank = node.meta["val"].ndim - 2
    nothing = [0] * len(conv_attributes(node)["pads"])
    if not isinstance(x, fx.Node) or str(x.target) not in ("aten.pad.default", "aten.constant_pad_nd.default"):
        return x, nothing
    widths: Any = x.args[1]
    fills = [fill for fill in x.args[2:] if fill != "constant"]
    if (
        any(fills)
        or len(nothing) != 2 * rank
        or len(widths) > 2 * rank
        or not all(isinstance(width, int) and width >= 0 for width in widths)
    ):
        return x, nothing
    filled = [*widths, *[0] * (2 * rank - len(widths))]
    return x.args[0], [*filled[0::2][::-1], *filled[1::2][::-1]]


def _kernel(w: IntMatrix) -> ir.Value:
    """Codes `[out, in, *kernel]`, int8."""
    layout = "identity" if w.grid.symmetric else "flip_sign"
    return w.read("codes", layout, dims=tuple(w.weight.shape))


def _quantized_after(node: fx.Node) -> bool:
    """Whether the result, or its clipped self, is quantized and nothing else."""
    users = list(node.users)
    if len(users) == 1 and str(users[0].target) in ("aten.relu.default", "aten.relu6.default", "aten.hardtanh.default"):
        return _quantized_after(users[0])
    return requantized(node)


def _integer_bias(e: Emitter, x: Activation, w: IntMatrix, bias: Any) -> ir.Value:
    """The bias as int32 codes on the scale of the integer product; computed while emitting where all of it is known."""
    tensor, scale = e.program.weight(bias), e.program.weight(x.params[0])
    if tensor is None or scale is None or tensor.dtype != torch.float32:
        return e.value(bias)
    steps = (scale.float().reshape(()) * w.part("scale").float().reshape(-1)).expand(tensor.shape[0]).contiguous()
    numbers = torch.round(tensor.double() / steps.double())
    if bool((numbers.abs() >= 2**31 - 1).any()):
        return e.value(bias)
    name = f"{w.weight.site}_bias"
    codes = e.derived(f"{name}_codes", numbers.to(torch.int32))
    return e.op("DequantizeLinear", codes, e.derived(f"{name}_scale", steps), axis=0)
