"""Products of 8-bit codes: both operands are integers, the result is scaled once."""

import onnx_ir as ir
import torch

from sparc.codegen.encoded import Activation
from sparc.codegen.onnx.emit import MS, Emitter
from sparc.codegen.onnx.sites.activation import Codes, unsigned_codes
from sparc.codegen.onnx.sites.codes import IntMatrix
from sparc.codegen.onnx.sites.product import Product, takes_integers
from sparc.codegen.onnx.sites.shared import shared_codes, shares_columns
from sparc.codegen.onnx.types import onnx_type
from sparc.target import KernelUse


def integer_product(e: Emitter, site: Product) -> ir.Value | None:
    """`decode(quantize(x)) @ decode(w).T + bias` for weights with a scale per row at most.

    tensor: `((q - z) @ (c - y)) * (s * t) + bias`, q, s, z from DynamicQuantizeLinear.
    static: the same with a known scale and zero point.
    token: the same with a scale per row of x.
    split: the product of the coarse codes plus the product of the fine ones.

    Codes and scales of half-precision values are float32, and so is the result before it is cast.
    """
    w = site.matrix
    if w is None or not takes_integers(e, site):
        return None
    bias = None if site.bias is None else e.cast(site.bias, torch.float32)
    if site.x.kind == "split":
        result = _split_product(e, site, w, bias)
    else:
        result = scaled_product(e, unsigned_codes(e, site.x), w, bias)
    if site.node.meta["val"].ndim == 2 and shares_columns(e, w):
        result = e.op("Squeeze", result, [0])
    operator = "MatMulIntegerToFloat" if e.target.contrib else "MatMulInteger"
    site.carried(e, KernelUse(operator, w.code_bytes + w.grid_bytes))
    half = site.weight.dtype != torch.float32
    return e.op("Cast", result, to=onnx_type(site.weight.dtype)) if half else result


def scaled_product(e: Emitter, x: Codes, w: IntMatrix, bias: ir.Value | None) -> ir.Value:
    """`(codes - zero) @ (w - y) * scale * t + bias`; of rank 3 at least where the codes of w are shared."""
    one, rows = e.const(1.0, torch.float32), w.scale(torch.float32)
    codes, zero = shared_codes(w) if shares_columns(e, w) else (w.codes_transposed(), w.zero_int8())
    if e.target.contrib:
        operands = (x.values, codes, one if x.per_row else x.scale, rows, x.zero, zero)
        if not x.per_row:
            return e.op("MatMulIntegerToFloat", *operands, bias, domain=MS)
        product = e.op("MatMulIntegerToFloat", *operands, domain=MS)
    else:
        whole = e.op("MatMulInteger", x.values, codes, x.zero, zero)
        factor = rows if x.per_row else e.op("Mul", x.scale, rows)
        product = e.op("Mul", e.op("Cast", whole, to=ir.DataType.FLOAT), factor)
    if x.per_row:
        product = e.op("Mul", product, x.scale)
    return product if bias is None else e.op("Add", product, bias)


def _split_product(e: Emitter, site: Product, w: IntMatrix, bias: ir.Value | None) -> ir.Value:
    """Coarse and fine codes; as one product on stacked rows where their zero points are the same."""
    assert site.x.halves is not None
    first, second = site.x.halves
    coarse, steps = unsigned_codes(e, first), _fine_steps(first, second)
    scale = e.op("Div", coarse.scale, e.const(steps, torch.float32)) if steps is not None else None
    fine = unsigned_codes(e, second, scale)
    rank = first.source.meta["val"].ndim
    if first.spec is not None and first.spec.symmetric and steps is not None and rank > 1:
        stacked = e.op("Concat", coarse.values, fine.values, axis=-2)
        both = scaled_product(e, Codes(stacked, coarse.scale, coarse.zero), w, None)
        high, low = e.op("Split", both, axis=-2, num_outputs=2, outputs=2)
        terms = [high, e.op("Mul", low, e.const(1 / steps, torch.float32))]
        return e.op("Sum", *terms, *([] if bias is None else [bias]))
    return e.op("Sum", scaled_product(e, coarse, w, None), scaled_product(e, fine, w, bias))


def _fine_steps(coarse: Activation, fine: Activation) -> float | None:
    """How many fine steps make a coarse one, when the fine scale is the coarse one divided by a number."""
    scale = fine.params[0] if fine.params else None
    if scale is None or scale.target is not torch.ops.aten.div.Tensor or not isinstance(scale.args[1], (int, float)):
        return None
    return float(scale.args[1]) if scale.args[0] is coarse.node.args[0][1] else None  # type: ignore[index]
