"""Axes as terms: unification finds a common structure or freezes both, and never pairs the wrong channels."""

import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparc.analysis.axes import (
    ONE,
    Axis,
    Channels,
    Product,
    Sum,
    cut_extent,
    divide,
    extent,
    factor,
    freeze,
    leaves,
    mark,
    normal,
    positions,
    remaining,
    repeats,
    split,
    unify,
)


def places(axis: Axis) -> list[frozenset[tuple[int, int]]]:
    """For each place along an axis, the channels it belongs to that are not frozen, as (leaf, number)."""
    found: list[set[tuple[int, int]]] = [set() for _ in range(extent(axis))]
    for leaf in {leaf for leaf in leaves(axis) if not leaf.frozen}:
        index = positions(axis, leaf)
        assert index is not None
        for unit, own in enumerate(index.tolist()):
            for place in own:
                found[place].add((id(leaf), unit))
    return [frozenset(each) for each in found]


@st.composite
def terms(draw: st.DrawFn, size: int) -> Axis:
    """Any axis of a size."""
    kind = draw(st.sampled_from(["leaf", "sum", "product"])) if size > 1 else "leaf"
    divisors = [each for each in range(2, size) if size % each == 0]
    if kind == "sum":
        at = draw(st.integers(1, size - 1))
        return Sum((draw(terms(at)), draw(terms(size - at))))
    if kind == "product" and divisors:
        inner = draw(st.sampled_from(divisors))
        return Product((draw(terms(size // inner)), draw(terms(inner))))
    return Channels(size)


@given(st.data(), st.sampled_from([6, 8, 12, 24]))
@settings(max_examples=300, deadline=None)
def test_channels_that_are_not_frozen_are_at_the_same_places_of_unified_axes(data: st.DataObject, size: int) -> None:
    a, b = data.draw(terms(size)), data.draw(terms(size))
    unify(a, b)
    assert extent(a) == extent(b) == size
    assert places(a) == places(b)


def test_rotary_halves_are_one_run_of_pairs() -> None:
    head = Channels(8)
    first, second = split(head, 4)  # type: ignore[misc]
    unify(head, Sum((second, first)))
    (pairs,) = set(leaves(head))
    assert positions(head, pairs).tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]  # type: ignore[union-attr]


def test_rotary_pairs_by_steps() -> None:
    head = Channels(8)
    pairs, parity = factor(head, 2)  # type: ignore[misc]
    assert positions(head, pairs).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]  # type: ignore[union-attr, arg-type]
    assert positions(head, parity).tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]  # type: ignore[union-attr, arg-type]


def test_one_matrix_of_queries_keys_and_values_with_grouped_heads() -> None:
    rows = Channels(8 * 4)  # 4 heads of queries, 2 of keys, 2 of values, of 4 channels each
    parts = []
    rest: Axis = rows
    for count in (4, 2, 2):
        part, rest = split(rest, count * 4)  # type: ignore[misc]
        parts.append(Product((Channels(count), Channels(4))))
        unify(part, parts[-1])
    query, key, value = (part.factors for part in parts)
    repeated = Channels(2)
    unify(query[0], Product((key[0], repeated)))
    unify(key[0], value[0])
    unify(query[1], key[1])
    (heads,) = leaves(key[0])
    assert positions(rows, heads).tolist() == [  # type: ignore[union-attr]
        [*range(0, 8), *range(16, 20), *range(24, 28)],
        [*range(8, 16), *range(20, 24), *range(28, 32)],
    ]
    assert positions(rows, repeated).tolist() == [[*range(4), *range(8, 12)], [*range(4, 8), *range(12, 16)]]  # type: ignore[union-attr]
    assert cut_extent(rows, {heads: torch.tensor([1])}) == 16
    assert remaining(rows, {heads: torch.tensor([1])}).tolist() == positions(rows, heads)[1].tolist()  # type: ignore[index]


def test_without_a_common_refinement_both_are_frozen() -> None:
    a, b = Product((Channels(6), Channels(4))), Product((Channels(8), Channels(3)))
    unify(a, b)
    assert all("no common refinement" in leaf.frozen for leaf in (*leaves(a), *leaves(b)))


def test_reasons_follow_what_is_unified_later() -> None:
    a, parts = Channels(6), (Channels(2), Channels(4))
    freeze(a, "why")
    mark(a, "a norm")
    unify(a, Sum(parts))
    assert [(part.frozen, part.statistic) for part in parts] == [("why", "a norm")] * 2
    halves = split(parts[1], 2)
    assert halves is not None
    assert [leaf.frozen for half in halves for leaf in leaves(half)] == ["why"] * 2


def test_sizes_that_vary() -> None:
    batch = sympy.Symbol("s0", positive=True, integer=True)
    heads = Channels(4)
    merged = Product((Channels(batch), heads))
    back = Channels(batch), Channels(4)
    unify(merged, Product(back))
    assert normal(back[1]) is normal(heads)
    assert divide(extent(merged), 4) == batch
    assert divide(extent(merged), 8) is None
    assert cut_extent(merged, {normal(heads): torch.tensor([0, 1])}) == 2 * batch


def test_a_channel_inside_itself_has_no_index() -> None:
    leaf = Channels(3)
    square = Product((leaf, leaf))
    assert repeats(square) == [leaf]
    assert positions(square, leaf) is None


def test_axes_of_size_one_have_no_channels() -> None:
    assert list(leaves(Product((ONE, ONE)))) == []
    assert normal(Sum((Channels(0), ONE))) is ONE
