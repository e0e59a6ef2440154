"""Symbolic sizes as JSON: a number, a symbol's name, or `{"op": "Add", "args": [...]}`; and the symbols themselves.

A symbol is described by its kind, its range, the size it had in the example and the user's name for it. Only the
functions of a fixed table can be named, and nothing is ever evaluated as text.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy import functions
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.symbol import SymT, symbol_is_type
from torch.utils._sympy.value_ranges import ValueRanges

from sparc.serialize import schema
from sparc.serialize.schema import malformed, unwritable

_OWN = ("FloorDiv", "ModularIndexing", "Mod", "PythonMod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv", "Max",
        "Min", "TruncToInt", "TruncToFloat", "RoundToInt", "ToFloat", "FloatTrueDiv", "IntTrueDiv", "PowByNatural",
        "FloatPow", "Where", "Identity", "OpaqueUnaryFn_sqrt")  # fmt: skip
_SYMPY = ("Add", "Mul", "Pow", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not")
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(functions, name) for name in _OWN if hasattr(functions, name)},
    **{name: getattr(sympy, name) for name in _SYMPY},
}
_CLASSES: dict[Any, str] = {
    **{value: name for name, value in _FUNCTIONS.items()},
    sympy.Equality: "Eq", sympy.Unequality: "Ne", sympy.StrictLessThan: "Lt", sympy.LessThan: "Le",
    sympy.StrictGreaterThan: "Gt", sympy.GreaterThan: "Ge",
}  # fmt: skip
_KINDS: dict[str, tuple[SymT, dict[str, bool]]] = {
    "size": (SymT.SIZE, {"integer": True, "positive": True}),
    "integer": (SymT.SIZE, {"integer": True}),
    "unknown integer": (SymT.UNBACKED_INT, {"integer": True}),
    "unknown number": (SymT.UNBACKED_FLOAT, {"real": True}),
}
_SYMBOL = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
Expression = Any


# expressions --------------------------------------------------------------------------------------------------------
def expression_to_json(expression: Expression) -> Any:
    """An expression (or a plain number) as JSON.

    Raises:
        ArtifactError: SPARC508 for a function that is not in the table.
    """
    if isinstance(expression, (bool, int)):
        return expression
    if isinstance(expression, sympy.Symbol):
        return str(expression)
    if expression is sympy.true or expression is sympy.false:
        return bool(expression)
    if expression.is_Integer:
        return int(expression)
    if expression.is_Rational:
        return {"op": "Rational", "args": [int(expression.p), int(expression.q)]}
    if expression.is_Float:
        return {"float": float(expression).hex()}
    name = _CLASSES.get(expression.func)
    if name is None:
        raise unwritable("a symbolic size cannot be written", f"{expression.func.__name__} in {expression}")
    return {"op": name, "args": [expression_to_json(argument) for argument in expression.args]}


def expression_from_json(value: Any, symbols: Mapping[str, sympy.Symbol], depth: int = 0) -> Expression:
    """The inverse of `expression_to_json`.

    Raises:
        ArtifactError: SPARC503.
    """
    if isinstance(value, bool):
        return sympy.true if value else sympy.false
    if isinstance(value, int):
        return sympy.Integer(schema.integer(value, "a size"))
    if isinstance(value, str):
        if value not in symbols:
            raise malformed(f"unknown symbol {value[:80]!r}")
        return symbols[value]
    if depth > schema.MAX_DEPTH:
        raise malformed("a size is nested too deeply")
    if isinstance(value, dict) and "float" in value:
        return sympy.Float(float.fromhex(schema.fields(value, "a number", ["float"])["float"]))
    found = schema.fields(value, "a size", ["op", "args"])
    arguments = [
        expression_from_json(argument, symbols, depth + 1) for argument in schema.items(found["args"], "arguments")
    ]
    if found["op"] == "Rational":
        return sympy.Rational(*arguments)
    if found["op"] not in _FUNCTIONS:
        raise malformed(f"unknown function {str(found['op'])[:80]!r} in a size")
    _check_arguments(found["op"], arguments)
    try:
        return _FUNCTIONS[found["op"]](*arguments)
    except Exception as error:  # sympy's functions and torch's check their arguments in many ways
        raise malformed(f"{found['op']} in a size is impossible", f"{type(error).__name__}: {error}"[:200]) from None


def _check_arguments(name: str, arguments: list[Any]) -> None:
    if name in ("Add", "Mul", "Pow") and any(argument in (sympy.true, sympy.false) for argument in arguments):
        raise malformed("a size calculates with truth values")
    if name in ("Pow", "PowByNatural", "FloatPow") and not (arguments[1].is_number and abs(arguments[1]) <= 16):
        raise malformed("an exponent in a size is no small number")


def size_to_json(size: Any) -> Any:
    """A dimension of a shape: an int or a SymInt."""
    return size if isinstance(size, int) else expression_to_json(size.node.expr)


def evaluate(value: Any, symbols: Mapping[str, sympy.Symbol], sizes: Mapping[sympy.Symbol, int]) -> Any:
    """The number that a dimension's JSON stands for when the symbols have these sizes."""
    if isinstance(value, int):
        return value
    result = expression_from_json(value, symbols).xreplace(
        {symbol: sympy.Integer(size) for symbol, size in sizes.items()}
    )
    if result in (sympy.true, sympy.false):
        return bool(result)
    return int(result) if result.is_integer else float(result)


# symbols ------------------------------------------------------------------------------------------------------------
def symbols_to_json(environment: ShapeEnv | None, used: set[sympy.Symbol]) -> dict[str, Any]:
    """Kind, range and example size of every used symbol, by name, in order of name.

    Raises:
        ArtifactError: SPARC508 for a symbol of another kind.
    """
    described: dict[str, Any] = {}
    for symbol in sorted(used, key=str):
        assert environment is not None
        each: dict[str, Any] = {"kind": _kind(symbol)}
        span = environment.var_to_range.get(symbol)
        if span is not None and span.is_int:
            each["range"] = [_bound(span.lower), _bound(span.upper)]
        hint = _hints(environment).get(symbol)
        if hint is not None:
            each["example"] = int(hint)
        described[str(symbol)] = each
    return described


def _kind(symbol: sympy.Symbol) -> str:
    if symbol_is_type(symbol, SymT.SIZE):
        return "size" if symbol.is_positive else "integer"
    if symbol_is_type(symbol, SymT.UNBACKED_INT):
        return "unknown integer"
    if symbol_is_type(symbol, SymT.UNBACKED_FLOAT):
        return "unknown number"
    raise unwritable(f"symbol {symbol} cannot be written")


def _bound(value: Any) -> int | None:
    return int(value) if value.is_Integer and abs(int(value)) <= schema.MAX_INT else None


def _hints(environment: ShapeEnv) -> Mapping[sympy.Symbol, Any]:
    found: Mapping[sympy.Symbol, Any] = getattr(environment, "backed_var_to_val", None) or getattr(
        environment, "var_to_val", {}
    )
    return found


def symbols_from_json(described: Any) -> tuple[ShapeEnv, dict[str, sympy.Symbol]]:
    """A shape environment that knows the symbols, and the symbols by name.

    Raises:
        ArtifactError: SPARC503.
    """
    environment = ShapeEnv(specialize_zero_one=True, duck_shape=False)
    symbols: dict[str, sympy.Symbol] = {}
    unknown = 0
    for name, each in schema.entries(described, "symbols").items():
        schema.fields(each, f"symbol {name}", ["kind"], ["range", "example"])
        if not _SYMBOL.fullmatch(name) or each["kind"] not in _KINDS:
            raise malformed(f"symbol {name[:80]!r} is of no known kind")
        kind, assumptions = _KINDS[each["kind"]]
        symbol = sympy.Symbol(name, **assumptions)
        if not symbol_is_type(symbol, kind):
            raise malformed(f"symbol {name!r} is no {each['kind']}")
        symbols[name] = symbol
        low, high = (_limit(bound) for bound in each.get("range", [None, None]))
        if low is not None and high is not None and low > high:
            raise malformed(f"symbol {name!r} has an empty range")
        environment.var_to_range[symbol] = ValueRanges(
            -int_oo if low is None else low, int_oo if high is None else high
        )
        if "example" in each:
            _set_hint(environment, symbol, schema.integer(each["example"], "an example size"))
        if kind is SymT.UNBACKED_INT:
            unknown = max(unknown, int(name[1:]) + 1)
    environment.unbacked_symint_counter = unknown  # type: ignore[assignment]
    return environment, symbols


def _limit(value: Any) -> int | None:
    return None if value is None else schema.integer(value, "a bound")


def _set_hint(environment: ShapeEnv, symbol: sympy.Symbol, value: int) -> None:
    add = getattr(environment, "add_backed_var_to_val", None) or environment.add_var_to_val
    add(symbol, value)


def symbolic(value: Any, symbols: Mapping[str, sympy.Symbol], environment: ShapeEnv, kind: type = int) -> Any:
    """A number, or the SymInt (SymFloat, SymBool) of a size's JSON in this environment."""
    if isinstance(value, int):
        return value
    expression = expression_from_json(value, symbols)
    if expression.is_number:
        return kind(expression)
    hints = _hints(environment)
    known = all(symbol in hints for symbol in expression.free_symbols)
    hint = kind(expression.xreplace(dict(hints))) if known else None
    wrapper: Any = {int: torch.SymInt, float: torch.SymFloat, bool: torch.SymBool}[kind]
    return wrapper(SymNode(expression, environment, kind, hint))


def prime_sizes(described: Mapping[str, Any], symbols: Mapping[str, sympy.Symbol]) -> dict[sympy.Symbol, int]:
    """A size for every symbol, all different and prime where its range allows, so that no two sizes agree by chance."""
    sizes: dict[sympy.Symbol, int] = {}
    for name, symbol in symbols.items():
        low, high = described[name].get("range", [None, None])
        low = 2 if low is None else max(low, 2)
        taken = set(sizes.values())
        candidate = sympy.nextprime(max(low - 1, 10))
        while candidate in taken:
            candidate = sympy.nextprime(candidate)
        sizes[symbol] = (
            int(candidate) if high is None or candidate <= high else int(described[name].get("example", low))
        )
    return sizes
