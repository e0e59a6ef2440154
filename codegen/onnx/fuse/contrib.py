"""Attention and rotary embeddings by ONNX Runtime's own operators, which its CUDA provider runs fused.

Its CUDA kernel of the standard `Attention` refuses groups of heads in float32 and masks on groups, so it is not used.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from sparc.codegen.onnx.fuse.heads import put_merged, rows_of, same
from sparc.codegen.onnx.fuse.plan import Emit, Plan
from sparc.codegen.onnx.table.attention import counted_as_finite, penalty, visible_rows

if TYPE_CHECKING:
    from sparc.codegen.onnx.emit import Emitter
    from sparc.codegen.onnx.fuse.attention import Attention

_MS = "com.microsoft"
_HALF = (torch.float16, torch.bfloat16)


def plan_contrib_attention(plan: Plan, found: "Attention") -> None:
    """`MultiHeadAttention`, or causal `GroupQueryAttention` in half precision; both work on rows."""
    rows = [rows_of(plan, each, 1) for each in (found.q, found.k, found.v)]
    shapes = [each.meta["val"].shape for each in (found.q, found.k, found.v)]
    square = same(shapes[0][2], shapes[1][2])
    if any(each is None for each in rows) or (found.causal and not square):
        return
    if found.heads == found.kv_heads:
        emit = _multi_head(found, rows)
    elif found.causal and found.q.meta["val"].dtype in _HALF and same(shapes[0][3], shapes[2][3]):
        emit = _grouped(found, rows)
    else:
        return
    put_merged(plan, found.node, emit, found.heads, int(shapes[2][3]))


def _multi_head(found: "Attention", rows: list[Any]) -> Emit:
    def emit(e: "Emitter") -> ir.Value:
        q, k, v = (each(e) for each in rows)
        bias, visible = (None, None) if found.mask is None else _bias(e, found, found.mask)
        options: dict[str, Any] = {"num_heads": found.heads, "scale": found.scale}
        options |= {"unidirectional": int(found.causal) or None}
        result = e.op("MultiHeadAttention", q, k, v, None, None, bias, domain=_MS, **options)
        return result if visible is None else _shown(e, found, result, visible)

    return emit


def _grouped(found: "Attention", rows: list[Any]) -> Emit:
    """The operator wants to know each sequence's length, less one: all have the full one."""

    def emit(e: "Emitter") -> ir.Value:
        q, k, v = (each(e) for each in rows)
        batch, _, length, _ = found.q.meta["val"].shape
        total = e.op("Cast", e.sizes.scalar(length), to=ir.DataType.INT32)
        last = e.op("Sub", total, e.const(1, torch.int32))
        lengths = e.op("Expand", e.op("Unsqueeze", last, [0]), [batch])
        options: dict[str, Any] = {"num_heads": found.heads, "kv_num_heads": found.kv_heads, "scale": found.scale}
        outputs = e.op("GroupQueryAttention", q, k, v, None, None, lengths, total, domain=_MS, outputs=3, **options)
        result: ir.Value = outputs[0]
        return result

    return emit


def _bias(e: "Emitter", found: "Attention", mask: fx.Node) -> tuple[ir.Value, ir.Value]:
    """What is added to the scores, `[1 or batch, 1 or heads, queries, keys]`, and what is visible.

    Hidden scores stay finite, since CUDA kernels make rows of -inf NaN.
    """
    fake, q, k = mask.meta["val"], found.q.meta["val"], found.k.meta["val"]
    dtype = q.dtype
    if fake.dtype == torch.bool:
        visible = e.value(mask)
        added = penalty(e, visible, dtype)
    else:
        given = e.cast(mask, dtype)
        visible = e.op("Greater", given, e.const(float("-inf"), dtype))
        added = e.op("Max", counted_as_finite(e, given, dtype), e.const(0.75 * torch.finfo(dtype).min, dtype))
    lead = list(range(4 - fake.ndim))
    if lead:
        added, visible = e.op("Unsqueeze", added, lead), e.op("Unsqueeze", visible, lead)
    if not (same(fake.shape[-2], q.shape[2]) and same(fake.shape[-1], k.shape[2])):
        added = e.op("Expand", added, [1, 1, q.shape[2], k.shape[2]])
    return added, visible


def _shown(e: "Emitter", found: "Attention", rows: ir.Value, visible: ir.Value) -> ir.Value:
    """Rows `[batch, queries, heads * size]` with zeros where a query sees no key."""
    assert found.mask is not None
    fake, size = found.mask.meta["val"], found.v.meta["val"].shape[3]
    seen = visible_rows(e, visible, found.q.meta["val"].dtype)
    if fake.ndim < 3 or same(fake.shape[-3], 1):
        result: ir.Value = e.op("Mul", rows, e.op("Squeeze", seen, [1]))
        return result
    apart = e.op("Reshape", rows, [0, 0, found.heads, size])
    apart = e.op("Mul", apart, e.op("Transpose", seen, perm=[0, 2, 1, 3]))
    merged: ir.Value = e.op("Reshape", apart, [0, 0, found.heads * size])
    return merged


def contrib_rotary(e: "Emitter", x: ir.Value, cos: ir.Value, sin: ir.Value, **options: Any) -> ir.Value:
    """`RotaryEmbedding` at positions 0, 1, ... of tables `[1, length, width / 2]`."""
    cos, sin = e.op("Squeeze", cos, [0]), e.op("Squeeze", sin, [0])
    start = e.const(np.zeros(1), torch.int64)
    made: ir.Value = e.op("RotaryEmbedding", x, start, cos, sin, domain=_MS, **options)
    return made
