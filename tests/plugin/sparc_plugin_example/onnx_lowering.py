"""ONNX for PowersOfTwo: the packed codes are stored, and looked up in a table when the model is loaded."""

import torch
from torch import fx

from sparc.codegen.encoded import Encoded
from sparc.codegen.onnx.emit import Emitter, Result
from sparc.encoding.operators import is_decode
from sparc.target import KernelUse

_MEANINGS = [0.0, *(2.0**-e for e in range(7)), *(-(2.0**-e) for e in range(7)), 0.0]


def looked_up(e: Emitter, node: fx.Node, weight: Encoded) -> Result:
    """`table[codes] * scale` for the decode of a matrix; operators that read it are left to sparc."""
    if not is_decode(node) or str(weight.view) != "matrix":
        return None
    packed = e.weight(weight.parts["codes"])
    low = e.op("BitwiseAnd", packed, e.const(15, torch.uint8))
    high = e.op("BitShift", packed, e.const(4, torch.uint8), direction="RIGHT")
    pairs = e.op("Concat", e.op("Unsqueeze", low, [-1]), e.op("Unsqueeze", high, [-1]), axis=-1)
    codes = e.op("Slice", e.op("Reshape", pairs, [*weight.shape[:-1], -1]), [0], [weight.shape[-1]], [-1])
    signed = e.op("Gather", e.const(_MEANINGS, torch.float32), e.op("Cast", codes, to=7))
    dense = e.cast(e.op("Mul", signed, e.weight(weight.parts["scale"])), weight.dtype)
    size = int(torch.Size(weight.shape).numel()) * weight.dtype.itemsize
    e.carry(weight.site, KernelUse("Gather, Mul", size, "looked up when the file is loaded"))
    return dense
