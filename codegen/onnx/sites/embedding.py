"""Rows of an encoded table: codes are gathered first and dequantized afterwards."""

import math
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from sparc.codegen.encoded import match_encoded
from sparc.codegen.onnx.emit import MS, Emitter
from sparc.codegen.onnx.sites.codes import IntMatrix, int_matrix
from sparc.codegen.onnx.sites.expand import unpacked
from sparc.codegen.onnx.sites.nbits import (
    block_size,
    blockwise_codes,
    blockwise_scale,
    blockwise_zero,
    multiplies_blocks,
)
from sparc.codegen.onnx.sites.product import match_product
from sparc.codegen.onnx.sites.shared import LOOKUP, readers, shared_codes, shares_columns
from sparc.codegen.onnx.types import onnx_type
from sparc.target import KernelUse

_BLOCKS = (16, 32, 64, 128)


def embedding(e: Emitter, node: fx.Node) -> ir.Value | None:
    """`decode(w)[indices]`, exact."""
    if str(node.target) != LOOKUP:
        return None
    weight = match_encoded(e.program, node.args[0])
    w = int_matrix(e, weight) if weight is not None else None
    if weight is None or w is None or str(weight.view) != "matrix":
        return None
    if shares_columns(e, w):
        e.carry(weight.site, KernelUse("Gather", 0))  # the products hold the codes
        return _gather_columns(e, w, node.args[1], node)
    if shares_blocks(e, w):
        e.carry(weight.site, KernelUse("GatherBlockQuantized", 0))
        return _gather_shared_blocks(e, w, node.args[1])
    result = _gather_blocks(e, w, node.args[1]) or _gather_codes(e, w, node.args[1], node)
    operator = "GatherBlockQuantized" if e.target.contrib and _fits_blocks(e, w) else "Gather"
    e.carry(weight.site, KernelUse(operator, w.code_bytes + w.grid_bytes))
    return result


def shares_blocks(e: Emitter, w: IntMatrix) -> bool:
    """Whether rows can be looked up in the very codes, scales and zero points that MatMulNBits reads."""
    block = block_size(w)
    if block not in _BLOCKS or w.shape[1] % block or w.weight.dtype != torch.float32 or "minimum" in w.grid.grid_names:
        return False
    sites = [match_product(e, node) for node in readers(e, w) if str(node.target) != LOOKUP]
    return bool(sites) and all(site is not None and multiplies_blocks(e, site) for site in sites)


def _gather_shared_blocks(e: Emitter, w: IntMatrix, indices: Any) -> ir.Value:
    block = block_size(w)
    assert block is not None
    parts = (blockwise_codes(w, block, rows=True), indices, blockwise_scale(w, block), blockwise_zero(w, block))
    made: ir.Value = e.op(
        "GatherBlockQuantized", *parts, domain=MS, gather_axis=0, quantize_axis=1, block_size=block, bits=w.grid.bits
    )
    return made


def _gather_columns(e: Emitter, w: IntMatrix, indices: Any, node: fx.Node) -> ir.Value:
    """Rows of 8-bit codes with a scale a row at most, from the transposed codes that products read."""
    rank = node.meta["val"].ndim - 1
    codes = e.op("Squeeze", e.op("Gather", shared_codes(w)[0], indices, axis=2), [0])
    rows = codes if not rank else e.op("Transpose", codes, perm=[*range(1, rank + 1), 0])
    numbers = e.op("Cast", rows, to=ir.DataType.FLOAT)
    zero, scale = w.zero_int8(), w.scale(torch.float32)
    if zero is not None:
        numbers = e.op("Sub", numbers, _of_rows(e, w, e.op("Cast", zero, to=ir.DataType.FLOAT), indices))
    numbers = e.op("Mul", numbers, _of_rows(e, w, scale, indices))
    return numbers if w.weight.dtype == torch.float32 else e.op("Cast", numbers, to=onnx_type(w.weight.dtype))


def _of_rows(e: Emitter, w: IntMatrix, value: ir.Value, indices: Any) -> ir.Value:
    """A float vector's entries of the gathered rows, on an axis of their own; a scalar as it is."""
    if w.part("scale").numel() == 1:
        return value
    return e.op("Unsqueeze", e.op("Gather", value, indices, axis=0), [-1])


def _fits_blocks(e: Emitter, w: IntMatrix) -> bool:
    group = w.grid.group
    return (
        e.target.contrib
        and isinstance(group, int)
        and group in _BLOCKS
        and w.shape[1] % group == 0
        and w.grid.bits in (4, 8)
        and (w.grid.symmetric or w.grid.zero == "integer")
        and (w.grid.bits == 4 or not w.grid.symmetric)
    )


def _gather_blocks(e: Emitter, w: IntMatrix, indices: Any) -> ir.Value | None:
    """ONNX Runtime's own operator, on the bytes that MatMulNBits reads."""
    if not _fits_blocks(e, w):
        return None
    scale = w.as_float(w.read("scale"))
    zero = None
    if not w.grid.symmetric:
        zero = w.read("zero", "pack4") if w.grid.bits == 4 else w.read("zero")
    return e.op(
        "GatherBlockQuantized", w.read("codes"), indices, scale, zero, domain=MS,
        gather_axis=0, quantize_axis=1, block_size=w.grid.group, bits=w.grid.bits,
    )  # fmt: skip


def _gather_codes(e: Emitter, w: IntMatrix, indices: Any, node: fx.Node) -> ir.Value:
    """The same from standard operators."""
    fake = node.meta["val"]
    lead, columns = list(fake.shape[:-1]), w.shape[1]
    codes = e.op("Gather", w.read("codes"), indices, axis=0)
    if w.grid.bits < 8:
        codes = unpacked(e, codes, w.grid.bits, lead, columns)
    numbers = e.op("Cast", codes, to=ir.DataType.FLOAT)
    if w.grid.bits < 8 and w.grid.symmetric:
        numbers = e.op("Add", numbers, e.const(float(w.grid.low), torch.float32))
    group = columns if w.per_channel else int(w.grid.group)  # type: ignore[arg-type]
    short = -columns % group
    if not w.per_channel:
        if short:
            numbers = e.op("Pad", numbers, e.sizes.vector([0, short]), None, [-1])
        numbers = e.reshape(numbers, [*lead, columns + short], [*lead, (columns + short) // group, group])
    if "zero" in w.grid.grid_names:
        numbers = e.op("Sub", numbers, _rows(e, w, "zero", indices))
    numbers = e.op("Mul", numbers, _rows(e, w, "scale", indices))
    if "minimum" in w.grid.grid_names:
        numbers = e.op("Add", numbers, _rows(e, w, "minimum", indices))
    if not w.per_channel:
        numbers = e.reshape(numbers, [*lead, (columns + short) // group, group], [*lead, columns + short])
        if short:
            numbers = e.op("Slice", numbers, [0], [columns], [-1])
    return numbers if w.weight.dtype == torch.float32 else e.op("Cast", numbers, to=onnx_type(w.weight.dtype))


def _rows(e: Emitter, w: IntMatrix, name: str, indices: Any) -> ir.Value:
    """The gathered rows' scales, zero points or minima, broadcasting over each group."""
    part = w.part(name)
    value = w.read(name) if w.grid.group != "tensor" else w.read(name, dims=())
    if math.prod(part.shape) > 1 and w.grid.group != "tensor":
        value = e.op("Gather", value, indices, axis=0)
    if value.dtype != ir.DataType.FLOAT:
        value = e.op("Cast", value, to=ir.DataType.FLOAT)
    return value if w.per_channel else e.op("Unsqueeze", value, [-1])
