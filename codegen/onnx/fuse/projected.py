"""What `GroupQueryAttention` does before it attends: cut one product into queries, keys and values, and rotate them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import fx

from sparc.cache import TOKENS
from sparc.codegen.onnx.fuse.heads import rows_of, same, swaps_heads
from sparc.codegen.onnx.fuse.plan import Emit, Plan
from sparc.codegen.onnx.fuse.rotary import Rotary

if TYPE_CHECKING:
    from sparc.codegen.onnx.emit import Emitter
    from sparc.codegen.onnx.fuse.attention import Attention

aten = torch.ops.aten
_RESHAPES = (aten.reshape.default, aten.view.default)
_MULTIPLE = 16
_FAR = 1 << 40


@dataclass(frozen=True)
class Projected:
    """Queries, keys and values before they are rotated.

    Args:
        rows: each as rows `[batch, length, heads * size]`; one, if they are one product.
        rotary: the rotation of queries and keys; None for none.
    """

    rows: tuple[Emit, ...]
    rotary: Rotary | None


def find_projected(plan: Plan, found: "Attention") -> Projected | None:
    """What an attention's operator can do itself; None when that is nothing."""
    q, k = _rotary(plan, found.q), _rotary(plan, found.k)
    if (q is None) != (k is None):
        return None
    if q is None or k is None:
        inner = [(found.q, 1), (found.k, 1), (found.v, 1)]
    elif _alike(q, k) and _rotates(plan, q):
        inner = [(q.x, q.axis), (k.x, k.axis), (found.v, 1)]
    else:
        return None
    whole = _whole([_source(node, axis) for node, axis in inner])
    if whole is not None:
        return Projected((lambda e: e.value(whole),), q)
    rows = [rows_of(plan, node, axis) for node, axis in inner]
    return None if q is None or any(each is None for each in rows) else Projected(tuple(rows), q)  # type: ignore[arg-type]


def _rotary(plan: Plan, node: fx.Node) -> Rotary | None:
    """The rotation that a node, with heads on axis 1, is the result of."""
    if node in plan.rotations:
        return plan.rotations[node] if plan.rotations[node].axis == 1 else None
    inner: Any = node.args[0] if swaps_heads(node) else None
    found = plan.rotations.get(inner)
    return found if found is not None and found.axis == 2 else None


def _rotates(plan: Plan, rotary: Rotary) -> bool:
    """Whether the operator knows a rotation: halves turned in multiples of 16, by angles of each sequence's own."""
    found = angles(rotary)
    if found is None or rotary.pairs or TOKENS not in plan.inputs:
        return False
    shape, tokens = found.meta["val"].shape, plan.inputs[TOKENS].meta["val"].shape
    fits = int(rotary.x.meta["val"].shape[3]) % _MULTIPLE == 0 and rotary.width % _MULTIPLE == 0
    return fits and len(tokens) == 2 and same(tuple(shape), (*tokens, rotary.width // 2))


def _alike(q: Rotary, k: Rotary) -> bool:
    return (q.cos, q.sin, q.pairs, q.width, q.axis) == (k.cos, k.sin, k.pairs, k.width, k.axis)


def _source(node: fx.Node, axis: int) -> fx.Node | None:
    """The rows that heads were split from; None where they were not."""
    if axis == 1:
        if not swaps_heads(node):
            return None
        node = node.args[0]  # type: ignore[assignment]
    if node.target not in _RESHAPES:
        return None
    source: Any = node.args[0]
    shape = node.meta["val"].shape
    return source if same(tuple(source.meta["val"].shape), (*shape[:2], shape[2] * shape[3])) else None


def _whole(pieces: list[fx.Node | None]) -> fx.Node | None:
    """The value whose last axis is exactly these pieces, one behind the other."""
    found = [_piece(each) for each in pieces if each is not None]
    if len(found) < len(pieces) or any(each is None or each[0] is not found[0][0] for each in found):  # type: ignore[index]
        return None
    base, end = found[0][0], 0  # type: ignore[index]
    for piece, (_, start) in zip(pieces, found, strict=True):  # type: ignore[misc]
        if start != end:
            return None
        end += int(piece.meta["val"].shape[-1])  # type: ignore[union-attr]
    return base if same(base.meta["val"].shape[-1], end) else None


def _piece(node: fx.Node) -> tuple[fx.Node, int] | None:
    """What a node is cut from along the last axis, and where it starts."""
    args: Any = node.args
    if (
        node.target is aten.slice.Tensor
        and len(args) < 5
        and args[1] % args[0].meta["val"].ndim == args[0].meta["val"].ndim - 1
    ):
        return args[0], args[2] or 0
    pieces = args[0] if str(getattr(node.target, "__name__", "")) == "getitem" else None
    if isinstance(pieces, fx.Node) and pieces.target is aten.split_with_sizes.default:
        base, sizes, axis = (*pieces.args, 0)[:3]
        if _is_last(axis, base):
            return base, sum(sizes[: args[1]])  # type: ignore[return-value,index,arg-type]
    return None


def _is_last(axis: Any, node: Any) -> bool:
    rank: int = node.meta["val"].ndim
    return bool(axis % rank == rank - 1)


def angles(rotary: Rotary) -> fx.Node | None:
    """The angles `[batch, length, width / 2]` of a rotation by their cosines and sines; None for other factors."""
    found = [
        _angles(each, fn, rotary.axis) for each, fn in ((rotary.cos, aten.cos.default), (rotary.sin, aten.sin.default))
    ]
    return found[0] if found[0] is found[1] else None


def _angles(node: fx.Node, function: Any, axis: int) -> fx.Node | None:
    """The `f` of `unsqueeze(function(cat([f, f], -1)), axis)`."""
    inner: Any = node.args[0] if node.target is aten.unsqueeze.default and node.args[1] == axis else None
    both: Any = inner.args[0] if isinstance(inner, fx.Node) and inner.target is function else None
    if not isinstance(both, fx.Node) or both.target is not aten.cat.default or both.args[1:] not in ((-1,), (2,)):
        return None
    parts: Any = both.args[0]
    return parts[0] if len(parts) == 2 and parts[0] is parts[1] else None


def rotation(e: "Emitter", rotary: Rotary, tokens: fx.Node, total: ir.Value) -> list[ir.Value]:
    """Cosines and sines `[rows, width / 2]`, and which row is whose, `[batch, queries]`.

    At the start of sequences the operator takes rows 0, 1, ... for each of them. Where the sequences' angles differ
    there, they get rows that it refuses, so that nothing is rotated wrongly.

    Args:
        e: the emitter.
        rotary: the rotation.
        tokens: an input `[batch, queries]`.
        total: how many places there are with the cached ones, int64 `[1]`: the operator wants as many rows.
    """
    found = angles(rotary)
    assert found is not None
    shape = e.op("Shape", tokens)
    pads = e.op("Concat", e.const([0, 0], torch.int64), total, e.const([0], torch.int64), axis=0)
    table = e.op("Pad", e.op("Reshape", found, [-1, rotary.width // 2]), pads)
    # all tokens of a call with several, none of a call with one: its rows may differ
    several = e.op(
        "Mul",
        e.op("Sub", e.sizes.length(tokens.meta["val"].shape[1]), e.const([1], torch.int64)),
        e.const([_FAR], torch.int64),
    )
    compared = e.op("Slice", found, [0], several, [1])
    differ = e.op("ReduceL1", e.op("Sub", compared, e.op("Slice", compared, [0], [1], [0])), keepdims=0)
    wrong = e.op("Cast", differ, to=ir.DataType.BOOL)
    first = e.op("Where", wrong, e.const(_FAR, torch.int64), e.const(0, torch.int64))
    rows = e.op("Range", first, e.op("Add", first, e.op("Size", tokens)), e.const(1, torch.int64))
    return [e.op("Cos", table), e.op("Sin", table), e.op("Reshape", rows, shape)]
