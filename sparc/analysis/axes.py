"""Axes as terms: how the channels of one axis are made of channels that can be removed.

An axis is `Channels` (an indivisible run of channels), a `Sum` (axes one behind the other, as `cat` makes them) or a
`Product` (an axis inside an axis, the first factor outermost, as `reshape` makes them: 32 channels are 4 heads of 8).
Two axes whose channels must go together are unified; where they are cut differently, `Channels` are split or factored
until both have the same structure. So rotary halves become `d + d`, grouped queries `heads * repeats`, and the input
of a grouped convolution `groups * channels`, without any index being enumerated.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import sympy
import torch
from torch import Tensor

from sparc.analysis.values import size_expression

_NO_REFINEMENT = "its channels are arranged in two ways that have no common refinement"


@dataclass(eq=False)
class Channels:
    """A run of channels that is not divided.

    Args:
        size: how many; a sympy expression where the program's sizes vary.
        frozen: why no channel may be removed; empty when they may.
        statistic: what runs over all channels, so that removing one changes the others; empty when nothing does.
        bound: the term it was found to be, after unification.
    """

    size: Any
    frozen: str = ""
    statistic: str = ""
    bound: "Axis | None" = None


@dataclass(frozen=True, eq=False)
class Sum:
    """Axes one behind the other."""

    parts: tuple["Axis", ...]


@dataclass(frozen=True, eq=False)
class Product:
    """Axes inside each other, the outermost first; without factors, an axis of size one."""

    factors: tuple["Axis", ...]


Axis = Channels | Sum | Product
ONE = Product(())


def concrete(size: Any) -> Any:
    """A size as an int where it is fixed, else as a sympy expression."""
    if isinstance(size, int):
        return size
    expression = sympy.expand(size if isinstance(size, sympy.Expr) else size_expression(size))
    return int(expression) if expression.is_Integer else expression


def channels(size: Any, frozen: str = "") -> Axis:
    """A new axis."""
    known = concrete(size)
    return ONE if known == 1 and isinstance(known, int) else Channels(known, frozen)


def extent(axis: Axis) -> Any:
    """The size of an axis."""
    if isinstance(axis, Channels):
        return axis.size
    if isinstance(axis, Sum):
        return concrete(sum(extent(part) for part in axis.parts))
    size: Any = 1
    for factor in axis.factors:
        size = size * extent(factor)
    return concrete(size)


def normal(axis: Axis) -> Axis:
    """The axis with everything that is known put in: no bound channels, no sum in a sum, no product in a product."""
    if isinstance(axis, Channels):
        if axis.bound is None:
            return axis
        axis.bound = normal(axis.bound)
        return axis.bound
    kind = type(axis)
    old = axis.parts if isinstance(axis, Sum) else axis.factors
    found: list[Axis] = []
    for child in map(normal, old):
        inner = child.parts if isinstance(child, Sum) else child.factors if isinstance(child, Product) else (child,)
        found.extend(inner if type(child) is kind else (child,))
    if kind is Sum:
        found = [part for part in found if extent(part) != 0]
    if len(found) == 1:
        return found[0]
    if not found and kind is Product:
        return ONE
    same = len(found) == len(old) and all(a is b for a, b in zip(found, old, strict=True))
    return axis if same else kind(tuple(found))


def leaves(axis: Axis) -> Iterator[Channels]:
    """The channels an axis is made of, in order; some may come more than once."""
    axis = normal(axis)
    if isinstance(axis, Channels):
        yield axis
        return
    for child in axis.parts if isinstance(axis, Sum) else axis.factors:
        yield from leaves(child)


def freeze(axis: Axis, why: str) -> None:
    """No channel of the axis may be removed; the first reason counts."""
    for leaf in leaves(axis):
        leaf.frozen = leaf.frozen or why


def mark(axis: Axis, what: str) -> None:
    """Something runs over all channels of the axis; the first counts."""
    for leaf in leaves(axis):
        leaf.statistic = leaf.statistic or what


# unification ---------------------------------------------------------------------------------------------------------
def unify(a: Axis, b: Axis) -> None:
    """Channels at equal places of two axes of one size go together from now on; what cannot be arranged is frozen."""
    a, b = normal(a), normal(b)
    if a is b:
        return
    if concrete(extent(a) - extent(b)) != 0:
        _give_up(a, b)
    elif isinstance(a, Channels):
        _bind(a, b)
    elif isinstance(b, Channels):
        _bind(b, a)
    elif isinstance(a, Product) and isinstance(b, Product):
        _unify_products(a, b)
    elif isinstance(a, Sum):
        _unify_sum(a, b)
    else:
        assert isinstance(b, Sum)
        _unify_sum(b, a)


def _bind(leaf: Channels, axis: Axis) -> None:
    if any(inner is leaf for inner in leaves(axis)):
        _give_up(leaf, axis)
        return
    leaf.bound = axis
    if leaf.frozen:
        freeze(axis, leaf.frozen)
    if leaf.statistic:
        mark(axis, leaf.statistic)


def _give_up(a: Axis, b: Axis) -> None:
    freeze(a, _NO_REFINEMENT)
    freeze(b, _NO_REFINEMENT)


def _unify_sum(a: Sum, b: Axis) -> None:
    """Part by part from the front, the longer one split at the end of the shorter one."""
    if isinstance(b, Product):
        inner = b.factors[-1]
        if any(divide(extent(part), extent(Product(b.factors[1:]))) is None for part in a.parts):
            factored = factor(a, extent(inner))
            if factored is None:
                _give_up(a, b)
            else:
                unify(factored[1], inner)
                unify(factored[0], Product(b.factors[:-1]))
            return
    left: list[Axis] = list(a.parts)
    right: list[Axis] = list(b.parts) if isinstance(b, Sum) else [b]
    while left and right:
        longer = left if _is_less(extent(right[0]), extent(left[0])) else right
        shorter = right if longer is left else left
        pieces = split(longer[0], extent(shorter[0]))
        if pieces is None:
            _give_up(a, b)
            return
        unify(pieces[0], shorter.pop(0))
        longer[:1] = [] if extent(pieces[1]) == 0 else [pieces[1]]


def _is_less(a: Any, b: Any) -> bool:
    return bool(isinstance(a, int) and isinstance(b, int) and a < b)


def _unify_products(a: Product, b: Product) -> None:
    """Factor by factor from the innermost, the larger one divided by the smaller one."""
    left, right = list(a.factors), list(b.factors)
    while left and right:
        larger = left if divide(extent(left[-1]), extent(right[-1])) is not None else right
        smaller = right if larger is left else left
        pieces = factor(larger.pop(), extent(smaller[-1]))
        if pieces is None:
            _give_up(a, b)
            return
        unify(pieces[1], smaller.pop())
        if extent(pieces[0]) != 1:
            larger.append(pieces[0])


def divide(size: Any, by: Any) -> Any | None:
    """The quotient of two sizes; None when it is no whole number for every value of the symbols."""
    if isinstance(size, int) and isinstance(by, int):
        return size // by if by and size % by == 0 else None
    numerator, denominator = sympy.fraction(sympy.cancel(sympy.sympify(size) / sympy.sympify(by)))
    return concrete(numerator) if denominator == 1 else None


def split(axis: Axis, at: Any) -> tuple[Axis, Axis] | None:
    """The first `at` channels and the others; None when the axis has no such boundary and can get none."""
    axis = normal(axis)
    rest = concrete(extent(axis) - at)
    if at == 0 or rest == 0:
        return (axis, Sum(())) if rest == 0 else (Sum(()), axis)
    if isinstance(axis, Channels):
        if not (isinstance(at, int) and isinstance(axis.size, int)):
            return None
        halves = tuple(Channels(size, axis.frozen, axis.statistic) for size in (at, rest))
        axis.bound = Sum(halves)
        return halves[0], halves[1]
    if isinstance(axis, Product):
        if not axis.factors:
            return None
        outer, inner = axis.factors[0], axis.factors[1:]
        quotient = divide(at, extent(Product(inner)))
        found = split(outer, quotient) if quotient is not None else None
        return found and (Product((found[0], *inner)), Product((found[1], *inner)))
    for index, part in enumerate(axis.parts):
        if _is_less(at, extent(part)) or extent(part) == at:
            found = split(part, at)
            return found and (Sum((*axis.parts[:index], found[0])), Sum((found[1], *axis.parts[index + 1 :])))
        at = concrete(at - extent(part))
    return None


def factor(axis: Axis, size: Any) -> tuple[Axis, Axis] | None:
    """The axis as an outer one of inner ones of `size`; None when it cannot be."""
    axis = normal(axis)
    quotient = divide(extent(axis), size)
    if quotient is None or size == 1 or quotient == 1:
        return None if quotient is None else (axis, ONE) if size == 1 else (ONE, axis)
    if isinstance(axis, Channels):
        outer, inner = (Channels(each, axis.frozen, axis.statistic) for each in (quotient, size))
        axis.bound = Product((outer, inner))
        return outer, inner
    if isinstance(axis, Sum):
        return _factor_sum(axis, size)
    last, others = axis.factors[-1], axis.factors[:-1]
    if divide(extent(last), size) is not None:
        found = factor(last, size)
        return found and (Product((*others, found[0])), found[1])
    missing = divide(size, extent(last))
    found = factor(Product(others), missing) if missing is not None else None
    return found and (found[0], Product((found[1], last)))


def _factor_sum(axis: Sum, size: Any) -> tuple[Axis, Axis] | None:
    if any(divide(extent(part), size) is None for part in axis.parts):
        return None
    found = [factor(part, size) for part in axis.parts]
    pairs = [pair for pair in found if pair is not None]
    if len(pairs) < len(found):
        return None
    for _, inner in pairs[1:]:
        unify(inner, pairs[0][1])
    return Sum(tuple(outer for outer, _ in pairs)), pairs[0][1]


# channels of an axis -------------------------------------------------------------------------------------------------
def positions(axis: Axis, leaf: Channels) -> Tensor | None:
    """`[leaf.size, each]` int64: the places along the axis that belong to each channel of the leaf, in order.

    None when a place belongs to two of them.
    """
    axis = normal(axis)
    if axis is leaf:
        return torch.arange(leaf.size).reshape(-1, 1)
    owner = _owners(axis, leaf)
    if owner is None:
        return None
    places = torch.nonzero(owner >= 0).flatten()
    return places[torch.argsort(owner[places], stable=True)].reshape(leaf.size, -1)


def _owners(axis: Axis, leaf: Channels) -> Tensor | None:
    """`[size]`: the channel of the leaf at each place, or -1."""
    if isinstance(axis, Channels):
        return torch.arange(leaf.size) if axis is leaf else torch.full((axis.size,), -1)
    if isinstance(axis, Sum):
        parts = [_owners(part, leaf) for part in axis.parts]
        return None if any(part is None for part in parts) else torch.cat([part for part in parts if part is not None])
    found = torch.full((1,), -1)
    for each in axis.factors:
        inner = _owners(each, leaf)
        if inner is None or (bool((found >= 0).any()) and bool((inner >= 0).any())):
            return None
        found = torch.maximum(found.repeat_interleave(len(inner)), inner.repeat(len(found)))
    return found


def repeats(axis: Axis) -> list[Channels]:
    """Channels that are factors of themselves in an axis: one place belongs to two of them."""
    axis = normal(axis)
    if isinstance(axis, Channels):
        return []
    children = axis.parts if isinstance(axis, Sum) else axis.factors
    found = [leaf for child in children for leaf in repeats(child)]
    if isinstance(axis, Product):
        owned: Sequence[set[Channels]] = [set(leaves(child)) for child in children]
        found += [leaf for index, own in enumerate(owned) for leaf in own if any(leaf in o for o in owned[:index])]
    return found


def remaining(axis: Axis, kept: dict[Channels, Tensor]) -> Tensor:
    """The places along an axis of fixed size that are left when some leaves consist of their `kept` channels.

    Args:
        axis: the axis.
        kept: for each leaf that changes, the int64 channels that it consists of, in order; one may come several times.

    Returns:
        int64 places; in ascending order if those of every leaf are.
    """
    axis = normal(axis)
    if isinstance(axis, Channels):
        return kept[axis] if axis in kept else torch.arange(axis.size)
    if isinstance(axis, Sum):
        starts = accumulate((extent(part) for part in axis.parts), initial=0)
        return torch.cat([remaining(part, kept) + start for part, start in zip(axis.parts, starts, strict=False)])
    found = torch.zeros(1, dtype=torch.int64)
    for each in axis.factors:
        found = (found[:, None] * extent(each) + remaining(each, kept)).flatten()
    return found


def cut_extent(axis: Axis, kept: dict[Channels, Tensor]) -> Any:
    """The size of an axis when only the `kept` channels of some leaves stay."""
    axis = normal(axis)
    if isinstance(axis, Channels):
        return len(kept[axis]) if axis in kept else axis.size
    if isinstance(axis, Sum):
        return concrete(sum(cut_extent(part, kept) for part in axis.parts))
    size: Any = 1
    for each in axis.factors:
        size = size * cut_extent(each, kept)
    return concrete(size)
