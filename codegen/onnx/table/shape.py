"""Operators that only move elements: reshaping, transposing, slicing, joining."""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx

from sparc.codegen.onnx.emit import Emitter, Translation
from sparc.codegen.onnx.sizes import expression
from sparc.codegen.onnx.types import onnx_type


def reshaped(e: Emitter, node: fx.Node, x: fx.Node, *_: Any, **named: Any) -> ir.Value:
    """The same elements in the output's shape (view, reshape, flatten, squeeze, unsqueeze, unflatten)."""
    return e.reshape(x, x.meta["val"].shape, node.meta["val"].shape)


def passes(e: Emitter, node: fx.Node, x: fx.Node, *_: Any, **named: Any) -> ir.Value:
    """The input itself."""
    return e.value(x)


def unsqueeze(e: Emitter, node: fx.Node, x: fx.Node, dim: int) -> ir.Value:
    """A new axis of size one."""
    return e.op("Unsqueeze", x, [dim])


def transpose(e: Emitter, node: fx.Node, x: fx.Node, first: int, second: int) -> ir.Value:
    """Two axes swapped."""
    order = list(range(x.meta["val"].ndim))
    if not order:
        return e.value(x)
    order[first], order[second] = order[second], order[first]
    return permuted(e, x, order)


def permute(e: Emitter, node: fx.Node, x: fx.Node, dims: Sequence[int]) -> ir.Value:
    """Axes in another order."""
    rank = x.meta["val"].ndim
    return permuted(e, x, [dim % rank for dim in dims])


def matrix_transpose(e: Emitter, node: fx.Node, x: fx.Node) -> ir.Value:
    """The last two axes swapped, or a vector itself."""
    return transpose(e, node, x, -1, -2) if x.meta["val"].ndim >= 2 else e.value(x)


def all_transposed(e: Emitter, node: fx.Node, x: fx.Node) -> ir.Value:
    """All axes in reverse."""
    return permuted(e, x, list(range(x.meta["val"].ndim))[::-1])


def permuted(e: Emitter, x: fx.Node, order: Sequence[int]) -> ir.Value:
    """Axes in another order; nothing when they keep theirs."""
    return e.value(x) if list(order) == sorted(order) else e.op("Transpose", x, perm=list(order))


def expand(e: Emitter, node: fx.Node, x: fx.Node, sizes: Sequence[Any], *, implicit: bool = False) -> ir.Value:
    """Broadcast to the output's shape."""
    return broadcast(e, x, x.meta["val"], node.meta["val"])


def broadcast(e: Emitter, x: Any, old: Tensor, new: Tensor) -> ir.Value:
    """Broadcast a value; an axis that stays is asked to be 1, which leaves it alone."""
    before, after = [[expression(size) for size in fake.shape] for fake in (old, new)]
    if before == after:
        return e.value(x)
    lead = len(after) - len(before)
    if e.sizes.reads(after):
        return e.op("Expand", x, e.sizes.vector(after))
    if e.target.flavour == "cuda":
        return _multiplied(e, x, [*[None] * lead, *before], after, new.dtype)
    wish = [1 if axis >= lead and before[axis - lead] == size else size for axis, size in enumerate(after)]
    return e.op("Expand", x, e.sizes.vector(wish))


def _multiplied(e: Emitter, x: Any, before: Sequence[Any], after: Sequence[Any], dtype: torch.dtype) -> ir.Value:
    """Broadcast by multiplying with ones: their sizes are read one by one, so that none is computed on the CPU."""
    value = e.value(x)
    fixed = [1 if not size.is_Integer or before[axis] == size else int(size) for axis, size in enumerate(after)]
    if any(size != 1 for size in fixed):
        value = e.op("Expand", value, fixed)
    for axis, size in enumerate(after):
        if not size.is_Integer and before[axis] != size:
            ones = e.op("ConstantOfShape", e.sizes.length(size), value=_one(dtype))
            ones = e.op("Reshape", ones, [-1 if other == axis else 1 for other in range(len(after))])
            value = e.op("And" if dtype == torch.bool else "Mul", value, ones)
    return value


def _one(dtype: torch.dtype) -> ir.TensorProtocol:
    return ir.tensor(np.ones(1, dtype=onnx_type(dtype).numpy()), dtype=onnx_type(dtype))


def repeat(e: Emitter, node: fx.Node, x: fx.Node, repeats: Sequence[Any]) -> ir.Value:
    """Tile, with new axes in front."""
    value, fake = e.value(x), x.meta["val"]
    lead = len(repeats) - fake.ndim
    if lead:
        value = e.reshape(value, fake.shape, [*[1] * lead, *fake.shape])
    return e.op("Tile", value, list(repeats))


def slice_(
    e: Emitter, node: fx.Node, x: fx.Node, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1
) -> ir.Value:
    """`x[..., start:end:step, ...]` along one axis."""
    if [expression(size) for size in x.meta["val"].shape] == [
        expression(size) for size in node.meta["val"].shape
    ] and step == 1:
        return e.value(x)
    last = sys.maxsize if end is None else end
    return e.op("Slice", x, [0 if start is None else start], [last], [dim], [step])


def narrow(e: Emitter, node: fx.Node, x: fx.Node, dim: int, start: Any, length: Any) -> ir.Value:
    """`length` slices from `start` along one axis."""
    first = e.size(start)
    if isinstance(first, int) and first < 0:
        first = first + x.meta["val"].shape[dim]
    return e.op("Slice", x, [first], [expression(first) + expression(e.size(length))], [dim])


def select(e: Emitter, node: fx.Node, x: fx.Node, dim: int, index: Any) -> ir.Value:
    """One slice along an axis, the axis removed."""
    return e.op("Gather", x, e.sizes.scalar(e.size(index)), axis=dim)


def split_sizes(e: Emitter, x: fx.Node, outputs: Sequence[Tensor], dim: int) -> Sequence[ir.Value]:
    """Pieces along an axis, of the outputs' sizes."""
    if len(outputs) == 1:
        return [e.value(x)]
    sizes = [piece.shape[dim] for piece in outputs]
    made = e.op("Split", x, e.sizes.vector(sizes), axis=dim, outputs=len(outputs))
    return list(made)


def split(e: Emitter, node: fx.Node, x: fx.Node, sizes: Any, dim: int = 0) -> Sequence[ir.Value]:
    """Pieces along an axis (split, split_with_sizes, chunk, tensor_split)."""
    return split_sizes(e, x, node.meta["val"], dim)


def unbind(e: Emitter, node: fx.Node, x: fx.Node, dim: int = 0) -> Sequence[ir.Value]:
    """Every slice along an axis."""
    return [e.op("Gather", x, e.const(index, torch.int64), axis=dim) for index in range(len(node.meta["val"]))]


def cat(e: Emitter, node: fx.Node, tensors: Sequence[fx.Node], dim: int = 0) -> ir.Value:
    """Tensors joined along an axis; torch's legacy empty vectors are left out."""
    out = node.meta["val"]
    pieces = [x for x in tensors if not (x.meta["val"].ndim == 1 and x.meta["val"].shape[0] == 0 and out.ndim != 1)]
    values = [e.cast(x, out.dtype) for x in pieces]
    return values[0] if len(values) == 1 else e.op("Concat", *values, axis=dim % out.ndim)


def stack(e: Emitter, node: fx.Node, tensors: Sequence[fx.Node], dim: int = 0) -> ir.Value:
    """Tensors joined along a new axis."""
    out = node.meta["val"]
    dim %= out.ndim
    return e.op("Concat", *[e.op("Unsqueeze", e.cast(x, out.dtype), [dim]) for x in tensors], axis=dim)


def flip(e: Emitter, node: fx.Node, x: fx.Node, dims: Sequence[int]) -> ir.Value:
    """Axes reversed."""
    count = len(dims)
    if not count:
        return e.value(x)
    return e.op("Slice", x, [-1] * count, [-sys.maxsize] * count, list(dims), [-1] * count)


def roll(e: Emitter, node: fx.Node, x: fx.Node, shifts: Sequence[int], dims: Sequence[int] = ()) -> ir.Value | None:
    """Elements shifted along axes; what leaves on one side enters on the other."""
    if not dims:
        return None
    value = e.value(x)
    for shift, dim in zip(shifts, dims, strict=True):
        size = x.meta["val"].shape[dim]
        if isinstance(size, int):
            if size == 0 or shift % size == 0:
                continue
            shift %= size
        tail = e.op("Slice", value, [-shift], [sys.maxsize], [dim])
        head = e.op("Slice", value, [0], [-shift], [dim])
        value = e.op("Concat", tail, head, axis=dim % x.meta["val"].ndim)
    return value


def pad(
    e: Emitter, node: fx.Node, x: fx.Node, padding: Sequence[Any], mode: str = "constant", value: Any = None
) -> ir.Value | None:
    """Padding of the last axes, given from the last axis backward."""
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    if mode == "circular" and e.target.opset < 19:
        return None
    fake = x.meta["val"]
    axes = [fake.ndim - 1 - index for index in range(len(padding) // 2)]
    befores, afters = list(padding[::2]), list(padding[1::2])
    fill = e.const(value or 0, fake.dtype) if mode == "constant" else None
    return e.op("Pad", x, [*befores, *afters], fill, axes, mode=modes[mode])


def constant_pad(e: Emitter, node: fx.Node, x: fx.Node, padding: Sequence[Any], value: Any = 0) -> ir.Value | None:
    """Padding by a number."""
    return pad(e, node, x, padding, "constant", value)


def item_of(e: Emitter, node: fx.Node, source: fx.Node, index: Any) -> Any:
    """One of several results."""
    found = e.result(source)
    return found[index] if isinstance(found, (list, tuple)) or not isinstance(found, ir.Value) else None


_RESHAPES = [
    "view.default",
    "reshape.default",
    "_unsafe_view.default",
    "flatten.using_ints",
    "squeeze.default",
    "squeeze.dim",
    "squeeze.dims",
    "unflatten.int",
    "view_as.default",
    "reshape_as.default",
]
_SPLITS = [
    "split.Tensor",
    "split.sizes",
    "split_with_sizes.default",
    "chunk.default",
    "split_with_sizes_copy.default",
    "tensor_split.sections",
    "tensor_split.indices",
]
_PASSES = [
    "clone.default",
    "contiguous.default",
    "detach.default",
    "alias.default",
    "lift_fresh_copy.default",
    "lift_fresh.default",
    "detach_.default",
    "positive.default",
    "resolve_conj.default",
    "resolve_neg.default",
]

TABLE: dict[str, Translation] = {
    **{f"aten.{name}": reshaped for name in _RESHAPES},
    **{f"aten.{name}": split for name in _SPLITS},
    **{f"aten.{name}": passes for name in _PASSES},
    "aten.unsqueeze.default": unsqueeze,
    "aten.transpose.int": transpose,
    "aten.swapaxes.default": transpose,
    "aten.permute.default": permute,
    "aten.t.default": matrix_transpose,
    "aten.mT.default": matrix_transpose,
    "aten.numpy_T.default": all_transposed,
    "aten.expand.default": expand,
    "aten.expand_as.default": expand,
    "aten.broadcast_to.default": expand,
    "aten.repeat.default": repeat,
    "aten.tile.default": repeat,
    "aten.slice.Tensor": slice_,
    "aten.select.int": select,
    "aten.narrow.default": narrow,
    "aten.unbind.int": unbind,
    "aten.cat.default": cat,
    "aten.concat.default": cat,
    "aten.stack.default": stack,
    "aten.flip.default": flip,
    "aten.roll.default": roll,
    "aten.pad.default": pad,
    "aten.constant_pad_nd.default": constant_pad,
    "getitem": item_of,
}
