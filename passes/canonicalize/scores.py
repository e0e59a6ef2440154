"""What stands between the product of queries and keys and the softmax of an attention, read backwards from the softmax.

Every spelling is brought to `scale * factors * (q @ k) + sum(weight_i * mask_i)`.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sparc.analysis.values import same_shape, scalar_value, shape_of
from sparc.program import Program

aten = torch.ops.aten

PRODUCTS = (aten.matmul.default, aten.bmm.default)
LOW = -1e30  # added to any score of float32 computations, it absorbs it and leaves no weight after the softmax

_MULTIPLIES = (aten.mul.Tensor, aten.mul.Scalar)
_DIVIDES = (aten.div.Tensor, aten.div.Scalar)
_FILLS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
_CHOICES = (aten.where.self, aten.where.ScalarOther)
_DEPTH = 8
_ELEMENTWISE = {
    "softmax", "_softmax", "add", "mul", "div", "where", "masked_fill", "tanh", "to", "clamp", "maximum", "cat",
    "reshape", "sub", "slice", "split", "getitem",
}  # fmt: skip


@dataclass(frozen=True)
class Mask:
    """What is added to the scores.

    Args:
        tensor: an additive mask, or a condition.
        weight: a factor on an additive mask.
        low: with a condition, the number that scores become; None for an additive mask.
        hides: whether the condition marks the scores that become `low` (as `masked_fill` does), or those that stay.
        flat: whether the mask is added before the heads are split off the batch axis.
    """

    tensor: fx.Node
    weight: float = 1.0
    low: float | None = None
    hides: bool = False
    flat: bool = False


@dataclass
class Scores:
    """What was gathered.

    Args:
        nodes: the nodes passed, the product among them.
        scale: the product of all factors on `q @ k`.
        factors: tensors `[..., 1]` that multiply the scores.
        masks: what is added.
        split: the reshape that splits `[batch * heads, q, k]`, if there is one.
        q: the queries `[..., q, features]`.
        kt: the transposed keys `[..., features, k]`.
        why: why this is no attention that can be raised; empty when it is.
    """

    nodes: list[fx.Node] = field(default_factory=list)
    scale: float = 1.0
    factors: list[fx.Node] = field(default_factory=list)
    masks: list[Mask] = field(default_factory=list)
    split: fx.Node | None = None
    q: Any = None
    kt: Any = None
    why: str = ""


def read_scores(program: Program, logits: Any) -> Scores:
    """Walk from the softmax's input back to the product of queries and keys."""
    scores = Scores()
    current = logits
    while scores.q is None and not scores.why:
        current = _step(program, current, scores)
    if not scores.why:
        scores.q, scores.kt = (_unscaled(program, each, scores) for each in (scores.q, scores.kt))
    return scores


def _step(program: Program, current: Any, scores: Scores) -> Any:
    if not isinstance(current, fx.Node) or current.op != "call_function":
        scores.why = "no product of queries and keys leads to the softmax"
        return None
    scores.nodes.append(current)
    target, args = current.target, current.args
    if target in PRODUCTS:
        scores.q, scores.kt = args[0], args[1]
    elif target is aten.baddbmm.default:
        scores.masks.append(Mask(args[0], scores.scale * float(current.kwargs.get("beta", 1)), flat=True))  # type: ignore[arg-type]
        scores.scale *= float(current.kwargs.get("alpha", 1))  # type: ignore[arg-type]
        scores.q, scores.kt = args[1], args[2]
    elif target in (*_MULTIPLIES, *_DIVIDES) and not current.kwargs:
        return _scaled(program, current, scores)
    elif target is aten.add.Tensor and not current.kwargs:
        return _added(current, scores)
    elif target in _FILLS or target in _CHOICES:
        return _replaced(program, current, scores)
    elif target is aten.reshape.default and scores.split is None and _splits_heads(current):
        scores.split = current
        return args[0]
    else:
        scores.why = f"{operator_name(current)} stands between the scores and the softmax"
    return None


def _scaled(program: Program, current: fx.Node, scores: Scores) -> Any:
    sides = [(current.args[0], current.args[1]), (current.args[1], current.args[0])]
    divides = current.target in _DIVIDES
    for value, other in sides[:1] if divides else sides:
        number = scalar_value(program, other)
        if number is not None:
            scores.scale *= 1 / number if divides else number
            return value
        is_factor = isinstance(other, fx.Node) and not _has_product(other) and shape_of(other)[-1:] == (1,)
        if is_factor and not divides and scores.split is None and isinstance(value, fx.Node):
            scores.factors.append(other)  # type: ignore[arg-type]
            return value
    scores.why = "the scores are multiplied by a tensor"
    return None


def _added(current: fx.Node, scores: Scores) -> Any:
    sides = [side for side in current.args if isinstance(side, fx.Node)]
    paths = [side for side in sides if _has_product(side) and same_shape(shape_of(side), shape_of(current))]
    if len(sides) != 2 or not paths or scores.factors:
        scores.why = "the scores are multiplied by a tensor after the mask" if paths else "what is added is no mask"
        return None
    mask = sides[1 - sides.index(paths[0])]
    scores.masks.append(Mask(mask, scores.scale, flat=scores.split is not None))
    return paths[0]


def _replaced(program: Program, current: fx.Node, scores: Scores) -> Any:
    """`masked_fill(scores, mask, low)` and `where(mask, scores, low)`: additive masks, if `low` absorbs every score."""
    fills = current.target in _FILLS
    value, condition, low = current.args if fills else (current.args[1], current.args[0], current.args[2])
    number = scalar_value(program, low)
    if number is None or not number * scores.scale <= LOW or scores.factors:
        scores.why = f"masked scores become {number}, which other scores could outweigh"
        return None
    low = (
        max(float(number) * scores.scale, torch.finfo(torch.float32).min) if number != float("-inf") else float(number)
    )
    scores.masks.append(Mask(condition, 1.0, low, fills, scores.split is not None))  # type: ignore[arg-type]
    return value


def _splits_heads(node: fx.Node) -> bool:
    """Whether a reshape turns `[batch * heads, q, k]` to `[batch, heads, q, k]`, with sizes that are all given."""
    old, new = shape_of(node.args[0]), shape_of(node)  # type: ignore[arg-type]
    given: Any = node.args[1]
    return len(old) == 3 and len(new) == 4 and same_shape(old[-2:], new[-2:]) and -1 not in given[:2]


def operator_name(node: fx.Node) -> str:
    """The operator's name without overload."""
    return str(getattr(node.target, "_opname", None) or getattr(node.target, "__name__", node.target))


def leads_to_product(node: fx.Node) -> bool:
    """Whether a product of two computed tensors leads to a node within a few elementwise steps."""
    return _has_product(node)


def _has_product(node: fx.Node) -> bool:
    front = [node]
    for _ in range(_DEPTH):
        if any(each.target in (*PRODUCTS, aten.baddbmm.default) for each in front):
            return True
        calls = [each for each in front if operator_name(each) in _ELEMENTWISE]
        front = [used for each in calls for used in each.all_input_nodes if used.op == "call_function"]
    return False


def _unscaled(program: Program, node: fx.Node, scores: Scores) -> fx.Node:
    """The input of a multiplication by a number, whose factor moves into the scale."""
    if node.target not in _MULTIPLIES or len(node.users) > 1 or node.kwargs:
        return node
    number = scalar_value(program, node.args[1])
    if number is None or not isinstance(node.args[0], fx.Node):
        return node
    scores.scale *= number
    scores.nodes.append(node)
    return node.args[0]
