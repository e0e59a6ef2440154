"""Encoded weights as dense ones: dequantized at every use, or by constants that the runtime folds when it loads."""

import math
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from sparc.codegen.encoded import Encoded, match_encoded
from sparc.codegen.onnx.emit import Emitter
from sparc.codegen.onnx.sites.codes import IntMatrix, int_matrix, masked_origin, say_dense
from sparc.codegen.onnx.sites.product import Product
from sparc.codegen.onnx.store import Origin
from sparc.encoding.bits import packed_length
from sparc.encoding.dense import Dense
from sparc.target import KernelUse

_WHY_MASKED = "ONNX has no operator for {}: its zeros are stored, and expanded when the file is loaded"
_WHY_FOLDED = "ONNX Runtime has no fast operator for it and expands it when it loads the file"


def dequantized_product(e: Emitter, site: Product) -> ir.Value | None:
    """`x @ dequantize(w).T + bias` by standard operators.

    A Gemm on rows, as ONNX Runtime would turn DequantizeLinear and MatMul into an operator that rounds x to 8 bits.
    """
    w = site.matrix
    if w is None or not site.is_matrix or not can_dequantize(e, w):
        return None
    fake = site.x.node.meta["val"]
    out, reduce = w.shape
    rows = e.value(site.x.node) if fake.ndim == 2 else e.reshape(site.x.node, fake.shape, [-1, reduce])
    product = e.op("Gemm", rows, dequantized(e, w), site.bias, transB=1)
    site.carried(e, KernelUse("DequantizeLinear, Gemm", w.code_bytes + w.grid_bytes))
    return product if fake.ndim == 2 else e.op("Reshape", product, e.sizes.vector([*fake.shape[:-1], out]))


def can_dequantize(e: Emitter, w: IntMatrix) -> bool:
    """Whether DequantizeLinear expresses the grid at this opset: groups and 4 bits need 21."""
    if w.grid.bits in (2, 3) or (e.target.opset < 21 and (w.grid.bits == 4 or not w.per_channel)):
        return False
    return w.grid.bits == 8 or w.shape[1] % 2 == 0


def dequantized(e: Emitter, w: IntMatrix) -> ir.Value:
    """The dense matrix `[out, reduce]`: DequantizeLinear, and Add for a floating minimum."""
    out, reduce = w.shape
    packed = None if w.grid.bits == 8 else ir.DataType.UINT4
    codes = w.read("codes", dtype=packed, dims=(out, reduce))
    zero = _zero(w)
    attributes: dict[str, Any] = {"axis": 0}
    if not w.per_channel:
        attributes = {"axis": 1, "block_size": w.grid.group}
    scale = w.scale() if w.per_channel else w.as_float(w.read("scale"))
    matrix = e.op("DequantizeLinear", codes, scale, zero, **attributes)
    if w.grid.zero == "minimum" and not w.grid.symmetric:
        matrix = e.op("Add", matrix, _per_column(w, "minimum"))
    return matrix


def _zero(w: IntMatrix) -> ir.Value | None:
    """The zero point in the codes' type and the scale's shape; 4-bit signed codes are stored offset by 8."""
    out = w.shape[0]
    shape = tuple(w.part("scale").shape) if not w.per_channel else () if w.grid.group == "tensor" else (out,)
    if w.grid.bits == 8:
        return None if w.grid.symmetric or w.grid.zero == "minimum" else w.read("zero", dims=shape)
    if w.grid.zero == "minimum" and not w.grid.symmetric:
        return None
    count = math.prod(shape)
    zeros = torch.full((count,), 8) if w.grid.symmetric else w.part("zero").reshape(-1)
    name = f"zeros8[{count}]" if w.grid.symmetric else w.named("zero_packed")
    return w.e.derived(name, zeros.to(torch.uint8), "pack4", dtype=ir.DataType.UINT4, dims=shape)


def _per_column(w: IntMatrix, name: str) -> ir.Value:
    """A grid tensor spread over the columns, for adding."""
    value, reduce = w.as_float(w.read(name)), w.shape[1]
    if w.per_channel:
        return value
    groups, group = w.part(name).shape[-1], int(w.grid.group)
    wide = w.e.op("Expand", w.e.op("Unsqueeze", value, [2]), [w.shape[0], groups, group])
    flat = w.e.op("Reshape", wide, [w.shape[0], groups * group])
    return flat if groups * group == reduce else w.e.op("Slice", flat, [0], [reduce], [1])


# any use of any encoded weight ----------------------------------------------------------------------------------------
def decode_weight(e: Emitter, node: fx.Node) -> ir.Value | None:
    """The dense weight behind a decode, in its own layout; None when it is no weight."""
    weight = match_encoded(e.program, node)
    if weight is None:
        return None
    w = int_matrix(e, weight)
    if w is None:
        dense = _stored_dense(e, weight)
        say_dense(e, weight, f"ONNX has no operator for {weight.spec}: it is stored dense")
    else:
        dense = folded(e, w)
        say_dense(e, weight, _WHY_FOLDED if w.derived is None else _WHY_MASKED.format(weight.spec))
    size = math.prod(weight.shape) * weight.dtype.itemsize
    operator = ", ".join(dict.fromkeys(str(user.target).split(".")[1] for user in node.users))
    e.carry(weight.site, KernelUse(operator, size))
    return dense


def _stored_dense(e: Emitter, weight: Encoded) -> ir.Value:
    """The decoded weight as a tensor; its matrix in a layout where that is its own, so that a mask can be undone."""
    matrix = weight.spec.decode(weight.tensors(e.program), weight.matrix_shape, weight.dtype)
    layout = {"matrix": "identity", "conv": "reshape", "transposed": "transpose"}.get(weight.view.kind)
    if layout is None or not isinstance(getattr(weight.spec, "of", None), Dense):
        return e.derived(weight.site, weight.view.from_matrix(matrix, weight.shape), of=Origin(weight.site))
    return e.derived(weight.site, matrix, layout, weight.shape, of=masked_origin(weight))


def folded(e: Emitter, w: IntMatrix) -> ir.Value:
    """The dense weight in its own layout, computed by constants: `(codes - zero) * scale + minimum`."""
    numbers = _numbers(e, w)
    *lead, out, reduce = w.weight.matrix_shape
    spread = _group_shape(w, lead, out, reduce)
    if "zero" in w.grid.grid_names:
        numbers = e.op("Sub", numbers, _grid_part(e, w, "zero"))
    numbers = e.op("Mul", numbers, _grid_part(e, w, "scale"))
    if "minimum" in w.grid.grid_names:
        numbers = e.op("Add", numbers, _grid_part(e, w, "minimum"))
    if spread is not None:
        numbers = e.op("Reshape", numbers, [*lead, out, -1])
        if -reduce % int(w.grid.group):
            numbers = e.op("Slice", numbers, [0], [reduce], [-1])
    own = _own_layout(e, w, numbers)
    return own if w.weight.dtype == torch.float32 else e.cast(own, w.weight.dtype)


def _numbers(e: Emitter, w: IntMatrix) -> ir.Value:
    """Codes as float32, `[..., out, reduce]` or `[..., out, groups, group]`."""
    *lead, out, reduce = w.weight.matrix_shape
    codes = w.read("codes")
    spread = _group_shape(w, lead, out, reduce)
    if w.grid.bits < 8:
        codes = unpacked(e, codes, w.grid.bits, [*lead, out], reduce)
    numbers = e.op("Cast", codes, to=ir.DataType.FLOAT)
    if w.grid.bits < 8 and w.grid.symmetric:
        numbers = e.op("Add", numbers, e.const(float(w.grid.low), torch.float32))
    if spread is None:
        return numbers
    short = -reduce % int(w.grid.group)
    if short:
        numbers = e.op("Pad", numbers, [0, short], None, [-1])
    return e.op("Reshape", numbers, spread)


def unpacked(e: Emitter, packed: ir.Value, bits: int, lead: list[int], reduce: int) -> ir.Value:
    """Codes in little-endian bit streams (`sparc.encoding.bits`), as a byte each."""
    if 8 % bits:
        return _unpacked_words(e, packed, bits, lead, reduce)
    mask = e.const(2**bits - 1, torch.uint8)
    lanes = []
    for shift in range(0, 8, bits):
        lane = e.op("BitShift", packed, e.const(shift, torch.uint8), direction="RIGHT") if shift else packed
        lanes.append(e.op("Unsqueeze", e.op("BitwiseAnd", lane, mask), [-1]))
    codes = e.op("Reshape", e.op("Concat", *lanes, axis=-1), [*lead, -1])
    return codes if reduce % (8 // bits) == 0 else e.op("Slice", codes, [0], [reduce], [-1])


def _unpacked_words(e: Emitter, packed: ir.Value, bits: int, lead: list[int], reduce: int) -> ir.Value:
    """Codes that cross bytes: `bits` bytes are a word of 8 codes, taken apart by arithmetic on int64."""
    short = -packed_length(reduce, bits) % bits
    if short:
        packed = e.op("Pad", packed, [0, short], None, [-1])
    split = e.op("Cast", e.op("Reshape", packed, [*lead, -1, bits]), to=ir.DataType.INT64)
    places = e.const([256**byte for byte in range(bits)], torch.int64)
    words = e.op("ReduceSum", e.op("Mul", split, places), [-1], keepdims=1)
    lanes = e.op("Div", words, e.const([2 ** (bits * lane) for lane in range(8)], torch.int64))
    codes = e.op("Reshape", e.op("Mod", lanes, e.const(2**bits, torch.int64)), [*lead, -1])
    return codes if reduce % 8 == 0 else e.op("Slice", codes, [0], [reduce], [-1])


def _group_shape(w: IntMatrix, lead: list[int], out: int, reduce: int) -> list[int] | None:
    if w.per_channel:
        return None
    group = int(w.grid.group)
    return [*lead, out, -(-reduce // group), group]


def _grid_part(e: Emitter, w: IntMatrix, name: str) -> ir.Value:
    value = w.read(name)
    if value.dtype != ir.DataType.FLOAT:
        value = e.op("Cast", value, to=ir.DataType.FLOAT)
    return value if w.per_channel else e.op("Unsqueeze", value, [-1])


def _own_layout(e: Emitter, w: IntMatrix, matrix: ir.Value) -> ir.Value:
    """The weight's own layout from its matrix (`sparc.encoding.view`)."""
    view, shape = w.weight.view, w.weight.shape
    if view.kind == "conv":
        return e.op("Reshape", matrix, list(shape))
    if view.kind == "transposed":
        rank = len(shape)
        return e.op("Transpose", matrix, perm=[*range(rank - 2), rank - 1, rank - 2])
    if view.kind == "conv_transposed":
        split = e.op("Reshape", matrix, [view.groups, shape[1], shape[0] // view.groups, -1])
        return e.op("Reshape", e.op("Transpose", split, perm=[0, 2, 1, 3]), list(shape))
    return matrix
