"""Elementwise arithmetic, comparisons and logic, with torch's type promotion."""

import math
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

from sparc.codegen.onnx.emit import Emitter, Translation
from sparc.codegen.onnx.types import onnx_type


def promoted(*args: Any) -> torch.dtype:
    """The dtype torch computes in for these operands."""
    values = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in args]
    values = [
        1 if isinstance(value, torch.SymInt) else 1.0 if isinstance(value, torch.SymFloat) else value
        for value in values
    ]
    return torch.result_type(values[0], values[1])


def binary(operator: str) -> Translation:
    """`operator(a, b)` in the promoted dtype."""

    def translate(e: Emitter, node: fx.Node, a: Any, b: Any) -> ir.Value:
        dtype = promoted(a, b)
        return e.op(operator, e.cast(a, dtype), e.cast(b, dtype))

    return translate


def arithmetic(operator: str, on_bool: str = "") -> Translation:
    """`a + alpha * b` or the like, in the output's dtype; on booleans, `on_bool`."""

    def translate(e: Emitter, node: fx.Node, a: Any, b: Any, alpha: Any = 1) -> ir.Value:
        dtype = node.meta["val"].dtype
        if dtype == torch.bool and on_bool:
            return e.op(on_bool, e.cast(a, dtype), e.cast(b, dtype))
        right = e.cast(b, dtype)
        if alpha != 1:
            right = e.op("Mul", right, e.const(alpha, dtype))
        return e.op(operator, e.cast(a, dtype), right)

    return translate


def unary(operator: str, **attributes: Any) -> Translation:
    """`operator(x)` in the output's dtype."""

    def translate(e: Emitter, node: fx.Node, x: Any, **_: Any) -> ir.Value:
        return e.op(operator, e.cast(x, node.meta["val"].dtype), **attributes)

    return translate


def floating_only(operator: str) -> Translation:
    """`operator(x)`, which integers pass unchanged."""

    def translate(e: Emitter, node: fx.Node, x: fx.Node) -> ir.Value:
        return e.op(operator, x) if node.meta["val"].dtype.is_floating_point else e.value(x)

    return translate


def scaled(operator: str, factor: float) -> Translation:
    """`factor * operator(x)`."""

    def translate(e: Emitter, node: fx.Node, x: fx.Node) -> ir.Value:
        dtype = node.meta["val"].dtype
        return e.op("Mul", e.op(operator, e.cast(x, dtype)), e.const(factor, dtype))

    return translate


def logical(operator: str) -> Translation:
    """`operator` on truth values."""

    def translate(e: Emitter, node: fx.Node, *args: Any) -> ir.Value:
        return e.op(operator, *[e.cast(arg, torch.bool) for arg in args])

    return translate


def bitwise(operator: str, on_bool: str) -> Translation:
    """A bitwise operator; on booleans the logical one."""

    def translate(e: Emitter, node: fx.Node, *args: Any) -> ir.Value:
        dtype = node.meta["val"].dtype
        return e.op(on_bool if dtype == torch.bool else operator, *[e.cast(arg, dtype) for arg in args])

    return translate


def rsub(e: Emitter, node: fx.Node, a: Any, b: Any, alpha: Any = 1) -> ir.Value:
    """`b - alpha * a`."""
    return arithmetic("Sub")(e, node, b, a, alpha=alpha)  # type: ignore[return-value]


def divide(e: Emitter, node: fx.Node, a: Any, b: Any, rounding_mode: str | None = None) -> ir.Value:
    """`a / b`, rounded down or toward zero if asked."""
    dtype = node.meta["val"].dtype
    if rounding_mode is None:
        return e.op("Div", e.cast(a, dtype), e.cast(b, dtype))
    left, right = e.cast(a, dtype), e.cast(b, dtype)
    if dtype.is_floating_point:
        quotient = e.op("Div", left, right)
        if rounding_mode == "floor":
            return e.op("Floor", quotient)
        return e.op("Mul", e.op("Sign", quotient), e.op("Floor", e.op("Abs", quotient)))
    if rounding_mode == "floor":
        left = e.op("Sub", left, e.op("Mod", left, right))
    return e.op("Div", left, right)


def floor_divide(e: Emitter, node: fx.Node, a: Any, b: Any) -> ir.Value:
    """`floor(a / b)`."""
    return divide(e, node, a, b, "floor")


def remainder(e: Emitter, node: fx.Node, a: Any, b: Any) -> ir.Value:
    """`a - b * floor(a / b)`: the sign follows b."""
    dtype = node.meta["val"].dtype
    left, right = e.cast(a, dtype), e.cast(b, dtype)
    if not dtype.is_floating_point:
        return e.op("Mod", left, right)
    return e.op("Sub", left, e.op("Mul", right, e.op("Floor", e.op("Div", left, right))))


def fmod(e: Emitter, node: fx.Node, a: Any, b: Any) -> ir.Value:
    """The remainder whose sign follows a."""
    dtype = node.meta["val"].dtype
    return e.op("Mod", e.cast(a, dtype), e.cast(b, dtype), fmod=1)


def power(e: Emitter, node: fx.Node, base: Any, exponent: Any) -> ir.Value:
    """`base ** exponent`, with the cheap operator for the usual exponents."""
    dtype = node.meta["val"].dtype
    x = e.cast(base, dtype)
    if exponent == 2:
        return e.op("Mul", x, x)
    if exponent == 1:
        return x
    if exponent == 0.5:
        return e.op("Sqrt", x)
    if exponent in (-1, -1.0) and dtype.is_floating_point:
        return e.op("Reciprocal", x)
    if exponent == -0.5:
        return e.op("Reciprocal", e.op("Sqrt", x))
    return e.op("Pow", x, e.cast(exponent, dtype))


def rsqrt(e: Emitter, node: fx.Node, x: fx.Node) -> ir.Value:
    """`1 / sqrt(x)`, spelt so that runtimes recognise root-mean-square norms."""
    dtype = node.meta["val"].dtype
    return e.op("Div", e.const(1, dtype), e.op("Sqrt", e.cast(x, dtype)))


def clamp(e: Emitter, node: fx.Node, x: fx.Node, low: Any = None, high: Any = None, **named: Any) -> ir.Value:
    """`min(max(x, low), high)`, bounds being numbers or tensors."""
    low, high = named.get("min", low), named.get("max", high)
    dtype = node.meta["val"].dtype
    value = e.cast(x, dtype)
    plain = all(bound is None or isinstance(bound, (int, float)) for bound in (low, high))
    if plain and dtype not in (torch.bool, torch.int16):
        bounds = [None if bound is None or math.isinf(bound) else e.const(bound, dtype) for bound in (low, high)]
        return e.op("Clip", value, *bounds)
    if low is not None:
        value = e.op("Max", value, e.cast(low, dtype))
    return value if high is None else e.op("Min", value, e.cast(high, dtype))


def not_equal(e: Emitter, node: fx.Node, a: Any, b: Any) -> ir.Value:
    """`not (a == b)`."""
    return e.op("Not", binary("Equal")(e, node, a, b))


def where(e: Emitter, node: fx.Node, condition: fx.Node, a: Any, b: Any) -> ir.Value:
    """`condition ? a : b`, elementwise."""
    dtype = node.meta["val"].dtype
    return e.op("Where", e.cast(condition, torch.bool), e.cast(a, dtype), e.cast(b, dtype))


def masked_fill(e: Emitter, node: fx.Node, x: fx.Node, mask: fx.Node, value: Any) -> ir.Value:
    """`mask ? value : x`."""
    dtype = node.meta["val"].dtype
    return e.op("Where", mask, e.cast(value, dtype), x)


def addcmul(e: Emitter, node: fx.Node, x: fx.Node, a: fx.Node, b: fx.Node, *, value: Any = 1) -> ir.Value:
    """`x + value * a * b`."""
    dtype = node.meta["val"].dtype
    product = e.op("Mul", e.cast(a, dtype), e.cast(b, dtype))
    if value != 1:
        product = e.op("Mul", product, e.const(value, dtype))
    return e.op("Add", e.cast(x, dtype), product)


def round_decimals(e: Emitter, node: fx.Node, x: fx.Node, *, decimals: int = 0) -> ir.Value | None:
    """Round half to even."""
    return e.op("Round", x) if decimals == 0 and node.meta["val"].dtype.is_floating_point else None


def trunc(e: Emitter, node: fx.Node, x: fx.Node) -> ir.Value:
    """Round toward zero."""
    if not node.meta["val"].dtype.is_floating_point:
        return e.value(x)
    return e.op("Mul", e.op("Sign", x), e.op("Floor", e.op("Abs", x)))


def infinite(e: Emitter, node: fx.Node, x: fx.Node) -> ir.Value | None:
    """Whether elements are infinite."""
    return e.op("IsInf", x) if _is_float(x) else None


def nan(e: Emitter, node: fx.Node, x: fx.Node) -> ir.Value | None:
    """Whether elements are NaN."""
    return e.op("IsNaN", x) if _is_float(x) else None


def expm1(e: Emitter, node: fx.Node, x: fx.Node) -> ir.Value:
    """`exp(x) - 1`."""
    dtype = node.meta["val"].dtype
    return e.op("Sub", e.op("Exp", e.cast(x, dtype)), e.const(1, dtype))


def log1p(e: Emitter, node: fx.Node, x: fx.Node) -> ir.Value:
    """`log(1 + x)`."""
    dtype = node.meta["val"].dtype
    return e.op("Log", e.op("Add", e.cast(x, dtype), e.const(1, dtype)))


def cast_to(e: Emitter, dtype: torch.dtype, x: Any) -> ir.Value:
    """An explicit cast."""
    return e.op("Cast", x, to=onnx_type(dtype))


def _is_float(x: fx.Node) -> bool:
    return isinstance(x.meta["val"], Tensor) and x.meta["val"].dtype.is_floating_point


def _each(names: dict[str, str], make: Callable[[str], Translation], *overloads: str) -> dict[str, Translation]:
    return {f"aten.{name}.{overload}": make(operator) for name, operator in names.items() for overload in overloads}


_UNARY = [
    "abs",
    "neg",
    "sqrt",
    "exp",
    "log",
    "sin",
    "cos",
    "tan",
    "asin",
    "acos",
    "atan",
    "sinh",
    "cosh",
    "asinh",
    "acosh",
    "atanh",
    "erf",
    "sigmoid",
    "tanh",
    "sign",
    "reciprocal",
]
_COMPARE = {"eq": "Equal", "gt": "Greater", "lt": "Less", "ge": "GreaterOrEqual", "le": "LessOrEqual"}

TABLE: dict[str, Translation] = {
    **_each({name: name.capitalize() for name in _UNARY}, unary, "default"),
    "aten.sgn.default": unary("Sign"),
    **_each({"floor": "Floor", "ceil": "Ceil"}, floating_only, "default"),
    **_each(_COMPARE, binary, "Tensor", "Scalar"),
    **_each({"minimum": "Min", "maximum": "Max"}, binary, "default"),
    **{
        f"aten.{name}.{overload}": arithmetic(*operators)
        for overload in ("Tensor", "Scalar")
        for name, operators in {"add": ("Add", "Or"), "sub": ("Sub",), "mul": ("Mul", "And")}.items()
    },
    **{f"aten.rsub.{overload}": rsub for overload in ("Tensor", "Scalar")},
    **{f"aten.div.{overload}": divide for overload in ("Tensor", "Scalar", "Tensor_mode", "Scalar_mode")},
    **{f"aten.remainder.{overload}": remainder for overload in ("Tensor", "Scalar")},
    **{f"aten.fmod.{overload}": fmod for overload in ("Tensor", "Scalar")},
    **{f"aten.pow.{overload}": power for overload in ("Tensor_Scalar", "Tensor_Tensor", "Scalar")},
    **{f"aten.ne.{overload}": not_equal for overload in ("Tensor", "Scalar")},
    **{f"aten.where.{overload}": where for overload in ("self", "ScalarSelf", "ScalarOther", "Scalar")},
    **{f"aten.masked_fill.{overload}": masked_fill for overload in ("Scalar", "Tensor")},
    **{f"aten.clamp.{overload}": clamp for overload in ("default", "Tensor")},
    "aten.clamp_min.default": lambda e, node, x, low: clamp(e, node, x, low, None),
    "aten.clamp_max.default": lambda e, node, x, high: clamp(e, node, x, None, high),
    "aten.square.default": lambda e, node, x: e.op("Mul", x, x),
    "aten.max.other": binary("Max"),
    "aten.min.other": binary("Min"),
    "aten.floor_divide.default": floor_divide,
    "aten.floor_divide.Scalar": floor_divide,
    "aten.rsqrt.default": rsqrt,
    "aten.addcmul.default": addcmul,
    "aten.round.default": round_decimals,
    "aten.round.decimals": round_decimals,
    "aten.trunc.default": trunc,
    "aten.expm1.default": expm1,
    "aten.log1p.default": log1p,
    "aten.log2.default": scaled("Log", 1 / math.log(2)),
    "aten.log10.default": scaled("Log", 1 / math.log(10)),
    "aten.isinf.default": infinite,
    "aten.isnan.default": nan,
    "aten.logical_not.default": logical("Not"),
    **_each({"logical_and": "And", "logical_or": "Or", "logical_xor": "Xor"}, logical, "default"),
    "aten.bitwise_not.default": bitwise("BitwiseNot", "Not"),
    **{
        f"aten.{name}.{overload}": bitwise(f"Bitwise{kind}", kind)
        for kind in ("And", "Or", "Xor")
        for name in (f"bitwise_{kind.lower()}", f"__{kind.lower()}__")
        for overload in ("Tensor", "Scalar")
    },
}
