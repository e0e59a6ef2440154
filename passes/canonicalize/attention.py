"""Eager attention => `aten.scaled_dot_product_attention`, with causal masks and repeated heads as its own arguments."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sparc.analysis.elements import at_least_zero, index_symbols, mask_condition
from sparc.analysis.values import same_shape, same_size, scalar_value, shape_of
from sparc.contract import Bounded
from sparc.pass_base import Stage
from sparc.passes.clean import RemoveNoOps
from sparc.pattern import Found, normalized_arguments
from sparc.program import Program
from sparc.rewrite import Match, Skip, rewrite

aten = torch.ops.aten
Result = fx.Node | Skip
_BOUND = Bounded(1e-4)
_PRODUCTS = (aten.matmul.default, aten.bmm.default)
_LOWEST = (float("-inf"), torch.finfo(torch.float32).min)
_DEPTH = 8


@dataclass
class _Scores:
    """What stands between `q @ k` and the softmax, gathered from the softmax backwards.

    Args:
        nodes: the nodes passed.
        scale: the product of all factors.
        scaled: whether a factor was met, which then also scales whatever was added before.
        masks: what is added to the scaled scores: tensors, or `(condition, value)` where `value` replaces the scores outside the condition.
    """

    nodes: list[fx.Node] = field(default_factory=list)
    scale: float = 1.0
    scaled: bool = False
    masks: list[Any] = field(default_factory=list)


def _find_attention(program: Program, node: fx.Node) -> Found | Skip | None:
    softmax = node.args[0] if node.target in _PRODUCTS else None
    if not isinstance(softmax, fx.Node) or softmax.target not in (aten.softmax.int, aten._softmax.default):
        return None
    scores, why = _Scores([node, softmax]), None
    current: Any = softmax.args[0]
    rank = softmax.meta["val"].ndim
    if int(softmax.args[1]) % rank != rank - 1:  # type: ignore[arg-type]
        why = "the softmax is not over the keys"
    elif node.meta["val"].dtype != torch.float32 or softmax.meta["val"].dtype != torch.float32:
        why = "it is not computed in float32 throughout"
    while why is None and current.target not in _PRODUCTS:
        following = _step(program, current, scores)
        if isinstance(following, str):
            why = following
        else:
            current = following
    if why is not None:
        return Skip(f"attention was not raised: {why}") if _has_product(softmax) else None
    scores.nodes.append(current)
    q, kt, v = current.args[0], current.args[1], node.args[1]
    shapes = [shape_of(each) for each in (q, kt, v)]
    if not all(same_shape(shapes[0][:-2], shape[:-2]) and len(shape) > 2 for shape in shapes):
        return Skip("attention was not raised: queries, keys and values have different batch sizes")
    q, kt = _unscaled(program, q, scores), _unscaled(program, kt, scores)
    return Found({"q": q, "kt": kt, "v": v, "scores": scores}, tuple(scores.nodes), (node,))


def _step(program: Program, current: Any, scores: _Scores) -> Any:
    """One operator backwards from the softmax; a text when it cannot be part of an attention."""
    if not isinstance(current, fx.Node) or current.op != "call_function":
        return "no product of queries and keys leads to the softmax"
    scores.nodes.append(current)
    target, args = current.target, current.args
    if target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar) and not current.kwargs:
        for value, other in ((args[0], args[1]), (args[1], args[0])):
            number = scalar_value(program, other)
            if number is not None and (value is args[0] or target is aten.mul.Tensor):
                scores.scale *= 1 / number if target in (aten.div.Tensor, aten.div.Scalar) else number
                scores.scaled = True
                return value
        return "the scores are multiplied by a tensor"
    if scores.scaled and target not in _PRODUCTS:
        return "the mask is scaled together with the scores"
    if target is aten.add.Tensor and not current.kwargs:
        sides = [side for side in args if isinstance(side, fx.Node)]
        paths = [side for side in sides if _has_product(side) and same_shape(shape_of(side), shape_of(current))]
        if len(sides) != 2 or not paths:
            return "a number is added to the scores" if len(sides) < 2 else "no product of queries and keys leads to the softmax"
        scores.masks.append(sides[1 - sides.index(paths[0])])
        return paths[0]
    if target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.self, aten.where.ScalarOther):
        return _replaced_scores(program, current, scores)
    return f"{_name(current)} stands between the scores and the softmax"


def _replaced_scores(program: Program, current: fx.Node, scores: _Scores) -> Any:
    """`masked_fill(scores, mask, low)` and `where(mask, scores, low)`: additive masks, if `low` absorbs every score."""
    if scores.masks:
        return "the scores are masked twice"
    filled = current.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
    value, condition, low = current.args if filled else (current.args[1], current.args[0], current.args[2])
    number = scalar_value(program, low)
    if number is None or number not in _LOWEST:
        return f"masked scores become {number}, not the lowest number, which matters where every key is masked"
    scores.masks.append((condition, float(number), filled))
    return value


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "_opname", None) or getattr(node.target, "__name__", node.target))


def _has_product(node: fx.Node) -> bool:
    """Whether a product of two computed tensors leads to a node within a few elementwise steps."""
    front = [node]
    for _ in range(_DEPTH):
        if any(each.target in _PRODUCTS for each in front):
            return True
        front = [used for each in front for used in each.all_input_nodes if used.op == "call_function" and _name(each) in _ELEMENTWISE]
    return False


_ELEMENTWISE = {"softmax", "_softmax", "add", "mul", "div", "where", "masked_fill", "tanh", "to", "clamp", "maximum", "cat", "reshape", "sub"}


def _unscaled(program: Program, node: fx.Node, scores: _Scores) -> fx.Node:
    """The input of a multiplication by a number, whose factor moves into the scale."""
    if node.target not in (aten.mul.Tensor, aten.mul.Scalar) or len(node.users) > 1 or node.kwargs:
        return node
    number = scalar_value(program, node.args[1])
    if number is None or not isinstance(node.args[0], fx.Node):
        return node
    scores.scale *= number
    scores.nodes.append(node)
    return node.args[0]


@rewrite(find=_find_attention, contract=_BOUND, stage=Stage.CANONICALIZE)
def raise_attention(m: Match) -> Result:
    """matmul(softmax(scale * matmul(q, kᵀ) + mask, -1), v) => scaled_dot_product_attention(q, k, v, mask, scale=scale).

    Where every key of a row is masked with -inf, the original gives NaN and the replacement zero.
    """
    scores: _Scores = m.scores
    mask = None
    for each in scores.masks:
        added = _additive(m, each)
        mask = added if mask is None else m.op.add(mask, added)
    if mask is not None and mask.meta["val"].ndim < 2:
        return m.skip("attention was not raised: the mask is a vector")
    k = m.op.transpose(m.kt, -2, -1)
    return _attention(m, m.q, k, m.v, mask, False, scores.scale, False)


def _additive(m: Match, mask: Any) -> fx.Node:
    if isinstance(mask, fx.Node):
        return mask
    condition, low, means_masked = mask
    zero = m.op.full([], 0.0, dtype=torch.float32)
    lowest = m.op.full([], low, dtype=torch.float32)
    return m.op.where(condition, lowest, zero) if means_masked else m.op.where(condition, zero, lowest)


def _attention(m: Match, q: Any, k: Any, v: Any, mask: Any, causal: bool, scale: float | None, gqa: bool) -> fx.Node:
    """The call with only the arguments that differ from their defaults, so that equal attentions are spelt equally."""
    options = {"is_causal": bool(causal), "scale": scale, "enable_gqa": bool(gqa)}
    given = {name: value for name, value in options.items() if value is not False and value is not None}
    return m.op.scaled_dot_product_attention(q, k, v, *([mask] if mask is not None else []), **given)


# arguments of attention that stand around it ------------------------------------------------------------------------------
def _attention_values(node: fx.Node) -> dict[str, Any] | None:
    if node.target is not aten.scaled_dot_product_attention.default:
        return None
    found = normalized_arguments(node)
    short = {"q": "query", "k": "key", "v": "value", "mask": "attn_mask", "scale": "scale", "causal": "is_causal", "gqa": "enable_gqa"}
    return {name: found[long] for name, long in short.items()} if found["dropout_p"] == 0 else None


def _find_repeated_heads(program: Program, node: fx.Node) -> Found | Skip | None:
    arguments = _attention_values(node)
    if arguments is None or arguments["gqa"]:
        return None
    found = [_unrepeated(arguments[name]) for name in ("k", "v")]
    if found[0] is None or found[1] is None:
        return None
    (k, k_nodes), (v, v_nodes) = found
    if not same_size(shape_of(k)[1], shape_of(v)[1]):
        return Skip("keys and values repeat their heads differently")
    return Found({**arguments, "k": k, "v": v}, tuple(dict.fromkeys((*k_nodes, *v_nodes, node))), (node,))


def _unrepeated(node: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    """The keys (or values) before each head was repeated for a group of queries: `expand(unsqueeze(k, 2))` reshaped, or one head expanded."""
    if node.target is aten.reshape.default and isinstance(node.args[0], fx.Node) and node.args[0].target is aten.expand.default:
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
    """attention(q, repeat(k), repeat(v)) => attention(q, k, v, enable_gqa=True), where every head is repeated for its group of queries."""
    return _attention(m, m.q, m.k, m.v, m.mask, m.causal, m.scale, True)


def _find_mask(program: Program, node: fx.Node) -> Found | Skip | None:
    """An attention whose mask is a function of the positions alone and means everything, or the past."""
    arguments = _attention_values(node)
    mask = arguments["mask"] if arguments is not None else None
    if arguments is None or not isinstance(mask, fx.Node) or arguments["causal"]:
        return None
    condition = mask_condition(program, mask, _LOWEST)
    if condition is None:
        return None
    row, column = index_symbols(mask.meta["val"].ndim)[-2:]
    causal = condition == at_least_zero(row - column)
    if not causal and condition != True:  # noqa: E712  a sympy truth value
        return None
    if causal and not same_size(shape_of(arguments["q"])[-2], shape_of(arguments["k"])[-2]):
        return Skip("a causal mask over another number of keys than queries is kept as it is")
    return Found({**arguments, "causal": causal}, (node,), (node,))


@rewrite(find=_find_mask, contract=_BOUND, stage=Stage.CANONICALIZE)
def raise_causal_mask(m: Match) -> Result:
    """attention(q, k, v, mask) => attention(q, k, v, is_causal=True), when the mask's element at (…, i, j) is proved to be `j <= i`.

    The proof is `sparc.analysis.elements`: the mask's element as an expression in its indices, for every size. A mask that is
    proved to let everything through is dropped.
    """
    return _attention(m, m.q, m.k, m.v, None, m.causal, m.scale, m.gqa)


def _find_boolean_mask(program: Program, node: fx.Node) -> Found | Skip | None:
    arguments = _attention_values(node)
    mask = arguments["mask"] if arguments is not None else None
    if arguments is None or not isinstance(mask, fx.Node) or mask.target not in (aten.where.self, aten.where.ScalarOther):
        return None
    condition, zero, low = mask.args
    if scalar_value(program, zero) != 0 or scalar_value(program, low) != -math.inf or condition.meta["val"].ndim < 2:  # type: ignore[union-attr]
        return None
    return Found({**arguments, "mask": condition}, (mask, node), (node,))


@rewrite(find=_find_boolean_mask, contract=_BOUND, stage=Stage.CANONICALIZE, single_use=False)
def raise_boolean_mask(m: Match) -> Result:
    """attention(q, k, v, where(mask, 0, -inf)) => attention(q, k, v, mask). A mask with a finite lowest number stays additive: it differs
    where every key of a row is masked."""
    return _attention(m, m.q, m.k, m.v, m.mask, False, m.scale, m.gqa)


ATTENTION = (raise_attention, RemoveNoOps(), raise_grouped_heads, raise_causal_mask, raise_boolean_mask)
