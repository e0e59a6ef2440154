"""Rules of operators that move data: reshaping, joining, splitting, indexing, padding."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sparc.analysis.axes import ONE, Axis, Product, Sum, channels, concrete, extent, factor, freeze, split, unify
from sparc.analysis.coupling import Axes, Coupling, Rule
from sparc.analysis.values import same_size


def _shape(node: fx.Node) -> Sequence[Any]:
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value.shape


def _place(axis: int, rank: int) -> int:
    return axis % rank if rank else 0


# reshaping -----------------------------------------------------------------------------------------------------------
def _blocks(old: Sequence[Any], new: Sequence[Any]) -> list[tuple[range, range]]:
    """The shortest runs of old and new axes that hold equally many elements."""
    found: list[tuple[range, range]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        start, sizes = (i, j), [1, 1]
        i, sizes[0] = (i + 1, old[i]) if i < len(old) else (i, 1)
        j, sizes[1] = (j + 1, new[j]) if j < len(new) else (j, 1)
        while not same_size(*sizes) and (i < len(old) or j < len(new)):
            behind = concrete(sizes[0]), concrete(sizes[1])
            known = all(isinstance(size, int) for size in behind)
            take_old = i < len(old) and (behind[0] < behind[1] if known else _count(behind[0]) < _count(behind[1]))
            if take_old or j >= len(new):
                i, sizes[0] = i + 1, sizes[0] * old[i]
            else:
                j, sizes[1] = j + 1, sizes[1] * new[j]
        found.append((range(start[0], i), range(start[1], j)))
    return found


def _count(size: Any) -> float:
    """How large a size is in comparison, for sizes that vary: every symbol counts as a large number."""
    return float(size if isinstance(size, int) else size.subs({symbol: 7919 for symbol in size.free_symbols}))


def _regroup(axes: Axes, old: Sequence[Any], new: Sequence[Any]) -> Axes:
    """The axes of a reshaped value."""
    result: list[Axis] = [ONE] * len(new)
    for before, after in _blocks(old, new):
        outer = [place for place in after if not same_size(new[place], 1)]
        inner = [place for place in before if not same_size(old[place], 1)]
        if len(outer) == 1:
            result[outer[0]] = axes[inner[0]] if len(inner) == 1 else Product(tuple(axes[place] for place in inner))
            continue
        for place in outer:
            result[place] = channels(new[place])
        unify(Product(tuple(axes[place] for place in inner)), Product(tuple(result[place] for place in outer)))
    return tuple(result)


def _reshape(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
    source: fx.Node = given["self"]
    result = _regroup(state.of(source), _shape(source), _shape(node))
    for name in ("shape", "size", "sizes"):
        first = _place(given["dim"], len(_shape(source))) if "dim" in given else 0
        for index in range(len(given.get(name, ()))):
            state.size(node, name, index, result[first + index])
    return result


def _reshape_as(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
    source = given["self"]
    result = _regroup(state.of(source), _shape(source), _shape(node))
    return state.broadcast([result, state.of(given["other"])])


def _permute(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
    axes = state.of(given["self"])
    return tuple(axes[_place(axis, len(axes))] for axis in given["dims"])


def _transpose(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
    axes = list(state.of(given["self"]))
    if len(axes) > 1:
        a, b = (_place(given.get(name, default), len(axes)) for name, default in (("dim0", -2), ("dim1", -1)))
        axes[a], axes[b] = axes[b], axes[a]
    return tuple(axes)


def _unsqueeze(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
    axes = list(state.of(given["self"]))
    axes.insert(_place(given["dim"], len(axes) + 1), ONE)
    return tuple(axes)


def _squeeze(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes | None:
    """By named axes only: the others might get size one."""
    if "dim" not in given:
        return None
    axes = state.of(given["self"])
    named = given["dim"] if isinstance(given["dim"], (list, tuple)) else [given["dim"]]
    gone = {_place(axis, len(axes)) for axis in named}
    for place in gone:
        freeze(axes[place], "it is squeezed")
    return tuple(axis for place, axis in enumerate(axes) if place not in gone or extent(axis) != 1)


def _expand(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
    source, shape = given["self"], _shape(node)
    axes, old = state.of(source), _shape(source)
    result = list(channels(size) for size in shape)
    for place in range(1, len(axes) + 1):
        if not same_size(old[-place], 1):
            result[-place] = axes[-place]
    for index in range(len(given.get("size", ()))):
        state.size(node, "size", index, result[index])
    if "other" in given:
        return state.broadcast([tuple(result), state.of(given["other"])])
    return tuple(result)


def _repeat(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
    axes = state.of(given["self"])
    axes = (ONE,) * (len(given["repeats"]) - len(axes)) + axes
    result: list[Axis] = []
    for index, (axis, times) in enumerate(zip(axes, given["repeats"], strict=True)):
        repeated = channels(times.meta["val"] if isinstance(times, fx.Node) else times)
        state.size(node, "repeats", index, repeated)
        result.append(Product((repeated, axis)))
    return tuple(result)


def _repeat_interleave(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes | None:
    if not isinstance(given.get("repeats"), int) or given.get("dim") is None:
        return None
    axes = list(state.of(given["self"]))
    place, repeated = _place(given["dim"], len(axes)), channels(given["repeats"])
    state.size(node, "repeats", None, repeated)
    axes[place] = Product((axes[place], repeated))
    return tuple(axes)


def _pixel_shuffle(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes | None:
    axes = state.of(given["self"])
    pieces = factor(axes[-3], given["upscale_factor"] ** 2)
    if pieces is None:
        return None
    freeze(pieces[1], "its channels become positions (pixel_shuffle)")
    return (*axes[:-3], pieces[0], *_closed(state, node, axes[-2:], 2))


# joining and splitting -----------------------------------------------------------------------------------------------
def _cat(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
    parts = [state.of(each) for each in given["tensors"]]
    parts = [axes for axes in parts if len(axes) == len(_shape(node))]
    place = _place(given["dim"], len(_shape(node)))
    others = state.broadcast([(*axes[:place], ONE, *axes[place + 1 :]) for axes in parts])
    return (*others[:place], Sum(tuple(axes[place] for axes in parts)), *others[place + 1 :])


def _stack(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
    result = list(state.broadcast([state.of(each) for each in given["tensors"]]))
    result.insert(_place(given["dim"], len(result) + 1), channels(len(given["tensors"]), "values are stacked along it"))
    return tuple(result)


def _cut_at(axis: Axis, sizes: Sequence[Any]) -> list[Axis] | None:
    """The axis in pieces; None when it has no such boundaries."""
    found: list[Axis] = []
    for size in sizes:
        pieces = split(axis, concrete(size))
        if pieces is None:
            return None
        found.append(pieces[0])
        axis = pieces[1]
    return found


def _split(state: Coupling, node: fx.Node, given: dict[str, Any]) -> list[Axes]:
    axes = state.of(given["self"])
    place = _place(given["dim"], len(axes))
    sizes = [part.shape[place] for part in node.meta["val"]]
    pieces = _cut_at(axes[place], sizes)
    if pieces is None:
        freeze(axes[place], f"{_name(node)} has no boundary of its channels")
        pieces = [channels(size, f"{_name(node)} has no boundary of its channels") for size in sizes]
    for index, piece in enumerate(pieces):
        state.size(node, "split_sizes", index, piece)
    return [(*axes[:place], piece, *axes[place + 1 :]) for piece in pieces]


def _unbind(state: Coupling, node: fx.Node, given: dict[str, Any]) -> list[Axes]:
    axes = state.of(given["self"])
    place = _place(given["dim"], len(axes))
    freeze(axes[place], "single positions of it are read (unbind)")
    return [axes[:place] + axes[place + 1 :]] * len(node.meta["val"])


def _select(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
    axes = state.of(given["self"])
    place = _place(given["dim"], len(axes))
    freeze(axes[place], "single positions of it are read (select)")
    return axes[:place] + axes[place + 1 :]


def _slice(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
    axes = state.of(given["self"])
    place = _place(given["dim"], len(axes))
    old, new = concrete(_shape(given["self"])[place]), concrete(_shape(node)[place])
    if old == new:
        return axes
    piece = _piece(state, node, given, axes[place], old, new)
    if piece is None:
        freeze(axes[place], "a part of it is read (slice)")
        piece = channels(new, "it is a part of another axis (slice)")
    return (*axes[:place], piece, *axes[place + 1 :])


def _piece(state: Coupling, node: fx.Node, given: dict[str, Any], axis: Axis, old: Any, new: Any) -> Axis | None:
    start, end, step = given.get("start") or 0, given.get("end"), given.get("step", 1)
    if not all(isinstance(each, int) for each in (old, new, start, step)):
        return None
    start = max(0, start + old) if start < 0 else start
    if step > 1:
        pieces = factor(axis, step) if start < step and new * step == old else None
        if pieces is not None:
            freeze(pieces[1], "it is read with a step (slice)")
        return pieces and pieces[0]
    pieces_of = _cut_at(axis, [start, new, old - start - new])
    if pieces_of is None:
        return None
    before, piece, _ = pieces_of
    if given.get("start") not in (None, 0):
        state.size(node, "start", None, before)
    if isinstance(end, int) and end != old and start + new < old:
        state.size(node, "end", None, Sum((before, piece)))
    return piece


# indexing ------------------------------------------------------------------------------------------------------------
def _read_at(*names: str) -> Rule:
    """Operators that read one axis at positions which are data; the other axes pass."""

    def rule(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
        axes = state.of(given["self"])
        if node in state.experts:
            return axes
        places = [given[name] for name in names if given.get(name) is not None]
        flat = [p for place in places for p in (place if isinstance(place, (list, tuple)) else [place])]
        for place in flat or range(len(axes)):
            freeze(axes[_place(place, len(axes))], f"its positions matter to {_name(node)}")
        named = {_place(place, len(axes)) for place in flat}
        return tuple(
            channels(size, f"its positions matter to {_name(node)}") if place in named or not flat else axis
            for place, (axis, size) in enumerate(zip(axes, _shape(node), strict=True))
        )

    return rule


def _gather(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
    axes, index = state.of(given["self"]), state.of(given["index"])
    place = _place(given["dim"], len(axes))
    for at, (axis, other) in enumerate(zip(axes, index, strict=True)):
        if at == place and node in state.experts:
            unify(axis, state.experts[node])
        elif at == place or concrete(extent(axis) - extent(other)) != 0:
            freeze(axis, "its positions matter to gather")
        else:
            unify(axis, other)
    return index


def _index(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes | None:
    """`x[:, index, ...]`: indexed axes are read at positions that are data, the others pass."""
    axes, indices = state.of(given["self"]), list(given["indices"])
    indices += [None] * (len(axes) - len(indices))
    used = [place for place, each in enumerate(indices) if each is not None]
    if any(each is not None and each.meta["val"].dtype == torch.bool for each in indices):
        return None
    if node in state.experts:
        unify(axes[0], state.experts[node])
    for place in used if node not in state.experts else ():
        freeze(axes[place], "its positions matter to index")
    read = state.broadcast([state.of(indices[place]) for place in used])
    at = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    others = [axis for place, axis in enumerate(axes) if place not in used]
    return (*others[:at], *read, *others[at:])


def _pad(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
    axes = list(state.of(given["self"]))
    for index, place in enumerate(range(len(axes) - 1, len(axes) - 1 - len(given["pad"]) // 2, -1)):
        if any(each != 0 for each in given["pad"][2 * index : 2 * index + 2]):
            freeze(axes[place], "it is padded")
            axes[place] = channels(_shape(node)[place], "it is padded")
    return tuple(axes)


def _triangle(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
    axes = state.of(given["self"])
    for axis in axes[-2:]:
        freeze(axis, f"its positions matter to {_name(node)}")
    return axes


def _made(name: str) -> Rule:
    """Operators that make a tensor of given sizes filled with one number."""

    def rule(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
        result = tuple(channels(size) for size in _shape(node))
        for index in range(len(given[name])):
            state.size(node, name, index, result[index])
        return result

    return rule


def _counted(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
    return tuple(channels(size, f"its positions matter to {_name(node)}") for size in _shape(node))


def _closed(state: Coupling, node: fx.Node, axes: Axes, count: int) -> Axes:
    """The last axes of a result whose inputs' positions are mixed."""
    for axis in axes[-count:]:
        freeze(axis, f"its positions are mixed by {_name(node)}")
    return tuple(channels(size, f"its positions are mixed by {_name(node)}") for size in _shape(node)[-count:])


def spatial(count: int) -> Rule:
    """Operators that mix the last `count` axes and pass the others."""

    def rule(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
        axes = state.of(given.get("self", given.get("input")))
        return (*axes[:-count], *_closed(state, node, axes, count))

    return rule


def _several(count: int) -> Rule:
    def rule(state: Coupling, node: fx.Node, given: dict[str, Any]) -> list[Axes]:
        axes = state.of(given["self"])
        for axis in axes[-count:]:
            freeze(axis, f"its positions are mixed by {_name(node)}")
        return [
            (*axes[:-count], *(channels(size, "it is made by pooling") for size in kind.shape[-count:]))
            for kind in node.meta["val"]
        ]

    return rule


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "_opname", node.target))


def prefix(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
    """Operators whose result is like their first tensor."""
    return state.of(given.get("self", given.get("input")))


LAYOUT: dict[str, Rule] = {
    **dict.fromkeys(["reshape", "view", "_unsafe_view", "flatten", "unflatten"], _reshape),
    **dict.fromkeys(["reshape_as", "view_as"], _reshape_as),
    "permute": _permute,
    **dict.fromkeys(["transpose", "t", "mT"], _transpose),
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    **dict.fromkeys(["expand", "expand_as"], _expand),
    "repeat": _repeat,
    "repeat_interleave": _repeat_interleave,
    "pixel_shuffle": _pixel_shuffle,
    **dict.fromkeys(["cat", "concat"], _cat),
    "stack": _stack,
    **dict.fromkeys(["split", "split_with_sizes", "chunk"], _split),
    "unbind": _unbind,
    "select": _select,
    "slice": _slice,
    "index_select": _read_at("dim"),
    **dict.fromkeys(["roll", "flip"], _read_at("dims")),
    "cumsum": _read_at("dim"),
    "gather": _gather,
    "index": _index,
    **dict.fromkeys(["pad", "constant_pad_nd"], _pad),
    **dict.fromkeys(["tril", "triu"], _triangle),
    **dict.fromkeys(["zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "empty"], _made("size")),
    **dict.fromkeys(["zeros_like", "ones_like", "full_like", "empty_like"], prefix),
    **dict.fromkeys(["arange", "linspace", "scalar_tensor"], _counted),
    **dict.fromkeys(["max_pool1d", "avg_pool1d", "adaptive_avg_pool1d", "upsample_nearest1d"], spatial(1)),
    **dict.fromkeys(["max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "upsample_nearest2d"], spatial(2)),
    **dict.fromkeys(["upsample_bilinear2d", "upsample_bicubic2d"], spatial(2)),
    **dict.fromkeys(["max_pool3d", "avg_pool3d", "adaptive_avg_pool3d", "upsample_nearest3d"], spatial(3)),
    "max_pool2d_with_indices": _several(2),
}
