"""Rotary position embeddings in one form, `x * cos + turn(x) * sin`, which `sparc.analysis.forms.find_rotary` finds."""

from typing import Any

import torch
from torch import fx

from sparc.analysis.values import same_shape, shape_of
from sparc.contract import Bounded
from sparc.pass_base import Stage
from sparc.pattern import Found, Operators
from sparc.program import Program
from sparc.rewrite import Match, Skip, rewrite

aten = torch.ops.aten
Result = fx.Node | Skip | None
_BOUND = Bounded(1e-4)
_MOVES = (aten.unsqueeze.default, aten.reshape.default, aten.expand.default, aten.slice.Tensor, aten.index.Tensor,
          aten.select.int, aten.embedding.default)  # fmt: skip


def _turned_parts(op: Operators, a: Any, b: Any, cos: Any, sin: Any) -> list[Any]:
    """`(a, b)` turned: `(a cos - b sin, b cos + a sin)`."""
    return [op.sub(op.mul(a, cos), op.mul(b, sin)), op.add(op.mul(b, cos), op.mul(a, sin))]


def _halves(op: Operators, x: Any, n: Any, axis: Any) -> tuple[Any, Any]:
    return op.slice(x, axis, 0, n), op.slice(x, axis, n, op.any())


def _pieces(op: Operators, x: Any) -> tuple[Any, Any]:
    both = op.either(op.split(x, op.any(), -1), op.chunk(x, 2, -1))
    return op.getitem(both, 0), op.getitem(both, 1)


def _neighbours(op: Operators, x: Any, axis: Any) -> tuple[Any, Any]:
    return op.slice(x, axis, 0, op.any(), 2), op.slice(x, axis, 1, op.any(), 2)


def _canonical(m: Match, turned: fx.Node, cos: fx.Node, sin: fx.Node) -> fx.Node:
    return m.op.add(m.op.mul(m.x, cos), m.op.mul(turned, sin))


def _fits(m: Match, cos: fx.Node, sin: fx.Node) -> bool:
    """Whether the pairs fill the last axis, with one cosine and one sine each."""
    shape = shape_of(m.x)
    width = shape[-1]
    if not isinstance(width, int) or width % 2 or not same_shape(shape_of(m.roots[0]), shape):
        return False
    return all(shape_of(table)[-1] == width // 2 for table in (cos, sin))


@rewrite(
    lambda op, x, n, axis, cos, sin: op.either(
        op.cat(_turned_parts(op, *_halves(op, x, n, axis), cos, sin), -1),
        op.cat(_turned_parts(op, *_pieces(op, x), cos, sin), -1),
    ),
    contract=_BOUND,
    stage=Stage.CANONICALIZE,
    single_use=False,
)
def raise_split_rotary(m: Match) -> Result:
    """cat([a * c - b * s, b * c + a * s]), a and b the halves of x => x * cat([c, c]) + cat([-b, a]) * cat([s, s])."""
    if not _fits(m, m.cos, m.sin):
        return None
    half = shape_of(m.x)[-1] // 2
    axis = len(shape_of(m.x)) - 1
    first, second = m.op.slice(m.x, axis, 0, half), m.op.slice(m.x, axis, half, 2**63 - 1)
    turned = m.op.cat([m.op.neg(second), first], -1)
    return _canonical(m, turned, m.op.cat([m.cos, m.cos], -1), m.op.cat([m.sin, m.sin], -1))


def _interleaved(m: Match, cos: fx.Node, sin: fx.Node) -> Result:
    if not _fits(m, cos, sin):
        return None
    axis = len(shape_of(m.x)) - 1
    even, odd = (m.op.slice(m.x, axis, start, 2**63 - 1, 2) for start in (0, 1))
    turned = m.op.flatten(m.op.stack([m.op.neg(odd), even], -1), -2)
    cos, sin = (m.op.repeat_interleave(each, 2, -1) for each in (cos, sin))
    return _canonical(m, turned, cos, sin)


@rewrite(
    lambda op, x, axis, cos, sin: op.flatten(
        op.stack(_turned_parts(op, *_neighbours(op, x, axis), cos, sin), -1), op.any(), op.any()
    ),
    contract=_BOUND,
    stage=Stage.CANONICALIZE,
    single_use=False,
)
def raise_paired_rotary(m: Match) -> Result:
    """flatten(stack([a * c - b * s, b * c + a * s], -1)), a and b neighbours in x => the interleaved form."""
    return _interleaved(m, m.cos, m.sin)


def _find_complex(program: Program, node: fx.Node) -> Found | Skip | None:
    """flatten(view_as_real(view_as_complex(reshape(x)) * f))."""
    real: Any = node.args[0] if node.target in (aten.flatten.using_ints, aten.reshape.default) else None
    product: Any = real.args[0] if isinstance(real, fx.Node) and real.target is aten.view_as_real.default else None
    if product is None or product.target is not aten.mul.Tensor:
        return None
    for value, factor in (product.args, product.args[::-1]):
        if not isinstance(value, fx.Node) or not isinstance(factor, fx.Node):
            continue
        paired: Any = value.args[0] if value.target is aten.view_as_complex.default else None
        if isinstance(paired, fx.Node) and paired.target is aten.reshape.default:
            x: Any = paired.args[0]
            fits = x.meta["val"].dtype == torch.float32 and same_shape(shape_of(x), shape_of(node))
            if fits and same_shape(shape_of(paired)[:-1], shape_of(value)):
                inner = _parts_nodes(factor)
                return Found({"x": x, "factor": factor}, (*inner, paired, value, product, real, node), (node,))
    return None


def _parts_nodes(factor: fx.Node) -> list[fx.Node]:
    """The nodes through which the real and imaginary parts of a complex tensor are known."""
    if factor.target in (aten.complex.default, aten.polar.default):
        return [factor]
    if factor.target in _MOVES and isinstance(factor.args[0], fx.Node):
        return [*_parts_nodes(factor.args[0]), factor]
    return []


def _parts(m: Match, factor: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The real and the imaginary part of a complex tensor."""
    if factor.target is aten.complex.default:
        return factor.args  # type: ignore[return-value]
    if factor.target is aten.polar.default:
        radius, angle = factor.args
        cos, sin = m.op.cos(angle), m.op.sin(angle)
        return (cos, sin) if m.number(radius) == 1 else (m.op.mul(radius, cos), m.op.mul(radius, sin))
    if factor.target in _MOVES and isinstance(factor.args[0], fx.Node):
        real, imaginary = _parts(m, factor.args[0])
        return m.call(factor.target, real, *factor.args[1:]), m.call(factor.target, imaginary, *factor.args[1:])
    both = m.op.view_as_real(factor)
    axis = len(shape_of(both)) - 1
    return m.op.select(both, axis, 0), m.op.select(both, axis, 1)


@rewrite(find=_find_complex, contract=_BOUND, stage=Stage.CANONICALIZE, single_use=False)
def raise_complex_rotary(m: Match) -> Result:
    """flatten(view_as_real(view_as_complex(x) * (c + i s))) => the interleaved form."""
    cos, sin = _parts(m, m.factor)
    return _interleaved(m, cos, sin)


ROTARY = (raise_split_rotary, raise_paired_rotary, raise_complex_rotary)
