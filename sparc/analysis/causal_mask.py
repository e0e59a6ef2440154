"""Attention masks of decoders with a cache, proved from the graph: causal, in a window maybe, with keys hidden."""

from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx

from sparc.analysis.elements import element, index_symbols
from sparc.analysis.logic import Unknown, as_boolean, at_least_zero
from sparc.analysis.values import size_expression
from sparc.program import Program


@dataclass(frozen=True)
class CausalMask:
    """Query `i` sees key `j` when `i + offset - window < j <= i + offset`, where `padding[batch, j]` is not zero.

    Args:
        window: how many keys a query sees at most, itself included; None for all before it.
        padded: whether keys are hidden by an input.
    """

    window: int | None
    padded: bool


def read_causal_mask(program: Program, mask: fx.Node, padding: fx.Node, offset: Any) -> CausalMask | None:
    """What a boolean mask `[..., queries, keys]` is proved to mean for every size; None when it means something else.

    Args:
        program: the program.
        mask: the mask, True where a key is visible.
        padding: the input `[batch, keys]` that hides keys where it is zero.
        offset: how many keys stand before the first query, a size.
    """
    rank = mask.meta["val"].ndim
    index = index_symbols(rank)
    hidden = sympy.Function("padding", integer=True)
    try:
        value = element(program, mask, index, {padding: lambda place: hidden(*place)})
        condition = as_boolean(value)
    except (Unknown, TypeError):
        return None
    before = index[-2] + size_expression(offset) - index[-1]
    terms = set(condition.args if isinstance(condition, sympy.And) else [condition])
    causal, seen = at_least_zero(before), sympy.Ne(hidden(index[0], index[-1]), 0)
    if causal not in terms or (seen in terms and rank != 4):
        return None
    rest = terms - {causal, seen}
    windows = [_window(each, before) for each in rest]
    if len(windows) > 1 or None in windows:
        return None
    return CausalMask(windows[0] if windows else None, seen in terms)


def _window(condition: Any, before: Any) -> int | None:
    """The window `w` of a condition `before < w`; None when it is another condition."""
    if not isinstance(condition, sympy.Ge) or condition.args[1] != 0:
        return None
    width = sympy.expand(condition.args[0] + before) + 1
    return int(width) if width.is_Integer and width > 0 else None
