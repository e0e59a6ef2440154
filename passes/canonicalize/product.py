"""Every spelling of a product with a batch of matrices => `aten.bmm` or `aten.matmul`, whose weight can be encoded."""

from collections.abc import Sequence

from torch import fx

from sparc.analysis.values import same_size, shape_of
from sparc.contract import Bounded
from sparc.pass_base import Stage
from sparc.program import is_weight
from sparc.rewrite import Match, Skip, rewrite

Result = fx.Node | Skip | None
_BOUND = Bounded(1e-4)


def _is_batch(node: object) -> bool:
    return is_weight(node) and node.meta["val"].ndim == 3  # type: ignore[attr-defined]


@rewrite(lambda op, x, w, b: op.baddbmm(b, x, op.such(w, _is_batch)), contract=_BOUND, stage=Stage.CANONICALIZE)
def raise_baddbmm(m: Match) -> Result:
    """baddbmm(b, x, W) => bmm(x, W) + b."""
    return m.op.add(m.op.bmm(m.x, m.w), m.b)


@rewrite(
    lambda op, equation, x, w: op.einsum(equation, [x, op.such(w, _is_batch)]),
    contract=_BOUND,
    stage=Stage.CANONICALIZE,
)
def raise_einsum(m: Match) -> Result:
    """einsum("etk,ekn->etn", x, W) => matmul(x, W), and "tk,ekn->etn"; but for W's batch, axes in any order."""
    axes = _read(m.equation)
    if axes is None:
        return None
    given, weight, result = m.equation.replace(" ", "").replace("->", ",").split(",")
    batch, token, reduced, feature = axes
    sizes = [dict(zip(names, shape_of(node), strict=True)) for names, node in ((given, m.x), (weight, m.w))]
    if not all(same_size(sizes[0][each], sizes[1][each]) for each in (batch, reduced) if each in given):
        return m.skip("a size of one is broadcast")
    x = _permuted(m, m.x, given, [each for each in (batch, token, reduced) if each in given])
    product = m.op.matmul(x, _permuted(m, m.w, weight, [batch, reduced, feature]))
    return _permuted(m, product, batch + token + feature, result)


def _read(equation: str) -> tuple[str, str, str, str] | None:
    """The letters of an equation: of matrices, tokens, reduced and new features; None where there are others."""
    given, _, rest = equation.replace(" ", "").partition(",")
    weight, arrow, result = rest.partition("->")
    if not arrow or any(len(set(each)) < len(each) or "." in each for each in (given, weight, result)):
        return None
    reduced, tokens = set(given) & set(weight) - set(result), set(given) - set(weight)
    features = set(weight[1:]) - set(given)
    if any(len(each) != 1 for each in (reduced, tokens, features)) or {*result} != {weight[0], *tokens, *features}:
        return None
    return weight[0], tokens.pop(), reduced.pop(), features.pop()


def _permuted(m: Match, node: fx.Node, axes: str, wanted: Sequence[str]) -> fx.Node:
    order = [axes.index(each) for each in wanted]
    return node if order == sorted(order) else m.op.permute(node, order)


PRODUCT = (raise_baddbmm, raise_einsum)
