"""Hand-written normalisations => `aten.rms_norm` and `aten.layer_norm`.

Each is raised in two steps: first the normalisation itself, then the gain and the shift that follow it.
"""

from typing import Any

from torch import fx

from sparc.analysis.values import shape_of
from sparc.contract import Bounded
from sparc.pass_base import Stage
from sparc.pattern import Operators
from sparc.rewrite import Match, Skip, rewrite

Result = fx.Node | Skip
_BOUND = Bounded(1e-4)


def _square(op: Operators, x: Any) -> Any:
    return op.either(op.pow(x, 2), op.mul(x, x), op.square(x))


def _over_root(op: Operators, x: Any, variance: Any, eps: Any) -> Any:
    """x / sqrt(variance + eps), in its usual spellings."""
    shifted = op.add(variance, eps)
    inverse = op.either(
        op.rsqrt(shifted), op.pow(shifted, -0.5), op.reciprocal(op.sqrt(shifted)), op.div(1, op.sqrt(shifted))
    )
    root = op.either(op.sqrt(shifted), op.pow(shifted, 0.5))
    return op.either(op.mul(x, inverse), op.div(x, root))


def _mean(op: Operators, x: Any, axes: Any) -> Any:
    return op.mean(x, axes, True)


def _normalised_size(m: Match) -> int | str:
    """The size of the last axis, or why the operator is no normalisation over it."""
    shape = shape_of(m.roots[0])
    if list(m.axes) not in ([-1], [len(shape) - 1]):
        return "the mean is not over the last axis"
    if not isinstance(shape[-1], int):
        return "the size of the last axis is not fixed"
    return shape[-1]


def _epsilon(m: Match) -> float | None:
    return m.number(m.eps)


@rewrite(
    lambda op, x, eps, axes: _over_root(op, x, _mean(op, _square(op, x), axes), eps),
    contract=_BOUND,
    stage=Stage.CANONICALIZE,
)
def raise_rms_norm(m: Match) -> Result:
    """x * rsqrt(mean(x², -1) + eps) => rms_norm(x, [n], None, eps)."""
    size, eps = _normalised_size(m), _epsilon(m)
    if isinstance(size, str) or eps is None:
        return m.skip(size if isinstance(size, str) else "eps is no constant")
    return m.op.rms_norm(m.x, [size], None, eps)


def _gain_reason(m: Match, name: str = "w") -> str | None:
    gain = getattr(m, name).meta["val"]
    if tuple(gain.shape) != (m.n[-1],) or len(m.n) != 1:
        return "the factor is no gain over the last axis"
    return None if gain.dtype == m.x.meta["val"].dtype else "the gain has another dtype than the input"


@rewrite(
    lambda op, x, n, eps, w: op.mul(op.rms_norm(x, n, None, eps), op.weight(w)),
    contract=_BOUND,
    stage=Stage.CANONICALIZE,
)
def absorb_rms_gain(m: Match) -> Result:
    """rms_norm(x, [n], None, eps) * w => rms_norm(x, [n], w, eps)."""
    reason = _gain_reason(m)
    return m.skip(reason) if reason else m.op.rms_norm(m.x, m.n, m.w, m.eps)


def _centred(op: Operators, x: Any, axes: Any) -> Any:
    return op.sub(x, _mean(op, x, axes))


def _layer_norm(op: Operators, x: Any, eps: Any, axes: Any, other: Any) -> Any:
    centre = _centred(op, x, axes)
    variance = op.either(
        _mean(op, _square(op, centre), axes),
        _mean(op, _square(op, _centred(op, x, axes)), axes),
        op.var(x, axes, correction=0, keepdim=True),
        op.var(x, axes, False, True),
    )
    return _over_root(op, centre, variance, eps)


@rewrite(lambda op, x, eps, axes: _layer_norm(op, x, eps, axes, None), contract=_BOUND, stage=Stage.CANONICALIZE)
def raise_layer_norm(m: Match) -> Result:
    """(x - mean(x)) * rsqrt(mean((x - mean(x))²) + eps) => layer_norm(x, [n], None, None, eps); also with var(x,
    correction=0).
    """
    size, eps = _normalised_size(m), _epsilon(m)
    if isinstance(size, str) or eps is None:
        return m.skip(size if isinstance(size, str) else "eps is no constant")
    return m.op.layer_norm(m.x, [size], None, None, eps)


@rewrite(
    lambda op, x, n, eps, w: op.mul(op.layer_norm(x, n, None, None, eps, op.any()), op.weight(w)),
    contract=_BOUND,
    stage=Stage.CANONICALIZE,
)
def absorb_layer_gain(m: Match) -> Result:
    """layer_norm(x, [n], None, None, eps) * w => layer_norm(x, [n], w, None, eps)."""
    reason = _gain_reason(m)
    return m.skip(reason) if reason else m.op.layer_norm(m.x, m.n, m.w, None, m.eps)


@rewrite(
    lambda op, x, n, eps, b, w=None: op.add(op.layer_norm(x, n, w, None, eps, op.any()), op.weight(b)),
    contract=_BOUND,
    stage=Stage.CANONICALIZE,
)
def absorb_layer_shift(m: Match) -> Result:
    """layer_norm(x, [n], w, None, eps) + b => layer_norm(x, [n], w, b, eps)."""
    reason = _gain_reason(m, "b")
    return m.skip(reason) if reason else m.op.layer_norm(m.x, m.n, m.w, m.b, m.eps)


NORM = (raise_layer_norm, absorb_layer_gain, absorb_layer_shift, raise_rms_norm, absorb_rms_gain)
