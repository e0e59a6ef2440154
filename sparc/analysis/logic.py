"""Closed forms for `sparc.analysis.elements`: numbers, booleans of one canonical form, and constant tables."""

from collections.abc import Callable
from typing import Any

import sympy
import torch
from sympy import Expr, Integer
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from sympy.logic.boolalg import BooleanAtom, BooleanFunction
from torch import Tensor

Index = tuple[Expr, ...]

_TABLE_LIMIT = 1 << 24


class Unknown(Exception):
    """The element is no function of the indices alone, or the operator is not described."""


def number(value: float) -> Any:
    """A float or integer as sympy holds it exactly."""
    if value in (float("inf"), float("-inf")):
        return sympy.oo if value > 0 else -sympy.oo
    if isinstance(value, int) or (value == int(value) and abs(value) < 2**53):
        return Integer(int(value))
    return sympy.Float(value, 17)


def table_element(table: Tensor, index: Index) -> Any:
    """A closed form of a constant table: one value, a count along one axis, or a triangle over the last two axes."""
    if table.numel() == 0 or table.numel() > _TABLE_LIMIT:
        raise Unknown
    first = table.flatten()[0]
    if bool((table == first).all()):
        return _scalar(first)
    counted = _counting(table, index)
    if counted is not None:
        return counted
    triangle = _triangle(table, index)
    if triangle is not None:
        return triangle
    raise Unknown


def _scalar(value: Tensor) -> Any:
    item = value.item()
    return (sympy.true if item else sympy.false) if isinstance(item, bool) else number(item)  # type: ignore[arg-type]


def _counting(table: Tensor, index: Index) -> Any | None:
    """`start + step * i` along one axis, when all other axes repeat it."""
    if table.dtype == torch.bool:
        return None
    for axis, size in enumerate(table.shape):
        line = table.movedim(axis, 0).reshape(size, -1)
        if size < 2 or not bool((line == line[:, :1]).all()):
            continue
        column = line[:, 0].double()
        start, step = column[0], column[1] - column[0]
        if torch.equal(column, start + step * torch.arange(size, dtype=torch.float64)):
            return number(start.item()) + number(step.item()) * index[axis]
    return None


def _triangle(table: Tensor, index: Index) -> Any | None:
    """One value on and below a diagonal, another above it."""
    if table.ndim < 2:
        return None
    matrix = table.reshape(-1, *table.shape[-2:])
    if not bool((matrix == matrix[:1]).all()):
        return None
    matrix = matrix[0]
    rows, columns = matrix.shape
    row = matrix[0]
    changed = (row != row[0]).nonzero()
    diagonal = int(changed[0]) - 1 if len(changed) else columns - 1
    below = torch.ones(rows, columns, dtype=torch.bool).tril(diagonal)
    low, high = matrix[0, 0], matrix[~below][0] if bool((~below).any()) else None
    if high is None or not torch.equal(torch.where(below, low, high), matrix):
        return None
    inside = at_least_zero(index[-2] + diagonal - index[-1])
    return choose(inside, _scalar(low), _scalar(high))


# logic ---------------------------------------------------------------------------------------------------------------
def at_least_zero(expression: Expr) -> Any:
    """The boolean `expression >= 0` in one canonical form."""
    return sympy.Ge(sympy.expand(expression), 0)


def map_branches(function: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    """A function of two numbers, branch by branch where both depend on one condition."""
    both = isinstance(a, sympy.Piecewise) and isinstance(b, sympy.Piecewise)
    if both and [condition for _, condition in a.args] == [condition for _, condition in b.args]:
        pairs = zip(a.args, b.args, strict=True)
        return sympy.Piecewise(*((function(x, y), condition) for (x, condition), (y, _) in pairs))
    return sympy.piecewise_fold(function(a, b))


def choose(condition: Any, yes: Any, no: Any) -> Any:
    """`yes` where the condition holds, else `no`; booleans become logic."""
    if condition in (sympy.true, sympy.false):
        return yes if condition == sympy.true else no
    if yes == no:
        return yes
    if yes in (sympy.true, sympy.false) and no in (sympy.true, sympy.false):
        return condition if yes == sympy.true else sympy.Not(condition)
    return sympy.Piecewise((as_number(yes), condition), (as_number(no), True))


def negate(condition: Any) -> Any:
    """The negation, again as `expression >= 0` where it was one: not (n >= 0) is -n - 1 >= 0 for an integer n."""
    if isinstance(condition, sympy.Ge) and condition.args[1] == 0 and condition.args[0].is_integer:
        return at_least_zero(-condition.args[0] - 1)
    return sympy.Not(condition)


def as_number(value: Any) -> Any:
    """A boolean as 0 or 1; numbers unchanged."""
    if value in (sympy.true, sympy.false):
        return Integer(1 if value == sympy.true else 0)
    return sympy.Piecewise((Integer(1), value), (Integer(0), True)) if _is_boolean(value) else value


def as_boolean(value: Any) -> Any:
    """A number as `value != 0`; booleans unchanged."""
    if _is_boolean(value):
        return value
    value = sympy.piecewise_fold(value)
    if value.is_number:
        return sympy.true if value != 0 else sympy.false
    if isinstance(value, AppliedUndef):
        return sympy.Ne(value, 0)
    if (
        isinstance(value, sympy.Piecewise)
        and all(branch.is_number for branch, _ in value.args)
        and len(value.args) == 2
    ):
        (yes, condition), (no, _) = value.args
        return choose(condition, sympy.true if yes != 0 else sympy.false, sympy.true if no != 0 else sympy.false)
    raise Unknown


def _is_boolean(value: Any) -> bool:
    return isinstance(value, (BooleanFunction, BooleanAtom, Relational))  # a Symbol is a Boolean too
