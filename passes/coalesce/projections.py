"""The projections of an attention over a cache become one product, as fused operators of attention read them."""

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


def _find(program: Program, node: fx.Node) -> Found | None:
    if node.target is not aten.scaled_dot_product_attention.default or program.entry_of(node).cache is None:
        return None
    given = normalized_arguments(node)
    products = [_product(given["query"]), *(_product(_joined(given[name])) for name in ("key", "value"))]
    if any(each is None for each in products) or len(set(products)) < len(products):
        return None
    return found_products(products) if stack_together(program, products) else None  # type: ignore[arg-type]


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
    values of an attention over a cache. Encoded weights stay on their grids.
    """
    return stack(m)
