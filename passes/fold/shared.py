"""Branches that share a weight: the weight is applied once, to their sum."""

from typing import Any

import torch
from torch import Tensor, fx

from sparc.analysis.values import same_type
from sparc.contract import Bounded
from sparc.pass_base import Stage
from sparc.pattern import Found, normalized_arguments
from sparc.program import Program, is_weight
from sparc.rewrite import Match, Skip, rewrite

aten = torch.ops.aten

_PRODUCTS = (aten.linear.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)


def _find(program: Program, node: fx.Node) -> Found | Skip | None:
    """The sum of two products with one weight, of values of one shape."""
    if node.target not in (aten.add.Tensor, aten.sub.Tensor) or len(node.args) != 2 or node.kwargs:
        return None
    left, right = node.args
    if not all(isinstance(each, fx.Node) and each.target in _PRODUCTS for each in (left, right)) or left is right:
        return None
    pair = [dict(normalized_arguments(each)) for each in (left, right)]  # type: ignore[arg-type]
    xs, biases = [each.pop("input") for each in pair], [each.pop("bias") for each in pair]
    if left.target is not right.target or str(pair[0]) != str(pair[1]):  # type: ignore[union-attr]
        return None
    if not same_type(xs[0].meta["val"], xs[1].meta["val"]):
        return Skip("the branches' inputs have different shapes")
    if not all(bias is None or is_weight(bias) for bias in biases):
        return Skip("a bias is computed")
    values = {"x": xs[0], "y": xs[1], "product": left, "b": biases[0], "c": biases[1]}
    return Found(values, (left, right, node), (node,))  # type: ignore[arg-type]


@rewrite(find=_find, contract=Bounded(1e-4), stage=Stage.FOLD)
def fold_shared(m: Match) -> fx.Node:
    """linear(x, W, b) + linear(y, W, c) => linear(x + y, W, b + c), also for convolutions and differences."""
    target: Any = m.roots[0].target
    given = normalized_arguments(m.product)
    return m.call(m.product.target, *{**given, "input": m.call(target, m.x, m.y), "bias": _bias(m, target)}.values())


def _bias(m: Match, target: Any) -> fx.Node | None:
    sign = -1.0 if target is aten.sub.Tensor else 1.0
    found: list[Tensor] = []
    for name, factor in (("b", 1.0), ("c", sign)):
        if getattr(m, name) is not None:
            tensor = m.weight(name)
            assert tensor is not None
            found.append(factor * tensor)
    total = sum(found[1:], found[0]) if found else None
    if total is None or not bool(total.any()):
        return None
    return m.constant(total, like="b" if m.b is not None else "c")
