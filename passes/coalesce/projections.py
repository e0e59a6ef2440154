"""Products of one value become one in entries with a cache, whose calls have one row for the most part: the projections
of an attention, as fused operators of attention read them, and the two of a gate.
"""

from typing import Any

import torch
from torch import fx

from sparc.contract import Bounded
from sparc.pass_base import Stage
from sparc.passes.coalesce.parallel import found_products, stack, stack_together
from sparc.pattern import Found, normalized_arguments
from sparc.program import Program
from sparc.rewrite import Match, Skip, rewrite

aten = torch.ops.aten

_MOVES = (aten.transpose.int, aten.permute.default, aten.reshape.default, aten.view.default, aten.slice.Tensor,
          aten.add.Tensor, aten.mul.Tensor, aten.cat.default)  # fmt: skip
_ACTIVATIONS = (aten.silu.default, aten.gelu.default, aten.relu.default, aten.sigmoid.default)


def _find(program: Program, node: fx.Node) -> Found | None:
    products: list[fx.Node | None]
    if node.target is aten.scaled_dot_product_attention.default:
        given = normalized_arguments(node)
        products = [_product(given["query"]), *(_product(_joined(given[name])) for name in ("key", "value"))]
    elif node.target is aten.mul.Tensor:
        products = [*sorted(each for each in map(_activated, node.args) if each is not None)]
    else:
        return None
    if program.entry_of(node).cache is None or None in products or len(set(products)) < max(2, len(products)):
        return None
    return found_products(products) if stack_together(program, products) else None  # type: ignore[arg-type]


def _activated(node: Any) -> fx.Node | None:
    """The product that a factor is, maybe behind an activation."""
    if isinstance(node, fx.Node) and node.target in _ACTIVATIONS:
        node = node.args[0]
    return node if isinstance(node, fx.Node) and node.target is aten.linear.default else None


def _joined(node: Any) -> Any:
    """What is appended to the cache."""
    parts: Any = node.args[0] if isinstance(node, fx.Node) and node.target is aten.cat.default else ()
    return parts[1] if len(parts) == 2 and parts[0].op == "placeholder" else None


def _product(node: Any) -> fx.Node | None:
    """The product whose result, moved and rotated maybe, a node is: the first operand leads there."""
    while isinstance(node, fx.Node):
        if node.target is aten.linear.default:
            return node
        if node.target not in _MOVES:
            return None
        node = node.args[0]
        if isinstance(node, (list, tuple)):  # heads of which only the first part is rotated
            node = node[0]
    return None


@rewrite(find=_find, contract=Bounded(1e-4), stage=Stage.COALESCE)
def stack_projections(m: Match) -> "tuple[fx.Node, ...] | Skip":
    """linear(x, Q), linear(x, K), linear(x, V) => split(linear(x, [Q; K; V])), where they are the queries, keys and
    values of an attention over a cache; and the two factors of silu(linear(x, A)) * linear(x, B) likewise, in entries
    with a cache. Weights on grids stay there.
    """
    return stack(m)
