"""Hand-written activations => `aten.gelu`, `aten.silu`, `aten.hardswish`, `aten.softplus`."""

import math
from typing import Any

from torch import fx

from sparc.contract import Bounded
from sparc.pass_base import Stage
from sparc.pattern import Operators
from sparc.rewrite import Match, Skip, rewrite

Result = fx.Node | Skip
_BOUND = Bounded(1e-4)
_CUBIC = 0.044715


def _product(op: Operators, x: Any, factor: Any, number: float) -> Any:
    """number * x * factor, in every association."""
    return op.either(
        op.mul(op.mul(x, number), factor),
        op.mul(x, op.mul(factor, number)),
        op.mul(op.mul(x, factor), number),
        op.mul(op.div(x, 1 / number), factor),
        op.div(op.mul(x, factor), 1 / number),
    )


def _erf(op: Operators, x: Any) -> Any:
    return op.add(op.erf(op.either(op.div(x, math.sqrt(2)), op.mul(x, math.sqrt(0.5)))), 1)


@rewrite(lambda op, x: _product(op, x, _erf(op, x), 0.5), contract=_BOUND, stage=Stage.CANONICALIZE)
def raise_gelu(m: Match) -> Result:
    """0.5 * x * (1 + erf(x / sqrt(2))) => gelu(x)."""
    return m.op.gelu(m.x)


def _tanh(op: Operators, x: Any) -> Any:
    root = math.sqrt(2 / math.pi)
    cube = op.either(op.pow(x, 3), op.mul(op.mul(x, x), x), op.mul(op.pow(x, 2), x))
    inner = op.add(x, op.mul(cube, _CUBIC))
    factored = op.mul(x, op.add(op.mul(op.either(op.pow(x, 2), op.mul(x, x)), _CUBIC), 1))
    rounded = op.either(root, 0.79788456)  # as BLOOM writes it; 1e-9 off, which moves the result by less
    mixed = op.mul(op.mul(x, rounded), op.add(op.mul(op.mul(x, _CUBIC), x), 1))
    return op.add(op.tanh(op.either(op.mul(op.either(inner, factored), root), mixed)), 1)


@rewrite(lambda op, x: _product(op, x, _tanh(op, x), 0.5), contract=_BOUND, stage=Stage.CANONICALIZE)
def raise_gelu_tanh(m: Match) -> Result:
    """0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x³))) => gelu(x, approximate="tanh")."""
    return m.op.gelu(m.x, approximate="tanh")


@rewrite(lambda op, x: op.mul(x, op.sigmoid(x)), contract=_BOUND, stage=Stage.CANONICALIZE)
def raise_silu(m: Match) -> Result:
    """x * sigmoid(x) => silu(x)."""
    return m.op.silu(m.x)


def _relu6(op: Operators, x: Any) -> Any:
    return op.either(op.relu6(x), op.hardtanh(x, 0, 6), op.clamp(x, 0, 6))


@rewrite(
    lambda op, x: op.either(
        op.mul(x, op.div(_relu6(op, op.add(x, 3)), 6)),
        op.div(op.mul(x, _relu6(op, op.add(x, 3))), 6),
        op.mul(x, op.hardsigmoid(x)),
    ),
    contract=_BOUND,
    stage=Stage.CANONICALIZE,
)
def raise_hardswish(m: Match) -> Result:
    """x * relu6(x + 3) / 6 => hardswish(x)."""
    return m.op.hardswish(m.x)


ACTIVATION = (raise_gelu, raise_gelu_tanh, raise_silu, raise_hardswish)
