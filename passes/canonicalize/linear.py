"""Every spelling of a fully connected layer => `aten.linear`."""

from torch import fx

from sparc.analysis.values import same_shape, same_type, shape_of
from sparc.contract import Bounded
from sparc.pass_base import Stage
from sparc.pattern import Operators
from sparc.program import is_weight
from sparc.rewrite import Match, Skip, rewrite

Result = fx.Node | Skip | None
_BOUND = Bounded(1e-4)


def _is_matrix(node: object) -> bool:
    return is_weight(node) and node.meta["val"].ndim == 2  # type: ignore[attr-defined]


def transposed_weight(m: Match) -> fx.Node | Skip:
    """The weight `w`, its last two axes swapped, as a weight of its own: its numbers are moved, never rounded."""
    copies = [node for _, node in m.program.nodes() if node.op == "get_attr" and node.target == m.w.target]
    readers = {user for node in copies for user in node.users}
    other = next((user for user in readers if user.target is not m.roots[0].target), None)
    if other is not None:
        return m.skip(f"the weight is also read by {other.name}, so that both layouts would be stored")
    weight = m.program.weight(m.w)
    assert weight is not None
    return m.constant(weight.transpose(-1, -2).contiguous(), like="w")


@rewrite(
    lambda op, x, w: op.matmul(
        x, op.either(op.transpose(op.such(w, _is_matrix), op.any(), op.any()), op.t(op.such(w, _is_matrix)))
    ),
    contract=_BOUND,
    stage=Stage.CANONICALIZE,
    single_use=False,
)
def raise_matmul_transposed(m: Match) -> Result:
    """matmul(x, transpose(W)) => linear(x, W)."""
    return m.op.linear(m.x, m.w)


@rewrite(
    lambda op, x, w: op.either(op.matmul(x, op.such(w, _is_matrix)), op.mm(x, op.such(w, _is_matrix))),
    contract=_BOUND,
    stage=Stage.CANONICALIZE,
)
def raise_matmul(m: Match) -> Result:
    """matmul(x, W) => linear(x, transpose(W)); the transposed weight replaces W in the store."""
    weight = transposed_weight(m)
    return weight if isinstance(weight, Skip) else m.op.linear(m.x, weight)


@rewrite(lambda op, x, w, b: op.addmm(b, x, op.such(w, _is_matrix)), contract=_BOUND, stage=Stage.CANONICALIZE)
def raise_addmm(m: Match) -> Result:
    """addmm(b, x, W) => linear(x, transpose(W), b)  (the Conv1D of GPT-2)."""
    if m.b.meta["val"].ndim != 1 or m.b.meta["val"].shape[0] == 1:
        return m.skip("the addend is no bias vector")
    weight = transposed_weight(m)
    return weight if isinstance(weight, Skip) else m.op.linear(m.x, weight, m.b)


@rewrite(
    lambda op, x, w, shape, b=None: op.reshape(op.linear(op.reshape(x, op.any()), w, b), shape),
    contract=_BOUND,
    stage=Stage.CANONICALIZE,
    single_use=False,
)
def drop_flattening(m: Match) -> Result:
    """reshape(linear(reshape(x, [-1, in]), W, b), [..., out]) => linear(reshape(x, [..., in]), W, b)."""
    result = m.roots[0]
    if len(result.all_input_nodes[0].users) > 1:
        return m.skip("the flat result is also read elsewhere")
    after, features = shape_of(result), m.w.meta["val"].shape
    if not after or not same_shape(after[-1:], features[:1]):
        return None
    x = m.x
    if not same_shape(shape_of(x), (*after[:-1], features[1])):
        x = m.op.reshape(x, [*m.shape[:-1], features[1]])
    return m.op.linear(x, m.w) if m.b is None else m.op.linear(x, m.w, m.b)


def _bias_sum(op: Operators, x: object, w: object, b: object, c: object) -> object:
    return op.add(op.linear(x, w, b), op.weight(c))


@rewrite(lambda op, x, w, c, b=None: _bias_sum(op, x, w, b, c), contract=_BOUND, stage=Stage.CANONICALIZE)
def absorb_bias(m: Match) -> Result:
    """linear(x, W) + c => linear(x, W, c); linear(x, W, b) + c => linear(x, W, b + c)."""
    added = m.program.weight(m.c)
    result = m.roots[0].meta["val"]
    product = next(each for each in m.nodes if each is not m.roots[0])
    assert added is not None
    if not added.ndim or added.numel() != added.shape[-1] or added.shape[-1] != m.w.meta["val"].shape[0]:
        return m.skip("the addend is no bias vector")
    if m.w.meta["val"].ndim != 2 or not same_type(product.meta["val"], result):
        return m.skip("the sum has another type than the product")
    if m.b is None:
        return m.op.linear(m.x, m.w, m.c if added.ndim == 1 else m.constant(added.reshape(-1), like="c"))
    bias = m.weight("b")
    if bias is None:
        return m.skip("the first bias is computed, not a weight")
    return m.op.linear(m.x, m.w, m.constant(bias + added.double().reshape(-1), like="b"))


LINEAR = (raise_matmul_transposed, raise_matmul, raise_addmm, drop_flattening, absorb_bias)
