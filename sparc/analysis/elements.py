"""Element functions: what stands at index (i, j, ...) of a value that depends on sizes only, as an expression in the
indices.

`arange(n)[i] = i`, `unsqueeze`, `expand` and `index` rearrange indices, comparisons and logic act on elements. So a
mask that a model builds from `arange` is *proved* to be causal for every size: its element at `(..., q, k)` is `q - k
>= 0` as an expression, not by trying some sizes.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from sympy import Expr, Integer
from torch import Tensor, fx

from sparc.analysis.logic import (
    Index,
    Unknown,
    as_boolean,
    as_number,
    at_least_zero,
    choose,
    map_branches,
    negate,
    number,
    table_element,
)
from sparc.analysis.values import size_expression
from sparc.pattern import normalized_arguments
from sparc.program import Program, is_weight


def index_symbols(rank: int) -> Index:
    """Symbols for the indices of a tensor: integers that are not negative."""
    return tuple(sympy.Symbol(f"i{axis}", integer=True, nonnegative=True) for axis in range(rank))


def element(
    program: Program, node: Any, index: Index, inputs: Mapping[fx.Node, Callable[[Index], Any]] | None = None
) -> Any:
    """The element of `node` at `index`: a sympy number expression, or a sympy boolean.

    Args:
        program: the program.
        node: a node of one of its graphs, or a number.
        index: one expression for each axis.
        inputs: names for the elements of inputs that it may depend on.

    Raises:
        Unknown: when it depends on other inputs, or on an operator without a rule.
    """
    return _Reader(program, inputs or {}).read(node, index)


@dataclass
class _Reader:
    program: Program
    inputs: Mapping[fx.Node, Callable[[Index], Any]] = field(default_factory=dict)

    def read(self, value: Any, index: Index) -> Any:
        if isinstance(value, bool):
            return sympy.true if value else sympy.false
        if isinstance(value, (int, float)):
            return number(value)
        if not isinstance(value, fx.Node):
            raise Unknown
        if isinstance(value.meta.get("val"), torch.SymInt):
            return size_expression(value.meta["val"])
        if value in self.inputs:
            return self.inputs[value](index)
        if is_weight(value):
            return table_element(self.program.weights[str(value.target)], index)
        rule = _RULES.get(_name(value)) if value.op == "call_function" else None
        if rule is None:
            raise Unknown
        return rule(self, value, index)

    def operand(self, value: Any, index: Index) -> Any:
        """The element of an operand that is broadcast to the result."""
        if isinstance(value, fx.Node) and isinstance(value.meta.get("val"), Tensor):
            shape = value.meta["val"].shape
            index = index[len(index) - len(shape) :]
            index = tuple(
                Integer(0) if isinstance(size, int) and size == 1 else each
                for size, each in zip(shape, index, strict=True)
            )
        return self.read(value, index)


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "_opname", None) or getattr(node.target, "__name__", ""))


# rules ---------------------------------------------------------------------------------------------------------------
def _arguments(node: fx.Node) -> dict[str, Any]:
    return normalized_arguments(node)


def _rank(node: Any) -> int:
    return int(node.meta["val"].ndim)


def _arange(reader: _Reader, node: fx.Node, index: Index) -> Any:
    arguments = _arguments(node)
    start, step = reader.read(arguments.get("start", 0), ()), reader.read(arguments.get("step", 1), ())
    return start + step * index[0]


def _filled(value: Any) -> Callable[..., Any]:
    return lambda reader, node, index: (
        value if node.meta["val"].dtype != torch.bool else (sympy.true if value == 1 else sympy.false)
    )


def _full(reader: _Reader, node: fx.Node, index: Index) -> Any:
    value = reader.read(_arguments(node).get("fill_value"), ())
    return as_boolean(value) if node.meta["val"].dtype == torch.bool else as_number(value)


def _same(reader: _Reader, node: fx.Node, index: Index) -> Any:
    return reader.operand(node.args[0], index)


def _cast(reader: _Reader, node: fx.Node, index: Index) -> Any:
    value = reader.operand(node.args[0], index)
    kind = node.meta["val"].dtype
    if kind == torch.bool:
        return as_boolean(value)
    value = as_number(value)
    if not kind.is_floating_point and node.args[0].meta["val"].dtype.is_floating_point:  # type: ignore[union-attr]
        raise Unknown
    return value


def _unsqueeze(reader: _Reader, node: fx.Node, index: Index) -> Any:
    axis = int(node.args[1]) % len(index)  # type: ignore[arg-type]
    return reader.read(node.args[0], index[:axis] + index[axis + 1 :])


def _reshape(reader: _Reader, node: fx.Node, index: Index) -> Any:
    """Only what inserts and removes axes of size one."""
    old, new = node.args[0].meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
    kept = [each for size, each in zip(new, index, strict=True) if not (isinstance(size, int) and size == 1)]
    sizes = [size_expression(size) for size in new if not (isinstance(size, int) and size == 1)]
    if sizes != [size_expression(size) for size in old if not (isinstance(size, int) and size == 1)]:
        raise Unknown
    feed = iter(kept)
    return reader.read(
        node.args[0], tuple(Integer(0) if isinstance(size, int) and size == 1 else next(feed) for size in old)
    )


def _slice(reader: _Reader, node: fx.Node, index: Index) -> Any:
    arguments = _arguments(node)
    axis = arguments["dim"] % len(index)
    start = reader.read(arguments.get("start") or 0, ())
    if not (start.is_nonnegative and arguments.get("step", 1) == 1):
        raise Unknown
    moved = (*index[:axis], index[axis] + start, *index[axis + 1 :])
    return reader.read(node.args[0], moved)


def _select(reader: _Reader, node: fx.Node, index: Index) -> Any:
    axis, at = int(node.args[1]) % (len(index) + 1), reader.read(node.args[2], ())  # type: ignore[arg-type]
    if not at.is_nonnegative:
        raise Unknown
    return reader.read(node.args[0], (*index[:axis], at, *index[axis:]))


def _permute(reader: _Reader, node: fx.Node, index: Index) -> Any:
    order = list(range(len(index)))
    if _name(node) == "permute":
        order = [int(axis) % len(index) for axis in node.args[1]]  # type: ignore[arg-type, union-attr]
    else:
        a, b = (0, 1) if _name(node) == "t" else (int(axis) % len(index) for axis in node.args[1:3])  # type: ignore[arg-type]
        order[a], order[b] = order[b], order[a]
    before: list[Expr] = [Integer(0)] * len(index)
    for position, axis in enumerate(order):
        before[axis] = index[position]
    return reader.read(node.args[0], tuple(before))


def _index(reader: _Reader, node: fx.Node, index: Index) -> Any:
    """`x[a, b, ...]` with one index tensor for every axis."""
    source, indices = node.args[0], node.args[1]
    if len(indices) != _rank(source) or any(each is None for each in indices):  # type: ignore[arg-type, union-attr]
        raise Unknown
    positions = tuple(as_number(reader.operand(each, index)) for each in indices)  # type: ignore[union-attr]
    if not all(each.is_nonnegative for each in positions):  # a negative position counts from the end
        raise Unknown
    return reader.read(source, positions)


def _gather(reader: _Reader, node: fx.Node, index: Index) -> Any:
    """`x[.., i[...], ..]` along one axis."""
    axis = int(node.args[1]) % len(index)  # type: ignore[arg-type]
    position = as_number(reader.read(node.args[2], index))
    if not position.is_nonnegative:
        raise Unknown
    return reader.read(node.args[0], (*index[:axis], position, *index[axis + 1 :]))


def _binary(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def rule(reader: _Reader, node: fx.Node, index: Index) -> Any:
        if node.kwargs or len(node.args) != 2:
            raise Unknown
        a, b = (reader.operand(each, index) for each in node.args)
        return function(a, b)

    return rule


def _arithmetic(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return _binary(lambda a, b: map_branches(function, as_number(a), as_number(b)))


def _compare(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return _binary(lambda a, b: function(as_number(a), as_number(b)))


def _equal(a: Any, b: Any) -> Any:
    difference = sympy.expand(a - b)
    return sympy.true if difference == 0 else sympy.false if difference.is_nonzero else sympy.Eq(difference, 0)


def _whole(a: Any, b: Any) -> tuple[Any, Any]:
    if not (a.is_integer and b.is_integer):
        raise Unknown
    return a, b


def _less(a: Any, b: Any) -> Any:
    a, b = _whole(a, b)
    return at_least_zero(b - a - 1)


def _less_equal(a: Any, b: Any) -> Any:
    a, b = _whole(a, b)
    return at_least_zero(b - a)


def _logic(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return _binary(lambda a, b: function(as_boolean(a), as_boolean(b)))


def _not(reader: _Reader, node: fx.Node, index: Index) -> Any:
    if node.meta["val"].dtype != torch.bool:
        raise Unknown
    return negate(as_boolean(reader.operand(node.args[0], index)))


def _where(reader: _Reader, node: fx.Node, index: Index) -> Any:
    condition, yes, no = (reader.operand(each, index) for each in node.args)
    return choose(as_boolean(condition), yes, no)


def _masked_fill(reader: _Reader, node: fx.Node, index: Index) -> Any:
    value, condition, filled = (reader.operand(each, index) for each in node.args)
    return choose(negate(as_boolean(condition)), value, filled)


def _tril(reader: _Reader, node: fx.Node, index: Index) -> Any:
    arguments = _arguments(node)
    value = reader.read(node.args[0], index)
    offset = index[-2] + reader.read(arguments["diagonal"], ()) - index[-1]
    inside = at_least_zero(offset) if _name(node) == "tril" else at_least_zero(-offset)
    zero = sympy.false if node.meta["val"].dtype == torch.bool else Integer(0)
    return choose(inside, value, zero)


def _cumsum(reader: _Reader, node: fx.Node, index: Index) -> Any:
    """Of an element that does not change along the axis."""
    axis = int(node.args[1]) % len(index)  # type: ignore[arg-type]
    value = as_number(reader.read(node.args[0], index))
    if value.has(index[axis]) and index[axis].free_symbols:
        raise Unknown
    return sympy.expand(value * (index[axis] + 1))


def _diff(reader: _Reader, node: fx.Node, index: Index) -> Any:
    """Of a sequence with one element prepended, when the first difference continues the others."""
    arguments = _arguments(node)
    axis, prepended = arguments["dim"] % len(index), arguments.get("prepend")
    if (
        arguments["n"] != 1
        or arguments.get("append") is not None
        or prepended is None
        or prepended.meta["val"].shape[axis] != 1
    ):
        raise Unknown

    def at(value: Any, position: Any) -> Any:
        return as_number(reader.read(value, (*index[:axis], position, *index[axis + 1 :])))

    first = sympy.expand(at(node.args[0], Integer(0)) - at(prepended, Integer(0)))
    later = sympy.expand(at(node.args[0], index[axis]) - at(node.args[0], index[axis] - 1))
    if first != later:
        raise Unknown
    return later


_RULES: dict[str, Callable[..., Any]] = {
    "arange": _arange,
    **dict.fromkeys(["full", "full_like", "new_full", "scalar_tensor"], _full),
    **dict.fromkeys(["zeros", "zeros_like", "new_zeros"], _filled(Integer(0))),
    **dict.fromkeys(["ones", "ones_like", "new_ones"], _filled(Integer(1))),
    **dict.fromkeys(["expand", "alias", "clone", "contiguous", "expand_as", "detach"], _same),
    "to": _cast,
    "unsqueeze": _unsqueeze,
    **dict.fromkeys(["reshape", "view", "squeeze"], _reshape),
    "slice": _slice,
    "select": _select,
    **dict.fromkeys(["permute", "transpose", "t"], _permute),
    "index": _index,
    "gather": _gather,
    "add": _arithmetic(operator.add),
    "sub": _arithmetic(operator.sub),
    "rsub": _arithmetic(lambda a, b: b - a),
    "mul": _arithmetic(operator.mul),
    "eq": _compare(_equal),
    "ne": _compare(lambda a, b: sympy.Not(_equal(a, b))),
    "le": _compare(_less_equal),
    "lt": _compare(_less),
    "ge": _compare(lambda a, b: _less_equal(b, a)),
    "gt": _compare(lambda a, b: _less(b, a)),
    **dict.fromkeys(["__and__", "bitwise_and", "logical_and"], _logic(sympy.And)),
    **dict.fromkeys(["__or__", "bitwise_or", "logical_or"], _logic(sympy.Or)),
    **dict.fromkeys(["bitwise_not", "logical_not"], _not),
    "where": _where,
    "masked_fill": _masked_fill,
    **dict.fromkeys(["tril", "triu"], _tril),
    "cumsum": _cumsum,
    "diff": _diff,
}


def mask_condition(program: Program, mask: fx.Node, lowest: float) -> Any | None:
    """When attention looks at key `k` from query `q`, as a boolean in the last two index symbols; None when it depends
    on inputs.

    Args:
        program: the program.
        mask: a boolean mask (True: look), or an additive one whose elements are 0 or at most `lowest`.
        lowest: an additive value that, like every lower one, means "do not look".
    """
    index = index_symbols(_rank(mask))
    try:
        value = element(program, mask, index)
        if mask.meta["val"].dtype == torch.bool:
            return as_boolean(value)
        value = sympy.piecewise_fold(value)
        if value == 0:
            return sympy.true
        if not isinstance(value, sympy.Piecewise) or len(value.args) != 2:
            return None
        (yes, condition), (no, _) = value.args
        if yes == 0 and _is_lowest(no, lowest):
            return condition
        return negate(condition) if no == 0 and _is_lowest(yes, lowest) else None
    except (Unknown, TypeError):
        return None


def _is_lowest(value: Any, lowest: float) -> bool:
    return bool(value.is_number) and float(value) <= lowest
