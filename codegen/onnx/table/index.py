"""Gathering and scattering by indices and masks."""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

from sparc.codegen.onnx.emit import Emitter, Translation
from sparc.codegen.onnx.sizes import expression
from sparc.codegen.onnx.table.shape import broadcast


def gather(e: Emitter, node: fx.Node, x: fx.Node, dim: int, index: fx.Node, **_: Any) -> ir.Value:
    """`out[i][j] = x[index[i][j]][j]` for dim 0, and so on."""
    if x.meta["val"].ndim == 0:
        return e.value(x)
    return e.op("GatherElements", x, e.cast(index, torch.int64), axis=dim)


def index_select(e: Emitter, node: fx.Node, x: fx.Node, dim: int, index: fx.Node) -> ir.Value:
    """Slices along an axis."""
    return e.op("Gather", x, index, axis=dim)


def index(e: Emitter, node: fx.Node, x: fx.Node, indices: Sequence[fx.Node | None]) -> ir.Value | None:
    """`x[indices]`: integer tensors that broadcast together, one mask, and whole axes."""
    used = [(axis, each) for axis, each in enumerate(indices) if each is not None]
    if any(each.meta["val"].dtype in (torch.bool, torch.uint8) for _, each in used):
        return _masked(e, x, used[0][1]) if len(used) == 1 and used[0][0] == 0 else None
    if len(used) == 1:
        return e.op("Gather", x, used[0][1], axis=used[0][0])
    axes, rank = [axis for axis, _ in used], x.meta["val"].ndim
    rest = [axis for axis in range(rank) if axis not in axes]
    order = axes + rest
    value = e.value(x) if order == sorted(order) else e.op("Transpose", x, perm=order)
    coordinates, count = _stacked(e, [each for _, each in used])
    picked = e.op("GatherND", value, coordinates)
    adjacent = axes == list(range(axes[0], axes[0] + len(axes)))
    if not adjacent or axes[0] == 0:
        return picked
    before = axes[0]
    perm = [*range(count, count + before), *range(count), *range(count + before, count + len(rest))]
    return e.op("Transpose", picked, perm=perm)


def _masked(e: Emitter, x: fx.Node, mask: fx.Node) -> ir.Value:
    return e.op("GatherND", x, e.op("Transpose", e.op("NonZero", e.cast(mask, torch.bool)), perm=[1, 0]))


def _stacked(e: Emitter, indices: Sequence[fx.Node]) -> tuple[ir.Value, int]:
    """Indices broadcast to a common shape and stacked on a last axis; and the rank of that shape."""
    fakes = [each.meta["val"] for each in indices]
    common = fakes[0].new_empty(torch.broadcast_shapes(*[fake.shape for fake in fakes]))
    columns = []
    for each, fake in zip(indices, fakes, strict=True):
        spread = broadcast(e, e.cast(each, torch.int64), fake, common)
        columns.append(e.op("Unsqueeze", spread, [-1]))
    return (columns[0] if len(columns) == 1 else e.op("Concat", *columns, axis=-1)), common.ndim


def index_put(
    e: Emitter, node: fx.Node, x: fx.Node, indices: Sequence[fx.Node | None], values: fx.Node, accumulate: bool = False
) -> ir.Value | None:
    """`x[indices] = values` (or `+=`), for indices of the leading axes."""
    if any(each is None for each in indices):
        return None
    fake = x.meta["val"]
    if indices[0].meta["val"].dtype == torch.bool:  # type: ignore[union-attr]
        return _put_mask(e, x, indices, values) if not accumulate else None
    coordinates, _ = _stacked(e, indices)  # type: ignore[arg-type]
    common = torch.broadcast_shapes(*[each.meta["val"].shape for each in indices])  # type: ignore[union-attr]
    target = fake.new_empty([*common, *fake.shape[len(indices) :]])
    updates = broadcast(e, e.cast(values, fake.dtype), values.meta["val"], target)
    return e.op("ScatterND", x, coordinates, updates, reduction="add" if accumulate else "none")


def _put_mask(e: Emitter, x: fx.Node, indices: Sequence[Any], values: fx.Node) -> ir.Value | None:
    """`x[mask] = value`: a choice when the value is a single number."""
    mask, fake = indices[0], x.meta["val"]
    if len(indices) != 1 or values.meta["val"].numel() != 1:
        return None
    missing = fake.ndim - mask.meta["val"].ndim
    flags = e.value(mask) if not missing else e.op("Unsqueeze", mask, list(range(-missing, 0)))
    return e.op("Where", flags, e.op("Squeeze", e.cast(values, fake.dtype)), x)


def scatter(reduction: str) -> Translation:
    """`out[index[i][j]][j] = source[i][j]` for dim 0, and so on; or added."""

    def translate(
        e: Emitter, node: fx.Node, x: fx.Node, dim: int, where: fx.Node, source: Any, **named: Any
    ) -> ir.Value | None:
        if named:
            return None
        fake, places = x.meta["val"], where.meta["val"]
        if (
            isinstance(source, fx.Node)
            and isinstance(source.meta["val"], Tensor)
            and source.meta["val"].ndim == places.ndim
        ):
            updates = _corner(e, e.cast(source, fake.dtype), source.meta["val"], places)
        else:
            updates = e.op("Expand", e.cast(source, fake.dtype), e.sizes.vector(list(places.shape)))
        return e.op("ScatterElements", x, where, updates, axis=dim, reduction=reduction)

    return translate


def _corner(e: Emitter, value: ir.Value, fake: Tensor, places: Tensor) -> ir.Value:
    """The part of the source that has an index."""
    axes = [axis for axis in range(fake.ndim) if expression(fake.shape[axis]) != expression(places.shape[axis])]
    if not axes:
        return value
    return e.op("Slice", value, [0] * len(axes), [places.shape[axis] for axis in axes], axes)


def slice_scatter(
    e: Emitter,
    node: fx.Node,
    x: fx.Node,
    source: fx.Node,
    dim: int = 0,
    start: Any = None,
    end: Any = None,
    step: int = 1,
) -> ir.Value | None:
    """`x[..., start:end, ...] = source` along one axis."""
    fake = x.meta["val"]
    dim %= fake.ndim
    if step != 1 or not (start is None or isinstance(start, (int, fx.Node))):
        return None
    first = e.size(start) if start is not None else 0
    if isinstance(first, int) and first < 0:
        return None
    past = expression(first) + expression(source.meta["val"].shape[dim])
    pieces = [] if isinstance(first, int) and first == 0 else [e.op("Slice", x, [0], [first], [dim])]
    pieces.append(e.cast(source, fake.dtype))
    if past != expression(fake.shape[dim]):
        pieces.append(e.op("Slice", x, [past], [2**62], [dim]))
    return pieces[0] if len(pieces) == 1 else e.op("Concat", *pieces, axis=dim)


def select_scatter(e: Emitter, node: fx.Node, x: fx.Node, source: fx.Node, dim: int, position: int) -> ir.Value | None:
    """`x[..., position, ...] = source` along one axis."""
    if not isinstance(position, int) or position < 0:
        return None
    value = e.op("Unsqueeze", e.cast(source, x.meta["val"].dtype), [dim])
    places = e.op("Expand", e.const(position, torch.int64), e.op("Shape", value))
    return e.op("ScatterElements", x, places, value, axis=dim)


def nonzero(e: Emitter, node: fx.Node, x: fx.Node) -> ir.Value:
    """Coordinates of the elements that are not zero, one a row."""
    return e.op("Transpose", e.op("NonZero", x), perm=[1, 0])


def masked_select(e: Emitter, node: fx.Node, x: fx.Node, mask: fx.Node) -> ir.Value | None:
    """The elements where the mask is set."""
    return _masked(e, x, mask) if x.meta["val"].shape == mask.meta["val"].shape else None


TABLE: dict[str, Translation] = {
    "aten.gather.default": gather,
    "aten.index_select.default": index_select,
    "aten.index.Tensor": index,
    "aten.index_put.default": index_put,
    "aten._unsafe_index.Tensor": index,
    "aten.scatter.src": scatter("none"),
    "aten.scatter.value": scatter("none"),
    "aten.scatter_add.default": scatter("add"),
    "aten.slice_scatter.default": slice_scatter,
    "aten.select_scatter.default": select_scatter,
    "aten.nonzero.default": nonzero,
    "aten.masked_select.default": masked_select,
}
