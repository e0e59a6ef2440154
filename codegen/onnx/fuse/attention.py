"""Scaled dot-product attention as the standard operator `Attention` (opset 23)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import fx

from sparc.codegen.onnx.fuse.cached import plan_cached_attention
from sparc.codegen.onnx.fuse.contrib import plan_contrib_attention
from sparc.codegen.onnx.fuse.heads import put_merged, rows_of, same
from sparc.codegen.onnx.fuse.plan import Plan
from sparc.codegen.onnx.table.attention import counted_as_finite
from sparc.pattern import normalized_arguments

if TYPE_CHECKING:
    from sparc.codegen.onnx.emit import Emitter

_TYPES = {"cpu": (torch.float32, torch.float16)}
_ANY_TYPE = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Attention:
    """One attention.

    Args:
        node: the call.
        q: `[batch, heads, queries, size]`.
        k: `[batch, kv_heads, keys, size]`.
        v: `[batch, kv_heads, keys, v_size]`.
        mask: boolean (True where visible) or added to the scores; None for none.
        causal: whether query i sees the keys up to i only.
        scale: factor of the scores; None for `1 / sqrt(size)`.
        heads, kv_heads: how many.
    """

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    causal: bool
    scale: float | None
    heads: int
    kv_heads: int


def find_attention(node: fx.Node) -> Attention | None:
    """The attention that a node is; None where its shapes are not those of the standard operator."""
    if str(node.target) != "aten.scaled_dot_product_attention.default":
        return None
    given = normalized_arguments(node)
    q, k, v, mask = (given[name] for name in ("query", "key", "value", "attn_mask"))
    shapes = [each.meta["val"].shape for each in (q, k, v)]
    if given["dropout_p"] or any(len(shape) != 4 for shape in shapes):
        return None
    heads, kv_heads = shapes[0][1], shapes[1][1]
    if not isinstance(heads, int) or not isinstance(kv_heads, int) or heads % kv_heads:
        return None
    batches = all(same(shape[0], shapes[0][0]) for shape in shapes)
    grouped = given["enable_gqa"] or kv_heads in (1, heads)
    if not batches or not same(shapes[2][1], kv_heads) or not grouped:
        return None
    if mask is not None and not _fits(mask.meta["val"].shape, (*shapes[0][:3], shapes[1][2])):
        return None
    return Attention(node, q, k, v, mask, given["is_causal"], given["scale"], heads, kv_heads)


def _fits(mask: Any, scores: Any) -> bool:
    """Whether a mask broadcasts to the scores axis by axis."""
    return 2 <= len(mask) <= 4 and all(same(m, 1) or same(m, s) for m, s in zip(mask[::-1], scores[::-1], strict=False))


def plan_attention(plan: Plan, node: fx.Node) -> None:
    """Translate an attention by one operator: on rows where all heads were split from rows, else on split heads."""
    found, flavour = find_attention(node), plan.target.flavour
    if found is None or (found.scale is not None and found.scale <= 0):
        return
    if found.q.meta["val"].dtype not in _TYPES.get(flavour, _ANY_TYPE):
        return
    if flavour == "cuda":
        plan_contrib_attention(plan, found)
        return
    if plan.target.opset < 23 or plan_cached_attention(plan, found):
        return
    rows = [rows_of(plan, each, 1) for each in (found.q, found.k, found.v)]
    if any(each is None for each in rows):
        plan.put(node, lambda e: _operator(e, found, found.q, found.k, found.v))
        return

    def attended(e: "Emitter") -> ir.Value:
        operands = [each(e) for each in rows]  # type: ignore[misc]
        return _operator(e, found, *operands, q_num_heads=found.heads, kv_num_heads=found.kv_heads)

    put_merged(plan, node, attended, found.heads, int(found.v.meta["val"].shape[3]))


def _operator(e: "Emitter", found: Attention, q: Any, k: Any, v: Any, **heads: Any) -> ir.Value:
    made: ir.Value = e.op(
        "Attention",
        q,
        k,
        v,
        None if found.mask is None else additive(e, found, found.mask),
        is_causal=int(found.causal) or None,
        scale=found.scale,
        **heads,
    )
    return made


def additive(e: "Emitter", found: Attention, mask: fx.Node) -> ir.Value:
    """The mask as numbers to add, with a row for every query.

    ONNX Runtime gives zero for a row that hides every key by the lowest finite number, as for -inf; torch does not.
    """
    fake, q, k = mask.meta["val"], found.q.meta["val"], found.k.meta["val"]
    dtype = q.dtype
    value = e.value(mask)
    if fake.dtype == torch.bool:
        value = e.op("Where", value, e.const(0, dtype), e.const(float("-inf"), dtype))
    else:
        value = counted_as_finite(e, e.cast(mask, dtype), dtype)
    if same(fake.shape[-2], q.shape[2]) and same(fake.shape[-1], k.shape[2]):
        return value
    wide: ir.Value = e.op("Expand", value, [*[1] * (fake.ndim - 2), q.shape[2], k.shape[2]])
    return wide
