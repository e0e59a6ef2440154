"""Eager attention => `aten.scaled_dot_product_attention`, with causal masks and repeated heads as its own arguments."""

import math
from typing import Any

import torch
from torch import fx

from sparc.analysis.elements import index_symbols, mask_condition
from sparc.analysis.logic import at_least_zero
from sparc.analysis.values import same_shape, same_size, scalar_value, shape_of
from sparc.contract import Bounded
from sparc.pass_base import Stage
from sparc.passes.canonicalize.scores import (
    LOW,
    PRODUCTS,
    Mask,
    Scores,
    leads_to_product,
    operator_name,
    read_scores,
)
from sparc.passes.clean import RemoveNoOps
from sparc.pattern import Found, normalized_arguments
from sparc.program import Program
from sparc.region import cone
from sparc.rewrite import Match, Skip, rewrite

aten = torch.ops.aten
Result = fx.Node | Skip
_BOUND = Bounded(1e-4)


def _find_attention(program: Program, node: fx.Node) -> Found | Skip | None:
    weights = node.args[0] if node.target in PRODUCTS else None
    if not isinstance(weights, fx.Node):
        return None
    softmax: Any = weights
    while operator_name(softmax) in ("reshape", "slice", "to") and isinstance(softmax.args[0], fx.Node):
        softmax = softmax.args[0]
    if softmax.target not in (aten.softmax.int, aten._softmax.default):
        return None
    scores = read_scores(program, softmax.args[0])
    why = scores.why or _reason(node, weights, softmax, scores)
    if why:
        return Skip(f"attention was not raised: {why}") if leads_to_product(softmax) else None
    path = (softmax,) if weights is softmax else (softmax, weights)
    values = {"q": scores.q, "kt": scores.kt, "v": node.args[1], "scores": scores, "weights": weights}
    return Found(values, (*scores.nodes, *path, node), (node,))


def _reason(node: fx.Node, weights: fx.Node, softmax: fx.Node, scores: Scores) -> str:
    """Why scores, a softmax and a product are no attention that can be raised; empty when they are."""
    rank = softmax.meta["val"].ndim
    if int(softmax.args[1]) % rank != rank - 1:  # type: ignore[arg-type]
        return "the softmax is not over the keys"
    if any(each.meta["val"].dtype != torch.float32 for each in (node, softmax)):
        return "it is not computed in float32 throughout"
    if weights is not softmax and (weights.target is not aten.reshape.default or weights.args[0] is not softmax):
        return f"{operator_name(weights)} stands between the softmax and the values"
    if (scores.split is None) != (weights is softmax):
        return "heads are split or joined between the scores and the values"
    shapes = [shape_of(each) for each in (scores.q, scores.kt, node.args[1])]  # type: ignore[arg-type]
    if not all(len(shape) > 2 and same_shape(shapes[0][:-2], shape[:-2]) for shape in shapes):
        return "queries, keys and values have different batch sizes"
    return ""


@rewrite(find=_find_attention, contract=_BOUND, stage=Stage.CANONICALIZE)
def raise_attention(m: Match) -> Result:
    """matmul(softmax(scale * matmul(q, kᵀ) + mask, -1), v) => scaled_dot_product_attention(q, k, v, mask, scale=scale).

    Where every key of a row is masked with -inf, the original gives NaN and the replacement zero.
    """
    scores: Scores = m.scores
    lead = list(scores.split.args[1])[:2] if scores.split is not None else None  # type: ignore[arg-type]
    mask = None
    for each in scores.masks:
        added = _additive(m, each, lead)
        mask = added if mask is None else m.op.add(mask, added)
    if mask is not None and mask.meta["val"].ndim < 2:
        return m.skip("attention was not raised: the mask is a vector")
    q, kt, v = (each if lead is None else _split(m, each, lead) for each in (m.q, m.kt, m.v))
    for factor in scores.factors:
        q = m.op.mul(q, factor)
    result = _attention(m, q, m.op.transpose(kt, -2, -1), v, mask, False, scores.scale, False)
    return result if lead is None else m.op.reshape(result, [-1, *(_size(m, result, axis) for axis in (2, 3))])


def _size(m: Match, node: fx.Node, axis: int) -> Any:
    """A size as a number, or as a node that reads it."""
    size = shape_of(node)[axis]
    return size if isinstance(size, int) else m.op.sym_size(node, axis)


def _split(m: Match, node: fx.Node, lead: list[Any]) -> fx.Node:
    """`[batch * heads, a, b]` as `[batch, heads, a, b]`."""
    return m.op.reshape(node, [*lead, _size(m, node, 1), _size(m, node, 2)])


def _additive(m: Match, mask: Mask, lead: list[Any] | None) -> fx.Node:
    tensor = mask.tensor
    if mask.flat and lead is not None:
        tensor = _split(m, tensor, lead)
    if mask.low is None:
        return tensor if mask.weight == 1 else m.op.mul(tensor, mask.weight)
    zero, low = (m.op.full([], value, dtype=torch.float32) for value in (0.0, mask.low))
    return m.op.where(tensor, low, zero) if mask.hides else m.op.where(tensor, zero, low)


def _attention(m: Match, q: Any, k: Any, v: Any, mask: Any, causal: bool, scale: float | None, gqa: bool) -> fx.Node:
    """The call with only the arguments that differ from their defaults, so that equal attentions are spelt equally."""
    options = {"is_causal": bool(causal), "scale": scale, "enable_gqa": bool(gqa)}
    given = {name: value for name, value in options.items() if value is not False and value is not None}
    return m.op.scaled_dot_product_attention(q, k, v, *([mask] if mask is not None else []), **given)


# arguments of attention that stand around it -------------------------------------------------------------------------
def _attention_values(node: fx.Node) -> dict[str, Any] | None:
    if node.target is not aten.scaled_dot_product_attention.default:
        return None
    found = normalized_arguments(node)
    short = {
        "q": "query",
        "k": "key",
        "v": "value",
        "mask": "attn_mask",
        "scale": "scale",
        "causal": "is_causal",
        "gqa": "enable_gqa",
    }
    return {name: found[long] for name, long in short.items()} if found["dropout_p"] == 0 else None


def _find_repeated_heads(program: Program, node: fx.Node) -> Found | Skip | None:
    arguments = _attention_values(node)
    if arguments is None or arguments["gqa"]:
        return None
    keys, values = (_unrepeated(arguments[name]) for name in ("k", "v"))
    if keys is None or values is None:
        return None
    (k, k_nodes), (v, v_nodes) = keys, values
    if not same_size(shape_of(k)[1], shape_of(v)[1]):
        return Skip("keys and values repeat their heads differently")
    return Found({**arguments, "k": k, "v": v}, tuple(dict.fromkeys((*k_nodes, *v_nodes, node))), (node,))


def _unrepeated(node: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    """The keys (or values) before each head was repeated for a group of queries: `expand(unsqueeze(k, 2))` reshaped,
    or one head expanded.
    """
    if (
        node.target is aten.reshape.default
        and isinstance(node.args[0], fx.Node)
        and node.args[0].target is aten.expand.default
    ):
        wide: Any = node.args[0]
        single: Any = wide.args[0]
        if single.target is not aten.unsqueeze.default or single.meta["val"].ndim != 5 or int(single.args[1]) % 5 != 2:
            return None
        k = single.args[0]
        old, new, out = shape_of(k), shape_of(wide), shape_of(node)
        groups = (*new[:2], *new[3:])
        if not same_shape(old, groups) or not same_shape((out[0], *out[2:]), (old[0], *old[2:])):
            return None
        return k, [single, wide, node]
    if node.target is aten.expand.default and isinstance(node.args[0], fx.Node) and node.meta["val"].ndim == 4:
        k = node.args[0]
        old, new = shape_of(k), shape_of(node)
        if len(old) == 4 and old[1] == 1 and same_shape((old[0], *old[2:]), (new[0], *new[2:])):
            return k, [node]
    if node.target is aten.repeat_interleave.self_int and int(node.args[2]) % 4 == 1:  # type: ignore[arg-type]
        return node.args[0], [node]  # type: ignore[return-value]
    return None


@rewrite(find=_find_repeated_heads, contract=_BOUND, stage=Stage.CANONICALIZE)
def raise_grouped_heads(m: Match) -> Result:
    """attention(q, repeat(k), repeat(v)) => attention(q, k, v, enable_gqa=True), where every head is repeated for its
    group of queries.
    """
    return _attention(m, m.q, m.k, m.v, m.mask, m.causal, m.scale, True)


def _find_mask(program: Program, node: fx.Node) -> Found | Skip | None:
    """An attention whose mask is a function of the positions alone and means everything, or the past."""
    arguments = _attention_values(node)
    mask = arguments["mask"] if arguments is not None else None
    if arguments is None or not isinstance(mask, fx.Node) or arguments["causal"]:
        return None
    condition = mask_condition(program, mask, LOW)
    if condition is None:
        return None
    row, column = index_symbols(mask.meta["val"].ndim)[-2:]
    causal = condition == at_least_zero(row - column)
    if not causal and condition != True:  # noqa: E712  a sympy truth value
        return None
    if causal and not same_size(shape_of(arguments["q"])[-2], shape_of(arguments["k"])[-2]):
        return Skip("a causal mask over another number of keys than queries is kept as it is")
    return Found({**arguments, "causal": causal}, (*cone([mask]), node), (node,))


@rewrite(find=_find_mask, contract=_BOUND, stage=Stage.CANONICALIZE, single_use=False)
def raise_causal_mask(m: Match) -> Result:
    """attention(q, k, v, mask) => attention(q, k, v, is_causal=True), when the mask's element at (…, i, j) is proved
    to be `j <= i`.

    The proof is `sparc.analysis.elements`: the mask's element as an expression in its indices, for every size. A mask
    that is proved to let everything through is dropped.
    """
    return _attention(m, m.q, m.k, m.v, None, m.causal, m.scale, m.gqa)


def _find_boolean_mask(program: Program, node: fx.Node) -> Found | Skip | None:
    arguments = _attention_values(node)
    mask = arguments["mask"] if arguments is not None else None
    if (
        arguments is None
        or not isinstance(mask, fx.Node)
        or mask.target not in (aten.where.self, aten.where.ScalarOther)
    ):
        return None
    condition, zero, low = mask.args
    rank = len(shape_of(condition))  # type: ignore[arg-type]
    if scalar_value(program, zero) != 0 or scalar_value(program, low) != -math.inf or rank < 2:
        return None
    return Found({**arguments, "mask": condition}, (mask, node), (node,))


@rewrite(find=_find_boolean_mask, contract=_BOUND, stage=Stage.CANONICALIZE, single_use=False)
def raise_boolean_mask(m: Match) -> Result:
    """attention(q, k, v, where(mask, 0, -inf)) => attention(q, k, v, mask).

    A mask with a finite lowest number stays additive: it differs where every key of a row is masked.
    """
    return _attention(m, m.q, m.k, m.v, m.mask, False, m.scale, m.gqa)


ATTENTION = (raise_attention, RemoveNoOps(), raise_grouped_heads, raise_causal_mask, raise_boolean_mask)
