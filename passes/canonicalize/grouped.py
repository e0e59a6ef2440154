"""Every spelling of a product of runs of rows, each with its own matrix => `sparc::grouped_linear`."""

from typing import Any

import torch
from torch import fx

from sparc.contract import Bounded
from sparc.pass_base import Stage
from sparc.passes.canonicalize.linear import transposed_weight
from sparc.pattern import Found, normalized_arguments
from sparc.program import Program, is_weight
from sparc.rewrite import Match, Skip, rewrite

aten = torch.ops.aten

Result = fx.Node | Skip | None
_NAMES = ("aten._grouped_mm.default", "transformers.grouped_mm_fallback.default")


def _find(program: Program, node: fx.Node) -> Found | Skip | None:
    if str(node.target) not in _NAMES:
        return None
    given = [argument for argument in normalized_arguments(node).values() if argument is not None]
    kinds = [each.meta["val"] if isinstance(each, fx.Node) else None for each in given]
    if [None if kind is None else kind.ndim for kind in kinds] != [2, 3, 1]:
        return Skip("it has a bias, a result of another type, or more than runs of rows")
    x, matrices, ends = given
    source = _untransposed(matrices)
    nodes = (node,) if source is None else (node, matrices)
    return Found({"x": x, "w": matrices if source is None else source, "ends": ends}, nodes, (node,))


def _untransposed(matrices: Any) -> fx.Node | None:
    """What a node is the transpose of, matrix by matrix."""
    if matrices.target is not aten.transpose.int:
        return None
    source, *axes = matrices.args
    return source if {axis % 3 for axis in axes} == {1, 2} else None


@rewrite(find=_find, contract=Bounded(1e-4), stage=Stage.CANONICALIZE, single_use=False)
def raise_grouped(m: Match) -> Result:
    """grouped_mm(x, transpose(W), ends) => grouped_linear(x, W, ends); else W is transposed in the store."""
    weight = m.w
    if len(m.nodes) == 1 and is_weight(weight):
        weight = transposed_weight(m)
    elif len(m.nodes) == 1:
        weight = m.op.transpose(weight, 1, 2)
    if isinstance(weight, Skip):
        return weight
    return m.call(torch.ops.sparc.grouped_linear.default, m.x, weight, m.ends)


GROUPED = (raise_grouped,)
