"""Rules of operators to which positions matter: indexing, padding, pooling, and those that make a tensor."""

from typing import Any

import torch
from torch import fx

from sparc.analysis.axes import channels, concrete, extent, freeze, unify
from sparc.analysis.coupling import Axes, Coupling, Rule, name_of, place_of
from sparc.analysis.values import shape_of


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
            freeze(axes[place_of(place, len(axes))], f"its positions matter to {name_of(node)}")
        named = {place_of(place, len(axes)) for place in flat}
        return tuple(
            channels(size, f"its positions matter to {name_of(node)}") if place in named or not flat else axis
            for place, (axis, size) in enumerate(zip(axes, shape_of(node), strict=True))
        )

    return rule


def _gather(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
    axes, index = state.of(given["self"]), state.of(given["index"])
    place = place_of(given["dim"], len(axes))
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
            axes[place] = channels(shape_of(node)[place], "it is padded")
    return tuple(axes)


def _triangle(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
    axes = state.of(given["self"])
    for axis in axes[-2:]:
        freeze(axis, f"its positions matter to {name_of(node)}")
    return axes


def _made(name: str) -> Rule:
    """Operators that make a tensor of given sizes filled with one number."""

    def rule(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
        result = tuple(channels(size) for size in shape_of(node))
        for index in range(len(given[name])):
            state.size(node, name, index, result[index])
        return result

    return rule


def _counted(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
    return tuple(channels(size, f"its positions matter to {name_of(node)}") for size in shape_of(node))


def mixed(state: Coupling, node: fx.Node, axes: Axes, count: int) -> Axes:
    """The last axes of a result whose inputs' positions are mixed."""
    for axis in axes[-count:]:
        freeze(axis, f"its positions are mixed by {name_of(node)}")
    return tuple(channels(size, f"its positions are mixed by {name_of(node)}") for size in shape_of(node)[-count:])


def _spatial(count: int) -> Rule:
    """Operators that mix the last `count` axes and pass the others."""

    def rule(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
        axes = state.of(given.get("self", given.get("input")))
        return (*axes[:-count], *mixed(state, node, axes, count))

    return rule


def _several(count: int) -> Rule:
    def rule(state: Coupling, node: fx.Node, given: dict[str, Any]) -> list[Axes]:
        axes = state.of(given["self"])
        for axis in axes[-count:]:
            freeze(axis, f"its positions are mixed by {name_of(node)}")
        return [
            (*axes[:-count], *(channels(size, "it is made by pooling") for size in kind.shape[-count:]))
            for kind in node.meta["val"]
        ]

    return rule


def _prefix(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
    """Operators whose result is like their first tensor."""
    return state.of(given.get("self", given.get("input")))


_POOLS = ("max_pool", "avg_pool", "adaptive_avg_pool", "upsample_nearest", "_upsample_nearest_exact")
_SMOOTH = {"linear1d": 1, "bilinear2d": 2, "bicubic2d": 2, "trilinear3d": 3}
POSITIONS: dict[str, Rule] = {
    "index_select": _read_at("dim"),
    **dict.fromkeys(["roll", "flip"], _read_at("dims")),
    "cumsum": _read_at("dim"),
    "gather": _gather,
    "index": _index,
    **dict.fromkeys(["pad", "constant_pad_nd"], _pad),
    **dict.fromkeys(["tril", "triu"], _triangle),
    **dict.fromkeys(["zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "empty"], _made("size")),
    **dict.fromkeys(["zeros_like", "ones_like", "full_like", "empty_like"], _prefix),
    **dict.fromkeys(["arange", "linspace", "scalar_tensor"], _counted),
    **{f"{name}{count}d": _spatial(count) for name in _POOLS for count in (1, 2, 3)},
    **{f"upsample_{name}": _spatial(count) for name, count in _SMOOTH.items()},
    **{f"adaptive_max_pool{count}d": _several(count) for count in (1, 2, 3)},
    "max_pool2d_with_indices": _several(2),
}
