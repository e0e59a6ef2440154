"""Patterns written as plain calls: `lambda op, x, w: op.relu(op.linear(x, w))`.

The lambda's parameters after `op` are variables: each binds whatever stands there, a node, a list of nodes, a number,
a dtype. A variable with the default None also matches an argument that is absent. `op.NAME(...)` matches any overload
of `aten.NAME` (or `op.sparc.decode`, `op.getitem`); arguments that the pattern does not give must have their default
value. A value used twice in the lambda must be the same value in the graph. `add` and `mul` match in either order.
`op.either(p, q)` matches p or q. A pattern may return several results as a tuple; the later ones are searched among
the users of what the first one bound. `op.any()` matches anything and binds nothing; `op.weight(w)` lets the variable
`w` bind only weights; `op.such(p, test)` matches p where `test(value)` holds.
"""

import inspect
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from sparc.program import is_weight

_COMMUTATIVE = {
    "add",
    "mul",
    "logical_and",
    "bitwise_and",
    "logical_or",
    "bitwise_or",
    "eq",
    "ne",
    "maximum",
    "minimum",
}


@dataclass(frozen=True, eq=False)
class Variable:
    """Binds one argument."""

    name: str
    optional: bool = False


@dataclass(frozen=True, eq=False)
class Call:
    """A call of any overload of an operator."""

    packet: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def commutative(self) -> bool:
        """Whether the first two arguments may be swapped."""
        return getattr(self.packet, "__name__", "") in _COMMUTATIVE


@dataclass(frozen=True, eq=False)
class Anything:
    """Matches every value; made by `op.any()`."""


@dataclass(frozen=True, eq=False)
class Such:
    """A pattern and a test that the value must pass."""

    pattern: Any
    test: Callable[[Any], bool]


@dataclass(frozen=True, eq=False)
class Either:
    """The first of several patterns that matches."""

    options: tuple[Any, ...]


class Operators:
    """The `op` of a pattern: every attribute is an operator to call."""

    def __init__(self, namespace: Any = None) -> None:
        """Args: the torch.ops namespace; `aten` by default."""
        self._namespace = namespace if namespace is not None else torch.ops.aten

    def __getattr__(self, name: str) -> Any:
        if name == "either":
            return lambda *options: Either(options)
        if name == "any":
            return Anything
        if name == "such":
            return Such
        if name == "weight":
            return lambda variable: Such(variable, is_weight)
        if name == "getitem":
            return lambda *args: Call(operator.getitem, args, {})
        if name == "sparc":
            return Operators(torch.ops.sparc)
        packet = getattr(self._namespace, name)
        return lambda *args, **kwargs: Call(packet, args, kwargs)


@dataclass(frozen=True)
class Pattern:
    """A traced pattern: its results and its variables.

    Args:
        results: what must be found; the first anchors the search.
        variables: by name.
        written: where it was written, `file:line`.
    """

    results: tuple[Any, ...]
    variables: Mapping[str, Variable]
    written: str = ""


def trace(function: Callable[..., Any]) -> Pattern:
    """Trace a pattern lambda."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    variables = {p.name: Variable(p.name, p.default is None) for p in parameters}
    results = function(Operators(), *variables.values())
    code = function.__code__
    written = f"{code.co_filename.rpartition('/')[2]}:{code.co_firstlineno}"
    return Pattern(results if isinstance(results, tuple) else (results,), variables, written)


@dataclass(frozen=True)
class Found:
    """A match, however it was found.

    Args:
        values: what each variable bound.
        nodes: every node of the matched region.
        roots: the region's results, the anchor first.
    """

    values: Mapping[str, Any]
    nodes: tuple[fx.Node, ...]
    roots: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Bound:
    """A successful match: values by variable name, and the graph node of every pattern call."""

    values: Mapping[str, Any]
    nodes: Mapping[Any, fx.Node]

    def put_value(self, name: str, value: Any) -> "Bound | None":
        """With one more variable bound; None when it is already bound to something else."""
        if name in self.values:
            return self if _same(self.values[name], value) else None
        return Bound({**self.values, name: value}, self.nodes)

    def put_node(self, call: Call, node: fx.Node) -> "Bound | None":
        """With one more call bound; None when it is already bound to another node."""
        if call in self.nodes:
            return self if self.nodes[call] is node else None
        return Bound(self.values, {**self.nodes, call: node})


def match(pattern: Pattern, node: fx.Node) -> Found | None:
    """Match a pattern with its first result at `node`."""
    bound = next(_match_all(pattern.results[1:], _match(pattern.results[0], node, Bound({}, {}))), None)
    if bound is None:
        return None
    absent = {name: None for name, variable in pattern.variables.items() if variable.optional}
    roots = tuple(_root(result, bound) for result in pattern.results)
    return Found({**absent, **bound.values}, tuple(dict.fromkeys(bound.nodes.values())), roots)


def _root(result: Any, bound: Bound) -> fx.Node:
    if isinstance(result, Such):
        return _root(result.pattern, bound)
    if isinstance(result, Either):
        return next(root for option in result.options if (root := _root_or_none(option, bound)) is not None)
    return bound.nodes[result]


def _root_or_none(result: Any, bound: Bound) -> fx.Node | None:
    try:
        return _root(result, bound)
    except (KeyError, StopIteration):
        return None


def _match_all(rest: tuple[Any, ...], found: Iterator[Bound]) -> Iterator[Bound]:
    if not rest:
        yield from found
        return
    for bound in found:
        candidates = dict.fromkeys(user for node in _bound_nodes(bound) for user in node.users)
        for candidate in candidates:
            if candidate not in bound.nodes.values():
                yield from _match_all(rest[1:], _match(rest[0], candidate, bound))


def _bound_nodes(bound: Bound) -> list[fx.Node]:
    return [*bound.nodes.values(), *(value for value in bound.values.values() if isinstance(value, fx.Node))]


def _match(pattern: Any, value: Any, bound: Bound) -> Iterator[Bound]:
    if isinstance(pattern, Variable):
        extended = bound.put_value(pattern.name, value) if value is not None or pattern.optional else None
        if extended is not None:
            yield extended
    elif isinstance(pattern, Anything):
        yield bound
    elif isinstance(pattern, Such):
        if pattern.test(value):
            yield from _match(pattern.pattern, value, bound)
    elif isinstance(pattern, Either):
        for option in pattern.options:
            yield from _match(option, value, bound)
    elif isinstance(pattern, Call):
        if isinstance(value, fx.Node) and value.op == "call_function" and _packet(value.target) is pattern.packet:
            yield from _match_call(pattern, value, bound)
    elif isinstance(pattern, (list, tuple)):
        if isinstance(value, (list, tuple)) and len(value) == len(pattern):
            yield from _match_sequence(list(zip(pattern, value, strict=True)), bound)
    elif _same(pattern, value):
        yield bound


def _match_call(call: Call, node: fx.Node, bound: Bound) -> Iterator[Bound]:
    if call in bound.nodes:
        if bound.nodes[call] is node:
            yield bound
        return
    pairs = _pair_arguments(call, node)
    if pairs is None:
        return
    orders = [pairs]
    if call.commutative and len(pairs) >= 2:
        (first, a), (second, b), *others = pairs
        orders.append([(first, b), (second, a), *others])
    for order in orders:
        for found in _match_sequence(order, bound):
            extended = found.put_node(call, node)
            if extended is not None:
                yield extended


def _match_sequence(pairs: list[tuple[Any, Any]], bound: Bound) -> Iterator[Bound]:
    if not pairs:
        yield bound
        return
    (pattern, value), *rest = pairs
    for found in _match(pattern, value, bound):
        yield from _match_sequence(rest, found)


def _pair_arguments(call: Call, node: fx.Node) -> list[tuple[Any, Any]] | None:
    """Each pattern argument with the node's; None when an argument the pattern leaves out is not at its default."""
    actual = normalized_arguments(node)
    if len(call.args) > len(actual):
        return None
    names = list(actual)
    given = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
    if any(name not in actual for name in given):
        return None
    defaults = _defaults(node)
    for name, value in actual.items():
        if name not in given and not _same(defaults.get(name, inspect.Parameter.empty), value):
            return None
    return [(pattern, actual[name]) for name, pattern in given.items() if not _absent(pattern, actual[name])]


def _absent(pattern: Any, value: Any) -> bool:
    return False if isinstance(pattern, Variable) else (pattern is None and value is None)


def normalized_arguments(node: fx.Node) -> dict[str, Any]:
    """Every argument of a node by its schema's name, in order, defaults filled in."""
    if not isinstance(node.target, OpOverload):
        return {str(index): argument for index, argument in enumerate(node.args)} | dict(node.kwargs)
    arguments: dict[str, Any] = {}
    for index, argument in enumerate(node.target._schema.arguments):
        if index < len(node.args):
            arguments[argument.name] = node.args[index]
        elif argument.name in node.kwargs:
            arguments[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            arguments[argument.name] = argument.default_value
    return arguments


def _defaults(node: fx.Node) -> dict[str, Any]:
    if not isinstance(node.target, OpOverload):
        return {}
    return {a.name: a.default_value for a in node.target._schema.arguments if a.has_default_value()}


def _packet(target: Any) -> Any:
    return target.overloadpacket if isinstance(target, OpOverload) else target


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return a is b
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, float) or isinstance(b, float):
        return isinstance(a, (int, float)) and isinstance(b, (int, float)) and math.isclose(a, b, rel_tol=1e-9)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
