"""Arguments and types of nodes as JSON.

Arguments: null, booleans, integers, finite floats and strings stand for themselves, a list for a list. Everything else
is an object with one key: `{"node": name}`, `{"float": "inf"}`, `{"dtype": "float32"}`, `{"layout": "strided"}`,
`{"memory_format": "channels_last"}`, `{"device": "cpu"}`, `{"tuple": [...]}`, `{"complex": [re, im]}`.

Types: `{"dtype", "shape", "stride"?}` for a tensor (strides only where it is not contiguous), `{"list": [...]}` for
several results, `{"size": expression}`, `{"number": expression}`, `{"truth": expression}` for symbolic scalars, null
for nothing.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from sparc.serialize import schema
from sparc.serialize.schema import malformed, unwritable
from sparc.serialize.symbols import evaluate, expression_to_json, size_to_json, symbolic

_DTYPES = {
    name: value
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "uint16",
                 "uint32", "uint64", "bool", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2")
    if isinstance(value := getattr(torch, name, None), torch.dtype)
}  # fmt: skip
_LAYOUTS = {"strided": torch.strided}
_FORMATS = {
    name: getattr(torch, name) for name in ("contiguous_format", "channels_last", "channels_last_3d", "preserve_format")
}
_TABLES: dict[str, Mapping[str, Any]] = {"dtype": _DTYPES, "layout": _LAYOUTS, "memory_format": _FORMATS}
_SYMBOLIC: dict[type, tuple[str, type]] = {
    torch.SymInt: ("size", int),
    torch.SymFloat: ("number", float),
    torch.SymBool: ("truth", bool),
}
_SYMINTS = (torch.SymInt, torch.SymFloat, torch.SymBool)
_SCALARS = {key: kind for key, kind in _SYMBOLIC.values()}


# dtypes -------------------------------------------------------------------------------------------------------------
def dtype_to_text(dtype: torch.dtype) -> str:
    """`float32`."""
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise unwritable(f"dtype {name} cannot be stored")
    return name


def dtype_from_text(name: Any) -> torch.dtype:
    """The inverse of `dtype_to_text`."""
    if not isinstance(name, str) or name not in _DTYPES:
        raise malformed(f"unknown dtype {str(name)[:40]!r}")
    return _DTYPES[name]


# arguments ----------------------------------------------------------------------------------------------------------
def argument_to_json(value: Any) -> Any:
    """One argument of a node.

    Raises:
        ArtifactError: SPARC508 for a value that has no form.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple) and not isinstance(value, list):
        return {"tuple": [argument_to_json(item) for item in value]}
    if isinstance(value, list):
        return [argument_to_json(item) for item in value]
    if isinstance(value, complex):
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if isinstance(value, torch.dtype):
        return {"dtype": dtype_to_text(value)}
    if isinstance(value, torch.device):
        if value.type != "cpu":
            raise unwritable(f"device {value} cannot be stored")
        return {"device": "cpu"}
    for key, table in _TABLES.items():
        for name, known in table.items():
            if type(value) is type(known) and value == known:
                return {key: name}
    raise unwritable(f"an argument of type {type(value).__name__} cannot be stored")


class ArgumentReader:
    """Reads arguments of one graph."""

    def __init__(self, nodes: Mapping[str, fx.Node]) -> None:
        """Args: the nodes read so far, by name."""
        self._nodes = nodes

    def read(self, value: Any, depth: int = 0) -> Any:
        """One argument.

        Raises:
            ArtifactError: SPARC503.
        """
        if value is None or isinstance(value, (bool, float)):
            return value
        if isinstance(value, int):
            return schema.integer(value, "an argument")
        if isinstance(value, str):
            return schema.text(value, "an argument")
        if depth > schema.MAX_DEPTH:
            raise malformed("an argument is nested too deeply")
        if isinstance(value, list):
            return [self.read(item, depth + 1) for item in value]
        if not isinstance(value, dict) or len(value) != 1:
            raise malformed("an argument is neither a value nor an object with one key")
        return self._special(*next(iter(value.items())), depth)

    def _special(self, key: str, value: Any, depth: int) -> Any:
        if key == "node":
            if value not in self._nodes:
                raise malformed(f"node {str(value)[:80]!r} is used before it is computed")
            return self._nodes[value]
        if key == "tuple":
            return tuple(self.read(item, depth + 1) for item in schema.items(value, "a tuple"))
        if key == "float" and value in ("inf", "-inf", "nan"):
            return float(value)
        if key == "device" and value == "cpu":
            return torch.device("cpu")
        if key == "complex":
            real, imaginary = (
                float.fromhex(schema.text(part, "a number", 64)) for part in schema.items(value, "a complex number")
            )
            return complex(real, imaginary)
        if key in _TABLES and isinstance(value, str) and value in _TABLES[key]:
            return _TABLES[key][value]
        raise malformed(f"unknown argument {key[:40]!r}: {str(value)[:80]!r}")


# types --------------------------------------------------------------------------------------------------------------
def type_to_json(value: Any) -> Any:
    """The type in a node's `meta["val"]`."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, Tensor):
        described = {"dtype": dtype_to_text(value.dtype), "shape": [size_to_json(size) for size in value.shape]}
        if not _contiguous(value):
            described["stride"] = [size_to_json(step) for step in value.stride()]
        return described
    if isinstance(value, (tuple, list)):
        return {"list": [type_to_json(item) for item in value]}
    for kind, (key, _) in _SYMBOLIC.items():
        if isinstance(value, kind):
            return {key: expression_to_json(value.node.expr)}  # type: ignore[attr-defined]
    if isinstance(value, float):
        return {"number": {"float": value.hex()}}
    raise unwritable(f"a value of type {type(value).__name__} cannot be stored")


def _contiguous(value: Tensor) -> bool:
    """Whether the strides are visibly those of a contiguous tensor; asking the tensor would add guards to its world."""
    expected: Any = sympy.Integer(1)
    for size, step in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if sympy.sympify(_expression(step)) != expected:
            return False
        expected = expected * _expression(size)
    return True


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def symbols_of(value: Any) -> set[sympy.Symbol]:
    """Every symbol in a type."""
    if isinstance(value, Tensor):
        sizes = [*value.shape, *value.stride()]
        return {symbol for size in sizes if isinstance(size, torch.SymInt) for symbol in size.node.expr.free_symbols}
    if isinstance(value, (tuple, list)):
        return {symbol for item in value for symbol in symbols_of(item)}
    return set(value.node.expr.free_symbols) if isinstance(value, _SYMINTS) else set()


class TypeReader:
    """Reads types into FakeTensors: symbolic ones for the program, and concrete ones at given sizes for checking."""

    def __init__(self, mode: FakeTensorMode, symbols: Mapping[str, sympy.Symbol], environment: ShapeEnv) -> None:
        """Args: the mode that makes the FakeTensors, the symbols, and the environment they live in."""
        self._mode, self._symbols, self._environment = mode, symbols, environment
        self._known: dict[
            str, Any
        ] = {}  # a type is immutable, so equal ones are one object: graphs have few different types

    def read(self, value: Any) -> Any:
        """A type, symbolic."""
        key = repr(value)
        if key not in self._known:
            scalar = partial(symbolic, symbols=self._symbols, environment=self._environment)
            self._known[key] = _read_type(value, lambda size, kind: scalar(size, kind=kind), self._mode)
        return self._known[key]

    def at(self, sizes: Mapping[sympy.Symbol, int], mode: FakeTensorMode) -> Callable[[Any], Any]:
        """A reader of types where every symbol has a size."""
        known: dict[str, Any] = {}

        def read(value: Any) -> Any:
            key = repr(value)
            if key not in known:
                known[key] = _read_type(value, lambda size, kind: kind(evaluate(size, self._symbols, sizes)), mode)
            return known[key]

        return read


def _read_type(value: Any, scalar: Callable[[Any, type], Any], mode: FakeTensorMode, depth: int = 0) -> Any:
    if value is None or isinstance(value, (bool, int)):
        return value
    if depth > 4:
        raise malformed("a type is nested too deeply")
    found = schema.mapping(value, "a type")
    if "list" in found:
        inner = schema.items(schema.fields(found, "a type", ["list"])["list"], "a type")
        return [_read_type(item, scalar, mode, depth + 1) for item in inner]
    for key, kind in _SCALARS.items():
        if key in found:
            return scalar(schema.fields(found, "a type", [key])[key], kind)
    schema.fields(found, "a tensor's type", ["dtype", "shape"], ["stride"])
    shape = [scalar(size, int) for size in schema.items(found["shape"], "a shape")]
    if len(shape) > schema.MAX_RANK or any(isinstance(size, int) and not 0 <= size <= schema.MAX_INT for size in shape):
        raise malformed("a shape is out of bounds")
    dtype = dtype_from_text(found["dtype"])
    strides = [scalar(step, int) for step in schema.items(found.get("stride", []), "strides")]
    try:
        with mode:
            return torch.empty_strided(shape, strides, dtype=dtype) if strides else torch.empty(shape, dtype=dtype)
    except Exception as error:  # torch refuses impossible types in ways of its own
        raise malformed("a type is impossible", f"{type(error).__name__}: {error}"[:200]) from None
