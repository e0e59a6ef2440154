"""Symbolic sizes: sympy expressions over dynamic dimensions become int64 values, each computed once."""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import onnx_ir as ir
import sympy
import torch
from torch import Tensor

from sparc import codes
from sparc.diag import LoweringError

if TYPE_CHECKING:
    from sparc.codegen.onnx.build import Builder

Size: TypeAlias = int | torch.SymInt | sympy.Expr
_INT = ir.DataType.INT64


def expression(size: Any) -> sympy.Expr:
    """A size as a sympy expression."""
    if isinstance(size, (torch.SymInt, torch.SymFloat)):
        return size.node.expr
    return sympy.sympify(size)


class Sizes:
    """Where each dynamic dimension can be read, and every expression made from them so far.

    Sizes are held as int64 vectors of length one; `scalar` and `vector` give other forms.
    """

    def __init__(self, builder: "Builder") -> None:
        """Args: where to put nodes."""
        self._builder = builder
        self._sources: dict[sympy.Symbol, Callable[[], ir.Value]] = {}
        self._made: dict[sympy.Expr, ir.Value] = {}
        self._runs: dict[tuple[sympy.Expr, ...], Callable[[], ir.Value]] = {}

    def learn(self, value: ir.Value, fake: Tensor) -> None:
        """Remember the dimensions of `value` that are plain symbols, and runs of several, unless they are known."""
        exprs = tuple(expression(size) for size in fake.shape)
        for start in range(len(exprs)):
            for end in range(start + 2, len(exprs) + 1):
                if any(not expr.is_Integer for expr in exprs[start:end]):
                    self._runs.setdefault(exprs[start:end], functools.partial(self._read, value, start, end))
        for axis, size in enumerate(fake.shape):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                self._sources.setdefault(size.node.expr, functools.partial(self._read, value, axis, axis + 1))

    def learn_scalar(self, value: ir.Value, symbol: sympy.Expr) -> None:
        """Remember that a computed scalar is this symbol."""
        if symbol.is_Symbol:
            as_vector = functools.partial(self._op, "Reshape", value, self._builder.constant([1], _INT))
            self._sources.setdefault(symbol, as_vector)

    def knows(self, symbol: sympy.Symbol) -> bool:
        """Whether a symbol can be computed."""
        return symbol in self._sources

    def length(self, size: Size) -> ir.Value:
        """One size as an int64 vector of length one."""
        return self._emit(expression(size))

    def scalar(self, size: Size) -> ir.Value:
        """One size as an int64 scalar."""
        expr = expression(size)
        if expr.is_Integer:
            return self._builder.constant(int(expr), _INT)
        return self._op("Squeeze", self._emit(expr))

    def vector(self, sizes: Sequence[Size]) -> ir.Value:
        """Sizes as one int64 vector."""
        exprs = tuple(map(expression, sizes))
        if exprs in self._runs:
            return self._runs[exprs]()
        pieces: list[ir.Value] = []
        run: list[int] = []
        for expr in exprs:
            if expr.is_Integer:
                run.append(int(expr))
                continue
            if run:
                pieces.append(self._builder.constant(run, _INT))
                run = []
            pieces.append(self._emit(expr))
        if run or not pieces:
            pieces.append(self._builder.constant(run, _INT))
        return pieces[0] if len(pieces) == 1 else self._op("Concat", *pieces, axis=0)

    def reads(self, sizes: Sequence[Size]) -> bool:
        """Whether `vector` needs no computation: all is known, or one Shape gives it."""
        exprs = tuple(map(expression, sizes))
        symbolic = [expr for expr in exprs if not expr.is_Integer]
        return exprs in self._runs or not symbolic or (len(exprs) == 1 and exprs[0].is_Symbol)

    def _op(self, operator: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        scope, self._builder.scope = self._builder.scope, "sizes"
        made = self._builder.node(operator, inputs, attributes)[0]
        self._builder.scope = scope
        made.type = ir.TensorType(attributes["to"]) if "to" in attributes else ir.TensorType(inputs[0].dtype or _INT)
        return made

    def _read(self, value: ir.Value, start: int, end: int) -> ir.Value:
        made = self._op("Shape", value, start=start, end=end)
        made.type = ir.TensorType(_INT)
        return made

    def _emit(self, expr: sympy.Expr) -> ir.Value:
        if expr not in self._made:
            self._made[expr] = self._make(expr)
        return self._made[expr]

    def _make(self, expr: sympy.Expr) -> ir.Value:
        if expr.is_Integer:
            return self._builder.constant([int(expr)], _INT)
        if expr.is_Symbol:
            if expr not in self._sources:
                raise LoweringError(codes.NO_TRANSLATION, f"size {expr} cannot be computed from the model's inputs")
            return self._sources[expr]()
        if expr.is_Float or (expr.is_Rational and not expr.is_Integer):
            return self._builder.constant([float(expr)], ir.DataType.DOUBLE)
        function = _FUNCTIONS.get(type(expr).__name__)
        if function is None:
            raise LoweringError(
                codes.NO_TRANSLATION, f"size {expr} has no translation to ONNX", why=type(expr).__name__
            )
        return function(self, expr)

    def _fold(self, operator: str, expr: sympy.Expr) -> ir.Value:
        values = [self._emit(arg) for arg in expr.args]
        if any(value.dtype == ir.DataType.DOUBLE for value in values):
            values = [self._double(arg) for arg in expr.args]
        return functools.reduce(lambda left, right: self._op(operator, left, right), values)

    def _floor_div(self, expr: sympy.Expr) -> ir.Value:
        """ONNX's Div truncates; where the numerator may be negative, take the (Python) remainder off first."""
        top, bottom = expr.args
        value, divisor = self._emit(top), self._emit(bottom)
        if not _never_negative(top):
            value = self._op("Sub", value, self._op("Mod", value, divisor))
        return self._op("Div", value, divisor)

    def _power(self, expr: sympy.Expr) -> ir.Value:
        base, exponent = expr.args
        if exponent.is_Integer and int(exponent) > 0:
            return functools.reduce(
                lambda left, right: self._op("Mul", left, right), [self._emit(base)] * int(exponent)
            )
        return self._op("Pow", self._double(base), self._double(exponent))

    def _double(self, expr: sympy.Expr) -> ir.Value:
        value = self._emit(expr)
        return value if value.dtype == ir.DataType.DOUBLE else self._op("Cast", value, to=ir.DataType.DOUBLE)

    def _true_div(self, expr: sympy.Expr) -> ir.Value:
        return self._op("Div", self._double(expr.args[0]), self._double(expr.args[1]))

    def _to_int(self, operator: str | None, expr: sympy.Expr) -> ir.Value:
        value = self._double(expr.args[0])
        return self._op("Cast", self._op(operator, value) if operator else value, to=_INT)


def _never_negative(expr: sympy.Expr) -> bool:
    """Whether no coefficient is negative; symbols are sizes, so they are not."""
    if expr.is_Integer:
        return int(expr) >= 0
    if expr.is_Symbol:
        return True
    return all(_never_negative(arg) for arg in expr.args)


_FUNCTIONS: dict[str, Callable[[Sizes, sympy.Expr], ir.Value]] = {
    "Add": lambda sizes, expr: sizes._fold("Add", expr),
    "Mul": lambda sizes, expr: sizes._fold("Mul", expr),
    "Max": lambda sizes, expr: sizes._fold("Max", expr),
    "Min": lambda sizes, expr: sizes._fold("Min", expr),
    "Mod": lambda sizes, expr: sizes._fold("Mod", expr),
    "PythonMod": lambda sizes, expr: sizes._fold("Mod", expr),
    "Pow": Sizes._power,
    "PowByNatural": Sizes._power,
    "FloorDiv": Sizes._floor_div,
    "CleanDiv": Sizes._floor_div,
    "IntTrueDiv": Sizes._true_div,
    "FloatTrueDiv": Sizes._true_div,
    "ToFloat": lambda sizes, expr: sizes._double(expr.args[0]),
    "CeilToInt": lambda sizes, expr: sizes._to_int("Ceil", expr),
    "FloorToInt": lambda sizes, expr: sizes._to_int("Floor", expr),
    "RoundToInt": lambda sizes, expr: sizes._to_int("Round", expr),
    "TruncToInt": lambda sizes, expr: sizes._to_int(None, expr),
    "Identity": lambda sizes, expr: sizes._emit(expr.args[0]),
}
