"""Rotary position embeddings: `x * cos + rotate_half(x) * sin` as `RotaryEmbedding`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import fx

from sparc.codegen.onnx.fuse.contrib import contrib_rotary
from sparc.codegen.onnx.fuse.heads import put_merged, rows_of, same, split
from sparc.codegen.onnx.fuse.plan import Plan
from sparc.pattern import match, trace
from sparc.program import Program, is_weight

if TYPE_CHECKING:
    from sparc.codegen.onnx.emit import Emitter

aten = torch.ops.aten
_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_POINTWISE = (
    *(aten.cos.default, aten.sin.default, aten.to.dtype, aten.neg.default, aten.clone.default),
    *(aten.mul.Scalar, aten.mul.Tensor, aten.div.Tensor, aten.embedding.default, aten.expand.default),
)
_ALONG = (
    *(aten.unsqueeze.default, aten.slice.Tensor, aten.select.int, aten.index_select.default),
    aten.index.Tensor,
)

_HALVES = trace(
    lambda op, x, cos, sin, d, e, low, high, half, far: op.add(
        op.mul(x, cos),
        op.mul(op.cat([op.neg(op.slice(x, d, half, far)), op.slice(x, d, low, high)], e), sin),
    )
)


def _paired(op: Any, x: Any, d: Any, low: Any, high: Any, half: Any, far: Any) -> Any:
    """Neighbours exchanged, the second one negated."""
    swapped = op.stack([op.neg(op.slice(x, d, half, far, 2)), op.slice(x, d, low, high, 2)], -1)
    return op.either(op.flatten(swapped, -2), op.flatten(swapped, 3), op.reshape(swapped, op.any()))


_PAIRS = trace(
    lambda op, x, cos, sin, d, low, high, half, far: op.add(
        op.mul(x, cos), op.mul(_paired(op, x, d, low, high, half, far), sin)
    )
)
_PARTIAL = trace(lambda op, turned, x, d, e, low, far: op.cat([turned, op.slice(x, d, low, far)], e))


@dataclass(frozen=True)
class Rotary:
    """A rotary embedding.

    Args:
        x: what is turned, 4-D.
        cos, sin: factors that broadcast to it; 4-D, one head.
        axis: where the heads lie.
        pairs: whether neighbours are turned together, instead of an element of each half.
        width: how many leading elements of a head are turned.
        nodes: what computes it, the result last.
    """

    x: fx.Node
    cos: fx.Node
    sin: fx.Node
    axis: int
    pairs: bool
    width: int
    nodes: tuple[fx.Node, ...]


def plan_rotary(plan: Plan, node: fx.Node) -> None:
    """Translate a rotary embedding by one operator, on rows where the heads were split from rows."""
    found = find_rotary(plan.program, node)
    if found is None or not _available(plan, found):
        return
    rotary = find_partial(found) or found
    heads, size = rotary.x.meta["val"].shape[rotary.axis], rotary.x.meta["val"].shape[3]
    rows = rows_of(plan, rotary.x, rotary.axis)
    root = rotary.nodes[-1]
    plan.absorb(*rotary.nodes)
    plan.rotations[root] = rotary
    if rows is None or not isinstance(heads, int):
        if rotary.axis == 1:
            plan.put(root, lambda e: rotated(e, rotary, e.value(rotary.x)))
        return

    def turned(e: "Emitter") -> ir.Value:
        return rotated(e, rotary, e.value(rows(e)), heads)

    if rotary.axis == 1:
        put_merged(plan, root, turned, heads, size)
    else:
        plan.put(root, lambda e: split(e, turned(e), heads, size, 2))
        plan.put_rows(root, 2, turned)


def _available(plan: Plan, rotary: Rotary) -> bool:
    """The standard operator needs opset 23; for CUDA there is an older one, whose factors are the same for all rows."""
    if plan.target.flavour != "cuda":
        return plan.target.opset >= 23
    return all(same(each.meta["val"].shape[0], 1) for each in (rotary.cos, rotary.sin))


def find_rotary(program: Program, node: fx.Node) -> Rotary | None:
    """The rotary embedding that ends in a node, over all of its input's last axis."""
    if node.target is not aten.add.Tensor:
        return None
    for pairs, pattern in ((False, _HALVES), (True, _PAIRS)):
        found = match(pattern, node)
        if found is None:
            continue
        v = found.values
        x, cos, sin = v["x"], v["cos"], v["sin"]
        if not all(isinstance(each, fx.Node) and each.meta["val"].ndim == 4 for each in (x, cos, sin)):
            continue
        shape, kind = x.meta["val"].shape, x.meta["val"].dtype
        axis = head_axis(shape, cos.meta["val"].shape)
        if axis is None or axis != head_axis(shape, sin.meta["val"].shape) or kind not in _TYPES:
            continue
        size = int(shape[3])
        if size % 2 or not _turns(v, size, pairs):
            continue
        if any(each.meta["val"].dtype != kind or not repeats(program, each, pairs) for each in (cos, sin)):
            continue
        return Rotary(x, cos, sin, axis, pairs, size, (*(each for each in found.nodes if each is not node), node))
    return None


def _turns(v: Mapping[str, Any], size: int, pairs: bool) -> bool:
    """Whether the bounds of a match are those of its halves, or of every other element."""
    ends = (v["far"], v["high"]) if pairs else (v["far"],)
    if v["d"] % 4 != 3 or (v["low"] or 0) != 0 or any(end is not None and end < size for end in ends):
        return False
    return v["half"] == 1 if pairs else v["high"] == v["half"] == size // 2 and v["e"] in (-1, 3)


def head_axis(x: Any, factor: Any) -> int | None:
    """The axis over whose entries a factor `[1 or batch, ..., size]` repeats: 1 or 2."""
    if not same(x[3], factor[3]) or not isinstance(x[3], int) or not (same(factor[0], 1) or same(factor[0], x[0])):
        return None
    for axis in (1, 2):
        if same(factor[axis], 1) and same(factor[3 - axis], x[3 - axis]):
            return axis
    return None


def find_partial(rotary: Rotary) -> Rotary | None:
    """The embedding of whole heads where only the first elements turn: `cat(turned(x[..., :n]), x[..., n:])`."""
    source = rotary.x
    if source.target is not aten.slice.Tensor or int(source.args[1]) % 4 != 3:  # type: ignore[arg-type]
        return None
    whole, start = source.args[0], source.args[2]
    users = list(rotary.nodes[-1].users)
    found = match(_PARTIAL, users[0]) if len(users) == 1 else None
    if found is None or start not in (0, None) or not isinstance(whole, fx.Node):
        return None
    v = found.values
    size = whole.meta["val"].shape[3]
    ends = v["x"] is whole and v["turned"] is rotary.nodes[-1] and v["low"] == rotary.width
    if not ends or v["d"] % 4 != 3 or v["e"] not in (-1, 3) or (v["far"] is not None and v["far"] < size):
        return None
    nodes = (*rotary.nodes, source, *found.nodes)
    last = users[0]
    ordered = (*dict.fromkeys(each for each in nodes if each is not last), last)
    return Rotary(whole, rotary.cos, rotary.sin, rotary.axis, rotary.pairs, rotary.width, ordered)


def repeats(program: Program, node: Any, pairs: bool) -> bool:
    """Whether a tensor's last axis is proved to hold everything twice: equal halves, or (`pairs`) equal neighbours."""
    if is_weight(node):
        table = torch.atleast_1d(program.weights[str(node.target)])
        half = table.shape[-1] // 2
        first, second = (table[..., ::2], table[..., 1::2]) if pairs else (table[..., :half], table[..., half:])
        return torch.equal(first, second)
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    args: tuple[Any, ...] = node.args
    last = (-1, node.meta["val"].ndim - 1) if isinstance(node.meta["val"], torch.Tensor) else ()
    if node.target is aten.cat.default:
        return not pairs and args[1:] in [(axis,) for axis in last] and len(args[0]) == 2 and args[0][0] is args[0][1]
    if node.target is aten.repeat_interleave.self_int:
        return pairs and args[1:] in [(2, axis) for axis in last]
    if node.target in (aten.mul.Tensor, aten.div.Tensor) and not _is_number(args[1]):
        return False
    kept = node.target in _POINTWISE or (node.target in _ALONG and _spares_last_axis(node))
    return kept and repeats(program, args[0], pairs)


def _spares_last_axis(node: fx.Node) -> bool:
    """Whether an operator on an axis, or with indices, leaves the last axis of its first argument whole."""
    if node.target is aten.index.Tensor:
        return len(node.args[1]) < node.args[0].meta["val"].ndim  # type: ignore[arg-type,union-attr]
    widest = max(each.meta["val"].ndim for each in (node, node.args[0]))  # type: ignore[union-attr]
    return int(node.args[1]) % widest != widest - 1  # type: ignore[arg-type]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (is_weight(value) and value.meta["val"].numel() == 1)


def rotated(e: "Emitter", rotary: Rotary, x: ir.Value, heads: int | None = None) -> ir.Value:
    """`RotaryEmbedding` of rows (with their number of heads), or of a 4-D value."""
    size = rotary.x.meta["val"].shape[3]
    options: dict[str, Any] = {
        "num_heads": heads,
        "interleaved": int(rotary.pairs) or None,
        "rotary_embedding_dim": rotary.width if rotary.width != size else None,
    }
    cos, sin = factor(e, rotary, rotary.cos), factor(e, rotary, rotary.sin)
    if e.target.flavour == "cuda":
        if rotary.width != size:
            options["num_heads"] = rotary.x.meta["val"].shape[rotary.axis]
        return contrib_rotary(e, x, cos, sin, **options)
    batch = rotary.x.meta["val"].shape[0]
    if not same(rotary.cos.meta["val"].shape[0], batch):
        cos = e.op("Expand", cos, [batch, 1, 1])
    if not same(rotary.sin.meta["val"].shape[0], batch):
        sin = e.op("Expand", sin, [batch, 1, 1])
    made: ir.Value = e.op("RotaryEmbedding", x, cos, sin, **options)
    return made


def factor(e: "Emitter", rotary: Rotary, node: fx.Node) -> ir.Value:
    """Cosines or sines once each, `[1 or batch, length, width / 2]`: every one belongs to two elements."""
    inner = node.args[0] if node.target is aten.unsqueeze.default else None
    if isinstance(inner, fx.Node) and int(node.args[1]) % 4 == rotary.axis:  # type: ignore[arg-type]
        value = e.value(inner)
    else:
        value = e.op("Squeeze", node, [rotary.axis])
    if rotary.pairs:
        once: ir.Value = e.op("Slice", value, [0], [rotary.width], [2], [2])
    else:
        once = e.op("Slice", value, [0], [rotary.width // 2], [2])
    return once
