"""Mixtures of experts: whether the numbers of experts that a router gives are only used to find the experts.

Then an expert can be removed: the others get other numbers, and nothing sees the difference.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sparc.grouped import is_grouped_linear
from sparc.pattern import normalized_arguments
from sparc.program import is_weight

aten = torch.ops.aten

_CARRIES = frozenset({"reshape", "view", "flatten", "_unsafe_view", "to", "_to_copy", "contiguous", "clone", "alias"})


@dataclass(frozen=True)
class Routing:
    """Where the numbers of experts go.

    Args:
        counts: the `histc` nodes that count the rows of each expert.
        ends: what sums the counts up, for grouped products.
        lookups: the `index` nodes that read the rows of a weight by the experts' numbers.
        gathers: the `gather` nodes that read scores by them.
    """

    counts: tuple[fx.Node, ...]
    ends: tuple[fx.Node, ...]
    lookups: tuple[fx.Node, ...]
    gathers: tuple[fx.Node, ...]


def routing(top: fx.Node) -> Routing | None:
    """How the places that a `topk` node gives are used; None when some use sees which numbers they are.

    Args:
        top: a `topk` over the last axis of its input, which has one score for each expert.
    """
    scores = normalized_arguments(top)["self"].meta["val"]
    found: dict[str, list[fx.Node]] = {"counts": [], "ends": [], "lookups": [], "gathers": []}
    places = [user for user in top.users if user.target is operator.getitem and user.args[1] == 1]
    if not all(_follow(place, scores.shape[-1], found) for place in places) or not found["ends"]:
        return None
    return Routing(**{name: tuple(nodes) for name, nodes in found.items()})


def _follow(numbers: fx.Node, experts: int, found: dict[str, list[fx.Node]]) -> bool:
    return all(_is_use(user, numbers, experts, found) for user in numbers.users)


def _is_use(user: fx.Node, numbers: fx.Node, experts: int, found: dict[str, list[fx.Node]]) -> bool:
    """Whether one operator only finds experts by their numbers."""
    name = str(getattr(user.target, "_opname", ""))
    given = normalized_arguments(user) if user.op == "call_function" and name else {}
    if name in _CARRIES:
        return _follow(user, experts, found)
    if name == "sort":
        firsts = [each for each in user.users if each.target is operator.getitem and each.args[1] == 0]
        return all(_follow(each, experts, found) for each in firsts)
    if name == "histc" and (given["bins"], given["min"], given["max"]) == (experts, 0, experts - 1):
        found["counts"].append(user)
        return all(_is_end(each, found) for each in user.users)
    if name == "index" and given["indices"] == [numbers] and is_weight(given["self"]):
        found["lookups"].append(user)
        return bool(given["self"].meta["val"].shape[0] == experts)
    if name == "gather" and given["index"] is numbers and _is_last(given["self"].meta["val"], given["dim"], experts):
        found["gathers"].append(user)
        return True
    return False


def _is_end(node: fx.Node, found: dict[str, list[fx.Node]]) -> bool:
    """Whether counts are only summed up, to say where each expert's rows end."""
    if getattr(node.target, "_opname", "") != "cumsum":
        return False
    found["ends"].append(node)
    return all(is_grouped_linear(user) and user.args[2] is node for user in node.users)


def _is_last(value: Any, axis: int, size: int) -> bool:
    return isinstance(value, Tensor) and axis in (-1, value.ndim - 1) and value.shape[-1] == size
