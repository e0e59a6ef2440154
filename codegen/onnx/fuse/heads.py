"""Heads as rows: `[batch, heads, length, size]` read back as the `[batch, length, heads * size]` it was split from."""

from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import fx

from sparc.codegen.onnx.fuse.plan import Emit, Plan
from sparc.codegen.onnx.sizes import expression

if TYPE_CHECKING:
    from sparc.codegen.onnx.emit import Emitter

aten = torch.ops.aten
_RESHAPES = (aten.reshape.default, aten.view.default)


def same(a: Any, b: Any) -> bool:
    """Whether two sizes, or sequences of sizes, are equal for every value of the symbols."""
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(expression(a) == expression(b))


def swaps_heads(node: fx.Node) -> bool:
    """Whether a 4-D node is its input with the axes 1 and 2 exchanged."""
    fake = node.meta.get("val")
    if not isinstance(fake, torch.Tensor) or fake.ndim != 4:
        return False
    if node.target is aten.transpose.int:
        return sorted(int(axis) % 4 for axis in node.args[1:3]) == [1, 2]  # type: ignore[arg-type]
    if node.target is aten.permute.default:
        return [int(axis) % 4 for axis in node.args[1]] == [0, 2, 1, 3]  # type: ignore[union-attr,arg-type]
    return False


def rows_of(plan: Plan, node: fx.Node, axis: int) -> Emit | None:
    """How to get a 4-D node, whose heads lie on `axis` (1 or 2), as rows; None where that takes a transposition."""
    known = plan.rows(node, axis)
    if known is not None:
        return known
    shape = node.meta["val"].shape
    if axis == 1:
        if not swaps_heads(node):
            return None
        inner = node.args[0]
        assert isinstance(inner, fx.Node)
        return rows_of(plan, inner, 2)
    heads, size = shape[2:]
    if not isinstance(heads, int) or not isinstance(size, int):
        return None
    if node.target in _RESHAPES:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if same(tuple(source.meta["val"].shape), (*shape[:2], heads * size)):
            return lambda e: e.value(source)
    return lambda e: _merged(e, node, heads * size)


def _merged(e: "Emitter", node: fx.Node, width: int) -> ir.Value:
    made: ir.Value = e.op("Reshape", node, [0, 0, width])
    return made


def split(e: "Emitter", rows: ir.Value, heads: int, size: int, axis: int) -> ir.Value:
    """Rows as a 4-D value with its heads on `axis`."""
    apart: ir.Value = e.op("Reshape", rows, [0, 0, heads, size])
    return apart if axis == 2 else e.op("Transpose", apart, perm=[0, 2, 1, 3])


def put_merged(plan: Plan, node: fx.Node, rows: Emit, heads: int, size: int) -> None:
    """Translate what reads a 4-D result, whose heads lie on axis 1, by its rows: as they are, or split again."""
    plan.put(node, lambda e: split(e, rows(e), heads, size, 1))  # type: ignore[arg-type]
    plan.put_rows(node, 1, rows)
    plan.absorb(node)
    for swapped in node.users:
        if not swaps_heads(swapped):
            continue
        plan.put(swapped, lambda e: split(e, rows(e), heads, size, 2))  # type: ignore[arg-type]
        plan.put_rows(swapped, 2, rows)
        plan.absorb(swapped)
        lead = tuple(swapped.meta["val"].shape[:2])
        for merged in swapped.users:
            if merged.target in _RESHAPES and same(tuple(merged.meta["val"].shape), (*lead, heads * size)):
                plan.put(merged, rows)
