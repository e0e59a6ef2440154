"""Rules of operators that move data: reshaping, joining, splitting; with those of `coupling_positions`."""

from collections.abc import Sequence
from typing import Any

from torch import fx

from sparc.analysis.axes import (
    ONE,
    Axis,
    Product,
    Sum,
    channels,
    concrete,
    divide,
    extent,
    factor,
    freeze,
    split,
    unify,
)
from sparc.analysis.coupling import Axes, Coupling, Rule, name_of, place_of
from sparc.analysis.coupling_positions import POSITIONS, mixed
from sparc.analysis.values import same_size, shape_of


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
    result = _regroup(state.of(source), shape_of(source), shape_of(node))
    for name in ("shape", "size", "sizes"):
        first = place_of(given["dim"], len(shape_of(source))) if "dim" in given else 0
        for index in range(len(given.get(name, ()))):
            state.size(node, name, index, result[first + index])
    return result


def _reshape_as(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
    source = given["self"]
    result = _regroup(state.of(source), shape_of(source), shape_of(node))
    return state.broadcast([result, state.of(given["other"])])


def _permute(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
    axes = state.of(given["self"])
    return tuple(axes[place_of(axis, len(axes))] for axis in given["dims"])


def _transpose(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
    axes = list(state.of(given["self"]))
    if len(axes) > 1:
        a, b = (place_of(given.get(name, default), len(axes)) for name, default in (("dim0", -2), ("dim1", -1)))
        axes[a], axes[b] = axes[b], axes[a]
    return tuple(axes)


def _unsqueeze(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
    axes = list(state.of(given["self"]))
    axes.insert(place_of(given["dim"], len(axes) + 1), ONE)
    return tuple(axes)


def _squeeze(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes | None:
    """By named axes only: the others might get size one."""
    if "dim" not in given:
        return None
    axes = state.of(given["self"])
    named = given["dim"] if isinstance(given["dim"], (list, tuple)) else [given["dim"]]
    gone = {place_of(axis, len(axes)) for axis in named}
    for place in gone:
        freeze(axes[place], "it is squeezed")
    return tuple(axis for place, axis in enumerate(axes) if place not in gone or extent(axis) != 1)


def _expand(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
    source, shape = given["self"], shape_of(node)
    axes, old = state.of(source), shape_of(source)
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
    place, repeated = place_of(given["dim"], len(axes)), channels(given["repeats"])
    state.size(node, "repeats", None, repeated)
    axes[place] = Product((axes[place], repeated))
    return tuple(axes)


def _pixel_shuffle(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes | None:
    axes = state.of(given["self"])
    pieces = factor(axes[-3], given["upscale_factor"] ** 2)
    if pieces is None:
        return None
    freeze(pieces[1], "its channels become positions (pixel_shuffle)")
    return (*axes[:-3], pieces[0], *mixed(state, node, axes[-2:], 2))


def _pixel_unshuffle(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
    axes = state.of(given["self"])
    inner = channels(given["downscale_factor"] ** 2, "they were positions (pixel_unshuffle)")
    return (*axes[:-3], Product((axes[-3], inner)), *mixed(state, node, axes[-2:], 2))


def _channel_shuffle(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes | None:
    """Groups of channels become channels of groups."""
    axes = state.of(given["self"])
    pieces = factor(axes[1], divide(extent(axes[1]), given["groups"]))
    if pieces is None:
        return None
    state.size(node, "groups", None, pieces[0])
    return (axes[0], Product((pieces[1], pieces[0])), *axes[2:])


# joining and splitting -----------------------------------------------------------------------------------------------
def _cat(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
    parts = [state.of(each) for each in given["tensors"]]
    parts = [axes for axes in parts if len(axes) == len(shape_of(node))]
    place = place_of(given["dim"], len(shape_of(node)))
    others = state.broadcast([(*axes[:place], ONE, *axes[place + 1 :]) for axes in parts])
    return (*others[:place], Sum(tuple(axes[place] for axes in parts)), *others[place + 1 :])


def _stack(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
    result = list(state.broadcast([state.of(each) for each in given["tensors"]]))
    result.insert(
        place_of(given["dim"], len(result) + 1), channels(len(given["tensors"]), "values are stacked along it")
    )
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
    place = place_of(given["dim"], len(axes))
    sizes = [part.shape[place] for part in node.meta["val"]]
    pieces = _cut_at(axes[place], sizes)
    if pieces is None:
        freeze(axes[place], f"{name_of(node)} has no boundary of its channels")
        pieces = [channels(size, f"{name_of(node)} has no boundary of its channels") for size in sizes]
    for index, piece in enumerate(pieces):
        state.size(node, "split_sizes", index, piece)
    return [(*axes[:place], piece, *axes[place + 1 :]) for piece in pieces]


def _unbind(state: Coupling, node: fx.Node, given: dict[str, Any]) -> list[Axes]:
    axes = state.of(given["self"])
    place = place_of(given["dim"], len(axes))
    freeze(axes[place], "single positions of it are read (unbind)")
    return [axes[:place] + axes[place + 1 :]] * len(node.meta["val"])


def _select(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
    axes = state.of(given["self"])
    place = place_of(given["dim"], len(axes))
    freeze(axes[place], "single positions of it are read (select)")
    return axes[:place] + axes[place + 1 :]


def _slice(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
    axes = state.of(given["self"])
    place = place_of(given["dim"], len(axes))
    old, new = concrete(shape_of(given["self"])[place]), concrete(shape_of(node)[place])
    piece = _piece(state, node, given, axes[place], old, new)
    if piece is None:
        freeze(axes[place], "a part of it is read (slice)")
        piece = channels(new, "it is a part of another axis (slice)")
    return (*axes[:place], piece, *axes[place + 1 :])


def _piece(state: Coupling, node: fx.Node, given: dict[str, Any], axis: Axis, old: Any, new: Any) -> Axis | None:
    start, step = given.get("start") or 0, given.get("step", 1)
    if not all(isinstance(each, int) for each in (old, new, start, step)):
        return axis if old == new else None
    start = min(max(0, start + old if start < 0 else start), old)
    if step > 1 and old > 1:
        pieces = factor(axis, step) if start < step and new * step == old else None
        if pieces is None:
            return None
        freeze(pieces[1], "it is read with a step (slice)")
        _bounds(state, node, given, axis, channels(start), axis)
        return pieces[0]
    pieces_of = _cut_at(axis, [start, new, old - start - new])
    if pieces_of is None:
        return None
    before, piece, _ = pieces_of
    _bounds(state, node, given, axis, before, Sum((before, piece)))
    return piece


def _bounds(state: Coupling, node: fx.Node, given: dict[str, Any], axis: Axis, before: Axis, until: Axis) -> None:
    """The arguments of a slice are the sizes of what lies before its start and its end; one counted from the axis' end
    changes with every channel of the axis.
    """
    start, end = given.get("start") or 0, given.get("end")
    if start:
        state.size(node, "start", None, before, within=axis if start < 0 else None)
    if isinstance(end, int) and end <= extent(axis):
        state.size(node, "end", None, until, within=axis if end < 0 else None)


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
    "pixel_unshuffle": _pixel_unshuffle,
    "channel_shuffle": _channel_shuffle,
    **dict.fromkeys(["cat", "concat"], _cat),
    "stack": _stack,
    **dict.fromkeys(["split", "split_with_sizes", "chunk"], _split),
    "unbind": _unbind,
    "select": _select,
    "slice": _slice,
    **POSITIONS,
}
