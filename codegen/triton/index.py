"""Index arithmetic: sympy expressions over bounded integers, simplified before they are written into a kernel."""

from dataclasses import dataclass, field

import sympy
from sympy.printing.str import StrPrinter


class FloorDiv(sympy.Function):  # type: ignore[misc]
    """`number // divisor`, of numbers that are not negative."""

    nargs = 2


class Modulo(sympy.Function):  # type: ignore[misc]
    """`number % divisor`, of numbers that are not negative."""

    nargs = 2


@dataclass
class Indices:
    """The integers of a kernel, with what is known of them.

    Attributes:
        bounds: for each symbol, its least and greatest value; None where there is no bound.
        multiples: for each symbol, a number that divides it.
    """

    bounds: dict[sympy.Symbol, tuple[int, int | None]] = field(default_factory=dict)
    multiples: dict[sympy.Symbol, int] = field(default_factory=dict)

    def symbol(self, name: str, low: int = 0, high: int | None = None, multiple: int = 1) -> sympy.Symbol:
        """Declare an integer `low ≤ name ≤ high` that is a multiple of `multiple`."""
        made = sympy.Symbol(name, integer=True)
        self.bounds[made] = (low, high)
        self.multiples[made] = multiple
        return made

    def divide(self, number: sympy.Expr, divisor: int) -> sympy.Expr:
        """`number // divisor`, without the division where it can be done now."""
        whole, rest = self._split(sympy.expand(number), divisor)
        if self._within(rest, divisor):
            return whole
        if divisor == 1:
            return whole + rest
        for step in sorted(set(self.multiples.values()), reverse=True):
            _, fine = self._split(rest, step)
            if divisor % step == 0 and self._within(fine, step):
                # What is less than a step cannot carry into the next multiple of the divisor.
                return whole + FloorDiv(rest - fine, divisor)
        return whole + FloorDiv(rest, divisor)

    def modulo(self, number: sympy.Expr, divisor: int) -> sympy.Expr:
        """`number % divisor`, without the division where it can be done now."""
        _, rest = self._split(sympy.expand(number), divisor)
        return rest if self._within(rest, divisor) else Modulo(rest, divisor)

    def _split(self, number: sympy.Expr, divisor: int) -> tuple[sympy.Expr, sympy.Expr]:
        """`number = divisor * whole + rest`, with every term that the divisor divides in `whole`."""
        whole: sympy.Expr = sympy.Integer(0)
        rest: sympy.Expr = sympy.Integer(0)
        for term in sympy.Add.make_args(number):
            coefficient, factors = term.as_coeff_Mul()
            if factors == 1:
                whole += coefficient // divisor
                rest += coefficient % divisor
            elif coefficient % divisor == 0:
                whole += coefficient // divisor * factors
            elif self._divides(divisor, coefficient, factors):
                whole += FloorDiv(term, divisor)
            else:
                rest += term
        return whole, rest

    def _divides(self, divisor: int, coefficient: sympy.Expr, factors: sympy.Expr) -> bool:
        known = self.multiples.get(factors, 1) if isinstance(factors, sympy.Symbol) else 1
        return bool(coefficient.is_Integer) and int(coefficient) * known % divisor == 0

    def _within(self, number: sympy.Expr, limit: int) -> bool:
        """Whether `0 ≤ number < limit` is certain."""
        low, high = 0, 0
        for term in sympy.Add.make_args(number):
            coefficient, factors = term.as_coeff_Mul()
            if factors == 1:
                bounds: tuple[int, int | None] = (1, 1)
            elif factors in self.bounds:
                bounds = self.bounds[factors]
            else:
                return False
            if coefficient < 0 or bounds[1] is None:
                return False
            low, high = low + int(coefficient) * bounds[0], high + int(coefficient) * bounds[1]
        return low >= 0 and high < limit


class _Printer(StrPrinter):  # type: ignore[misc]
    """Triton's integer operators."""

    def _print_FloorDiv(self, expression: sympy.Expr) -> str:
        return f"{self._factor(expression.args[0])} // {expression.args[1]}"

    def _print_Modulo(self, expression: sympy.Expr) -> str:
        return f"{self._factor(expression.args[0])} % {expression.args[1]}"

    def _print_Mul(self, expression: sympy.Expr) -> str:
        return " * ".join(self._factor(each) for each in expression.args)

    def _factor(self, expression: sympy.Expr) -> str:
        text = self._print(expression)
        simple = expression.is_Symbol or (expression.is_Integer and expression >= 0)
        return text if simple else f"({text})"


def text(number: sympy.Expr) -> str:
    """The expression in a kernel's source."""
    return str(_Printer({"order": "lex"}).doprint(sympy.expand(number)))
