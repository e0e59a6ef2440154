"""Where values are zero: at the channels whose weights are all zero, which is what pruning by masks leaves."""

import operator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from sparc.analysis.axes import Channels, leaves
from sparc.analysis.coupling import Coupling, name_of
from sparc.pattern import normalized_arguments
from sparc.program import is_weight

_CONVOLUTIONS = frozenset(f"conv{transpose}{rank}d" for transpose in ("", "_transpose") for rank in (1, 2, 3))
_NORMS = frozenset({"layer_norm", "rms_norm", "group_norm", "batch_norm"})
_WRITERS = _CONVOLUTIONS | _NORMS | {"linear", "embedding"}
_ADDED = frozenset({"add", "sub", "maximum", "minimum"})
_MOVED = frozenset(
    {"reshape", "view", "flatten", "unflatten", "permute", "transpose", "t", "expand", "unsqueeze", "squeeze", "clone"}
    | {"slice", "select", "repeat", "repeat_interleave", "contiguous", "dropout", "to", "alias", "detach"}
    | {"split", "split_with_sizes", "chunk", "unbind"}
)
_ZERO_AT_ZERO = _MOVED | {
    *("relu", "relu6", "leaky_relu", "silu", "gelu", "tanh", "neg", "abs", "hardswish", "mish", "div", "elu", "selu"),
    *("sqrt", "square", "pow", "sin", "erf", "log1p", "expm1"),
}


def vanishes(state: Coupling, value: Any, leaf: Channels) -> bool:
    """Whether a value has the channels, and is zero at each one whose weights are all zero."""
    return _Zeros(state, leaf).at(value)


@dataclass
class _Zeros:
    """The values that are zero at some channels, on every axis that has them."""

    state: Coupling
    leaf: Channels
    known: dict[fx.Node, bool] = field(default_factory=dict)

    def at(self, value: Any) -> bool:
        places = self.places(value)
        if places and value not in self.known:
            self.known[value] = self._at(value, places)
        return bool(places) and self.known[value]

    def places(self, value: Any) -> list[int]:
        """The axes of a value that have the channels; of several values, those of the first that has."""
        if isinstance(value, fx.Node) and value in self.state.several:
            found = (self._having(axes) for axes in self.state.several[value])
            return next((places for places in found if places), [])
        return self._having(self.state.of(value))

    def _having(self, axes: Any) -> list[int]:
        return [place for place, axis in enumerate(axes) if any(each is self.leaf for each in leaves(axis))]

    def _at(self, value: fx.Node, places: list[int]) -> bool:
        name, args = name_of(value), value.args
        if is_weight(value):
            return bool(value.meta["val"].is_floating_point())  # others are never masked
        if value.op == "placeholder" or value.target is operator.getitem:  # the input that varies is the cache
            return value.op == "placeholder" or self.at(args[0])
        if name in _WRITERS:
            return self._written(value, places)
        if name == "mul":
            return any(self.at(used) and len(self.places(used)) == len(places) for used in args[:2])
        if name in ("cat", "concat", "stack"):
            return all(self.at(used) for used in args[0] if self.places(used))  # type: ignore[union-attr]
        if name in _ADDED:
            return all(self.at(used) for used in args[:2])
        return name in _ZERO_AT_ZERO and self.at(args[0])

    def _written(self, value: fx.Node, places: list[int]) -> bool:
        """Zero weights make zeros on the axis that they make; others pass, and a bias is added to all their places."""
        given = normalized_arguments(value)
        makers = [given[name] for name in ("weight", "bias") if given.get(name) is not None]
        made = _made(value, given) if self.places(given.get("weight")) else range(0)
        if any(place in made for place in places) and not all(self.at(maker) for maker in makers):
            return False
        if all(place in made for place in places):
            return True
        shifted = given.get("bias") is not None or name_of(value) in ("embedding", "batch_norm")
        return not shifted and self.at(given["input"])


def _made(value: fx.Node, given: dict[str, Any]) -> range:
    """The axes of a result that the weight makes."""
    kind, name = value.meta["val"], name_of(value)
    assert isinstance(kind, Tensor)
    if name in _CONVOLUTIONS:
        place = kind.ndim - given["weight"].meta["val"].ndim + 1
        return range(place, place + 1)
    if name in ("group_norm", "batch_norm"):
        return range(1, 2)
    return range(kind.ndim - len(given.get("normalized_shape", (0,))), kind.ndim)
