"""Attention over a cache: the operator appends the new keys and values itself and gives the grown cache back."""

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import fx

from sparc import codes
from sparc.analysis.causal_mask import CausalMask, read_causal_mask
from sparc.cache import MASK, TOKENS
from sparc.codegen.onnx.fuse.heads import put_merged, rows_of, same
from sparc.codegen.onnx.fuse.plan import Emit, Plan
from sparc.codegen.onnx.fuse.projected import find_projected, rotation
from sparc.program import location

if TYPE_CHECKING:
    from sparc.codegen.onnx.emit import Emitter
    from sparc.codegen.onnx.fuse.attention import Attention

aten = torch.ops.aten
_MS = "com.microsoft"
_KEYS, _WIDTH = 2, 8


@dataclass(frozen=True)
class Cached:
    """Attention of new queries to a cache and to their own keys.

    Args:
        attention: the attention over the joined keys and values, whose `k` and `v` are the new ones alone.
        past: the cached keys and values, `[batch, kv_heads, past, size]`, inputs.
        present: the joined ones, `[batch, kv_heads, past + queries, size]`.
    """

    attention: "Attention"
    past: tuple[fx.Node, fx.Node]
    present: tuple[fx.Node, fx.Node]


def find_cached(found: "Attention") -> Cached | None:
    """The attention over a cache that an attention is; None where it joins no inputs to its keys and values."""
    keys, values = _joined(found.k), _joined(found.v)
    if keys is None or values is None or found.mask is None or found.causal:
        return None
    (past_k, k), (past_v, v) = keys, values
    if not same(k.meta["val"].shape[_KEYS], found.q.meta["val"].shape[_KEYS]):
        return None
    return Cached(replace(found, k=k, v=v), (past_k, past_v), (found.k, found.v))


def _joined(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The input and the new part of `cat([input, new], 2)`, which one attention reads."""
    if node.target is not aten.cat.default or len(node.args) < 2 or int(node.args[1]) % 4 != _KEYS:  # type: ignore[arg-type]
        return None
    parts: Any = node.args[0]
    if len(parts) != 2 or parts[0].op != "placeholder" or sum(user.op != "output" for user in node.users) != 1:
        return None
    return parts[0], parts[1]


def plan_cached_attention(plan: Plan, found: "Attention") -> bool:
    """Translate an attention over a cache: `GroupQueryAttention` where its mask is proved, else `Attention`."""
    cached = find_cached(found)
    if cached is None:
        return False
    padding = plan.inputs.get(MASK)
    why = _reason(plan, cached, padding)
    if why or padding is None:
        _put(plan, cached, _standard(plan, cached, why))
        return True
    mask = read_causal_mask(plan.program, found.mask, padding, cached.past[0].meta["val"].shape[_KEYS])  # type: ignore[arg-type]
    if mask is None:
        _put(plan, cached, _standard(plan, cached, "its mask is not proved to be causal"))
    else:
        _put(plan, cached, _grouped(plan, cached, mask, padding))
    return True


def _reason(plan: Plan, cached: Cached, padding: fx.Node | None) -> str:
    """Why an attention's shapes are not those of `GroupQueryAttention`; empty when they are."""
    attention = cached.attention
    sizes = [each.meta["val"].shape[3] for each in (attention.q, attention.k, attention.v)]
    if plan.target.flavour != "cpu" or padding is None or plan.entry.cache is None:
        return "the entry has no mask over its cache"
    if any(size != sizes[0] for size in sizes) or int(sizes[0]) % _WIDTH:
        return f"heads have {', '.join(map(str, sizes))} elements, not a common multiple of {_WIDTH}"
    assert attention.mask is not None
    return "its mask is made of numbers" if attention.mask.meta["val"].dtype != torch.bool else ""


def _put(plan: Plan, cached: Cached, emit: Any) -> None:
    """Translate the attention and the grown cache by one operator's outputs."""
    for index, node in enumerate(cached.present, start=1):
        plan.put(node, partial(_output, emit, index))
        plan.absorb(node)
    attention = cached.attention
    put_merged(plan, attention.node, partial(_output, emit, 0), attention.heads, int(attention.v.meta["val"].shape[3]))


def _output(emit: Any, index: int, e: "Emitter") -> ir.Value:
    made: ir.Value = emit(e)[index]
    return made


def _rows(plan: Plan, node: fx.Node) -> Emit:
    """Heads on axis 1 as rows, moved there if need be."""
    known = rows_of(plan, node, 1)
    if known is not None:
        return known
    heads, size = node.meta["val"].shape[1], node.meta["val"].shape[3]
    return lambda e: e.op("Reshape", e.op("Transpose", node, perm=[0, 2, 1, 3]), [0, 0, heads * size])


def _standard(plan: Plan, cached: Cached, why: str) -> Any:
    from sparc.codegen.onnx.fuse.attention import additive

    attention = cached.attention
    rows = [_rows(plan, each) for each in (attention.q, attention.k, attention.v)]

    def emit(e: "Emitter") -> Any:
        if plan.entry.cache is not None:
            e.diagnostics.remark(
                codes.PLAIN_CACHE_ATTENTION, codes.PLAIN_CACHE_ATTENTION.title, where=location(attention.node), why=why
            )
        assert attention.mask is not None
        mask = additive(e, replace(attention, k=cached.present[0]), attention.mask)
        return e.op(
            "Attention", *(each(e) for each in rows), mask, *cached.past, outputs=3,
            scale=attention.scale, q_num_heads=attention.heads, kv_num_heads=attention.kv_heads,
        )  # fmt: skip

    return emit


def _grouped(plan: Plan, cached: Cached, mask: CausalMask, padding: fx.Node) -> Any:
    """ONNX Runtime's operator knows causality and windows; what `padding` hides is added to the scores as -inf.

    Sequence lengths come from the shape of `padding`, so that the cache may be longer than what it holds.
    """
    attention = cached.attention
    projected = find_projected(plan, attention)
    plain = tuple(_rows(plan, each) for each in (attention.q, attention.k, attention.v))
    rows, rotary = (projected.rows, projected.rotary) if projected is not None else (plain, None)
    options = {
        "num_heads": attention.heads,
        "kv_num_heads": attention.kv_heads,
        "scale": attention.scale,
        "local_window_size": mask.window,
        "do_rotary": None if rotary is None else 1,
    }

    def emit(e: "Emitter") -> Any:
        batch, queries = attention.q.meta["val"].shape[0], attention.q.meta["val"].shape[2]
        places = e.op("Shape", padding, start=1, end=2)
        total = e.op("Cast", places, to=ir.DataType.INT32)
        turns = [None] * 3 if rotary is None else rotation(e, rotary, plan.inputs[TOKENS], places)
        given = [*(each(e) for each in rows), *[None] * (3 - len(rows))]
        last = e.op("Expand", e.op("Sub", total, e.const([1], torch.int32)), [batch])
        bias = _bias(e, padding, queries, attention.q.meta["val"].dtype) if mask.padded else None
        return e.op(
            "GroupQueryAttention", *given, *cached.past, last, total, *turns, bias,
            domain=_MS, outputs=3, **options,
        )  # fmt: skip

    return emit


def _bias(e: "Emitter", padding: fx.Node, queries: Any, dtype: torch.dtype) -> ir.Value:
    """`[batch, 1, queries, keys]`: 0 where a key is visible, else -inf. Made once for all layers."""
    hidden = e.op("Equal", padding, e.const(0, padding.meta["val"].dtype))
    added = e.op("Where", hidden, e.const(float("-inf"), dtype), e.const(0, dtype))
    # the size is read off the tokens: a tensor of this shape may itself have been made from the cache's length
    wide = e.op("Concat", e.sizes.length(queries), e.const([1], torch.int64), axis=0)
    bias: ir.Value = e.op("Expand", e.op("Unsqueeze", added, [1, 2]), wide)
    return bias
