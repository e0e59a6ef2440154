"""Attention masks in one form each: conditions that always hold go, padding masks become `mask[:, None, None, :]`,
expansions stay out.
"""

from typing import Any

import sympy
import torch
from torch import fx

from sparc.analysis.elements import element, index_symbols
from sparc.analysis.logic import Unknown
from sparc.analysis.values import same_shape, same_size, shape_of
from sparc.contract import Bounded, Exact
from sparc.pass_base import Stage
from sparc.pattern import Found
from sparc.program import Program
from sparc.region import cone
from sparc.rewrite import Match, Skip, rewrite

aten = torch.ops.aten
Result = fx.Node | Skip | None


def _element(program: Program, node: Any, rank: int) -> Any:
    """The element of a tensor that is broadcast to `rank` axes, as a function of the result's indices; None when it is
    unknown.
    """
    symbols = index_symbols(rank)
    own = shape_of(node)
    index = tuple(
        sympy.Integer(0) if size == 1 and isinstance(size, int) else symbol
        for size, symbol in zip(own, symbols[rank - len(own) :], strict=True)
    )
    try:
        return element(program, node, index)
    except (Unknown, TypeError):
        return None


def _find_positions(program: Program, node: fx.Node) -> Found | Skip | None:
    """`x[i, j, ...]` whose index tensors count along axes of the result, in order, over the whole of x."""
    if node.target is not aten.index.Tensor or not isinstance(node.args[0], fx.Node):
        return None
    x: Any = node.args[0]
    indices: Any = node.args[1]
    rank = len(shape_of(node))
    if len(indices) != len(shape_of(x)) or any(not isinstance(each, fx.Node) for each in indices):
        return None
    symbols = index_symbols(rank)
    axes = []
    for each, size in zip(indices, shape_of(x), strict=True):
        found = _element(program, each, rank)
        if found not in symbols or not same_size(shape_of(node)[symbols.index(found)], size):
            return None
        axes.append(symbols.index(found))
    others = [size for axis, size in enumerate(shape_of(node)) if axis not in axes]
    if axes != sorted(set(axes)) or any(not isinstance(size, int) or size != 1 for size in others):
        return None
    return Found({"x": x, "axes": axes, "rank": rank}, (*cone(indices), node), (node,))


@rewrite(find=_find_positions, contract=Exact(), stage=Stage.CANONICALIZE, single_use=False)
def raise_indexing(m: Match) -> Result:
    """x[arange[:, None], arange[None, :]] => x with axes of size one, when the index tensors are proved to count along
    the result's axes.
    """
    result = m.x
    for axis in range(m.rank):
        if axis not in m.axes:
            result = m.op.unsqueeze(result, axis)
    return result


def _find_true(program: Program, node: fx.Node) -> Found | Skip | None:
    if (
        str(getattr(node.target, "_opname", "")) not in ("__and__", "bitwise_and", "logical_and")
        or node.meta["val"].dtype != torch.bool
    ):
        return None
    for condition, other in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
        if isinstance(condition, fx.Node) and isinstance(other, fx.Node) and other.meta["val"].dtype == torch.bool:
            rank = len(shape_of(condition))
            if _element(program, condition, rank) == sympy.true:
                return Found({"condition": condition, "other": other}, (*cone([condition]), node), (node,))
    return None


def expand_like(m: Match, node: fx.Node, shape: tuple[Any, ...], sources: list[fx.Node]) -> fx.Node:
    """`node` expanded to `shape`, each new size read off the source that has it."""
    own = (1,) * (len(shape) - len(shape_of(node))) + shape_of(node)
    sizes: list[Any] = []
    for axis, size in enumerate(shape):
        if same_size(own[axis], size):
            sizes.append(-1 if axis >= len(shape) - len(shape_of(node)) else 1)
        elif isinstance(size, int):
            sizes.append(size)
        else:
            back = axis - len(shape)
            source = next(
                each for each in sources if len(shape_of(each)) >= -back and same_size(shape_of(each)[back], size)
            )
            sizes.append(m.op.sym_size(source, len(shape_of(source)) + back))
    return m.op.expand(node, sizes)


@rewrite(find=_find_true, contract=Exact(), stage=Stage.CANONICALIZE, single_use=False)
def drop_true_condition(m: Match) -> Result:
    """mask & c => mask, expanded to the result's shape, when c is proved to hold everywhere."""
    shape = shape_of(m.roots[0])
    if same_shape(shape, shape_of(m.other)):
        return m.other  # type: ignore[no-any-return]
    return expand_like(m, m.other, shape, [m.condition])


@rewrite(
    lambda op, c, sizes, yes, no: op.where(op.expand(c, sizes), yes, no),
    contract=Exact(),
    stage=Stage.CANONICALIZE,
    single_use=False,
)
def delay_expansion(m: Match) -> Result:
    """where(expand(c), a, b) => expand(where(c, a, b)) for numbers a and b."""
    if any(isinstance(value, fx.Node) and len(shape_of(value)) > 0 for value in (m.yes, m.no)):
        return None
    chosen = m.op.where(m.c, m.yes, m.no)
    return m.op.expand(chosen, m.sizes)


def _find_expanded(program: Program, node: fx.Node) -> Found | Skip | None:
    if (
        node.target is not aten.scaled_dot_product_attention.default
        or len(node.args) < 4
        or not isinstance(node.args[3], fx.Node)
    ):
        return None
    wide = node.args[3]
    if wide.target is not aten.expand.default or len(shape_of(wide.args[0])) != len(shape_of(wide)):  # type: ignore[arg-type]
        return None
    return Found({"mask": wide.args[0]}, (wide, node), (node,))


@rewrite(find=_find_expanded, contract=Bounded(1e-4), stage=Stage.CANONICALIZE, single_use=False)
def drop_mask_expansion(m: Match) -> Result:
    """attention(q, k, v, expand(mask)) => attention(q, k, v, mask): attention broadcasts its mask itself."""
    node = m.roots[0]
    return m.call(node.target, *node.args[:3], m.mask, *node.args[4:], **node.kwargs)


MASK = (raise_indexing, drop_true_condition, delay_expansion, drop_mask_expansion)
