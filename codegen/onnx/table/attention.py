"""Scaled dot-product attention from standard operators."""

import math

import onnx_ir as ir
import torch
from torch import fx

from sparc.codegen.onnx.emit import Emitter, Translation
from sparc.codegen.onnx.table.create import counted


def attention(
    e: Emitter,
    node: fx.Node,
    q: fx.Node,
    k: fx.Node,
    v: fx.Node,
    attn_mask: fx.Node | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> ir.Value:
    """`softmax(scale * q @ k.T + mask) @ v`, q `[..., heads, queries, size]`, k and v `[..., kv_heads, keys, size]`.

    A row without a visible key gives zeros, as in torch. Masked scores get a large finite penalty: an infinite one
    would make such rows NaN, and NaN spreads.
    """
    fake = q.meta["val"]
    dtype, scale = fake.dtype, 1 / math.sqrt(fake.shape[-1]) if scale is None else scale
    keys, values = (grouped(e, each, fake) if enable_gqa else e.value(each) for each in (k, v))
    order = [*range(fake.ndim - 2), fake.ndim - 1, fake.ndim - 2]
    scores = e.op("MatMul", q, transposed(e, keys, order))
    if scale != 1:
        scores = e.op("Mul", scores, e.const(scale, dtype))
    if is_causal:
        scores = e.op("Add", scores, penalty(e, causality(e, q, k), dtype))
    if attn_mask is None:
        return e.op("MatMul", e.op("Softmax", scores, axis=-1), values)
    visible, added = mask_terms(e, unexpanded(attn_mask), dtype)
    result = e.op("MatMul", e.op("Softmax", e.op("Add", scores, added), axis=-1), values)
    return e.op("Mul", result, visible_rows(e, visible, dtype))


def mask_terms(e: Emitter, mask: fx.Node, dtype: torch.dtype) -> tuple[ir.Value, ir.Value]:
    """Which keys a mask shows, as booleans; and what to add to the scores, all of it finite."""
    if mask.meta["val"].dtype == torch.bool:
        return e.value(mask), penalty(e, e.value(mask), dtype)
    given = e.cast(mask, dtype)
    visible = e.op("Greater", given, e.const(-math.inf, dtype))
    return visible, e.op("Max", counted_as_finite(e, given, dtype), e.const(0.75 * torch.finfo(dtype).min, dtype))


def causality(e: Emitter, q: fx.Node, k: fx.Node) -> ir.Value:
    """Which key each query sees: those up to its own position, as booleans `[queries, keys]`."""
    rows, columns = (counted(e, each.meta["val"].shape[-2]) for each in (q, k))
    return e.op("GreaterOrEqual", e.op("Unsqueeze", rows, [1]), columns)


def unexpanded(mask: fx.Node) -> fx.Node:
    """The mask before it was broadcast without need."""
    while str(mask.target) == "aten.expand.default":
        inner = mask.args[0]
        assert isinstance(inner, fx.Node)
        if inner.meta["val"].ndim != mask.meta["val"].ndim:
            break
        mask = inner
    return mask


def penalty(e: Emitter, visible: ir.Value, dtype: torch.dtype) -> ir.Value:
    """0 where a key is visible, half the least finite number elsewhere."""
    return e.op("Where", visible, e.const(0, dtype), e.const(torch.finfo(dtype).min / 2, dtype))


def counted_as_finite(e: Emitter, bias: ir.Value, dtype: torch.dtype) -> ir.Value:
    """A bias whose lowest finite numbers are halved: they hide as well, and stay far from what stands for -inf.

    A row hidden by them throughout gives the plain mean, as in torch; one hidden by -inf gives zero.
    """
    lowest = torch.finfo(dtype).min
    found: ir.Value = e.op("Where", e.op("Equal", bias, e.const(lowest, dtype)), e.const(lowest / 2, dtype), bias)
    return found


def visible_rows(e: Emitter, visible: ir.Value, dtype: torch.dtype) -> ir.Value:
    """1 for queries that see a key, 0 for the others."""
    return e.op("ReduceMax", e.op("Cast", visible, to=e.const(0, dtype).dtype), [-1], keepdims=1)


def grouped(e: Emitter, x: fx.Node, like: torch.Tensor) -> ir.Value:
    """Key or value heads repeated to the number of query heads."""
    fake = x.meta["val"]
    heads, groups = fake.shape[-3], like.shape[-3] // fake.shape[-3]
    if groups == 1:
        return e.value(x)
    lead, tail = list(fake.shape[:-3]), list(fake.shape[-2:])
    wide = e.op("Unsqueeze", x, [-3])
    wide = e.op("Expand", wide, [1] * (len(lead) + 1) + [groups, 1, 1])
    return e.reshape(wide, [*lead, heads, groups, *tail], [*lead, heads * groups, *tail])


def transposed(e: Emitter, value: ir.Value, order: list[int]) -> ir.Value:
    """Axes in another order, merged with a transposition that made the value."""
    producer = value.producer()
    if producer is not None and producer.op_type == "Transpose" and producer.domain == "":
        inner = list(producer.attributes["perm"].as_ints())
        return e.op("Transpose", producer.inputs[0], perm=[inner[axis] for axis in order])
    return e.op("Transpose", value, perm=order)


TABLE: dict[str, Translation] = {"aten.scaled_dot_product_attention.default": attention}
