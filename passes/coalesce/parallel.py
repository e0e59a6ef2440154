"""Products that read one value (query, key and value; gate and up; branches of one shape) become one product."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from sparc.analysis.values import same_shape, tensor_type
from sparc.contract import Bounded
from sparc.encoding.grid import Grid
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.operators import is_decode
from sparc.pass_base import Stage
from sparc.passes.fold.norm import kept_elsewhere
from sparc.pattern import Found, normalized_arguments
from sparc.program import Program, is_weight
from sparc.rewrite import Match, Skip, rewrite

aten = torch.ops.aten

_PRODUCTS = (aten.linear.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)


def _alike(program: Program, node: fx.Node) -> Any:
    """What products must share to be stacked: operator, geometry, the weight's shape but for its rows, and types."""
    given = dict(normalized_arguments(node))
    del given["input"]
    record, bias = program.weights.record(str(given.pop("weight").target)), given.pop("bias")
    geometry = tuple((name, str(value)) for name, value in given.items())
    spec = None if record.grid is None else str(record.grid.spec)
    return node.target, geometry, record.tensor.shape[1:], record.tensor.dtype, bias is not None, spec


def _reason(program: Program, node: fx.Node) -> str:
    """Why a product cannot be stacked with others; empty when it can."""
    given = normalized_arguments(node)
    weight, bias = given["weight"], given["bias"]
    if not is_weight(weight):
        return "its weight is encoded already" if is_decode(weight) else "its weight is computed"
    if bias is not None and not is_weight(bias):
        return "its bias is computed"
    if any(user.target is aten.view.default for user in node.users):
        return "its result is viewed, which needs it in one piece"
    if weight.meta["val"].ndim < 2:
        return "its weight is a vector"
    grid = program.grid(weight)
    if grid is not None and not _by_rows(grid):
        return f"its grid {grid.spec} holds for the whole weight"
    if len(weight.users) > 1 or (bias is not None and len(bias.users) > 1):
        return "its weight is used elsewhere as well"
    return "its channels are mapped in groups" if given.get("groups", 1) != 1 else ""


def _by_rows(grid: Grid) -> bool:
    """Whether every row of a weight has its own part of the grid."""
    return isinstance(grid.spec, IntGrid) and grid.spec.group != "tensor" and grid.view == "matrix"


def _find(program: Program, node: fx.Node) -> Found | Skip | None:
    """The products of one value that can be stacked, unless their weights stay for another entry."""
    found = _find_here(program, node)
    if not isinstance(found, Found):
        return found

    def again(user: fx.Node) -> Iterator[object]:
        return (_find_here(program, each) for each in user.all_input_nodes[0].users)

    return kept_elsewhere(program, found, again) or found


def _find_here(program: Program, node: fx.Node) -> Found | Skip | None:
    """The products of one value that can be stacked, where `node` is the first of them."""
    if node.target not in _PRODUCTS or not isinstance(node.args[0], fx.Node):
        return None
    x = node.args[0]
    others = [each for each in x.users if each.target == node.target and each.args[0] is x]
    if len(others) < 2:
        return None
    why = _reason(program, node)
    if why:
        return Skip(why)
    kind = _alike(program, node)
    group = [each for each in others if not _reason(program, each) and _alike(program, each) == kind]
    group.sort()  # by their places in the graph
    return found_products(group) if group[0] is node and len(group) > 1 else None


def stack_together(program: Program, products: Sequence[fx.Node]) -> bool:
    """Whether some products, all of one value, can be stacked."""
    if any(each.target not in _PRODUCTS or each.args[0] is not products[0].args[0] for each in products):
        return False
    return (
        not any(_reason(program, each) for each in products) and len({_alike(program, each) for each in products}) == 1
    )


def found_products(group: Sequence[fx.Node]) -> Found:
    """A match of products to be stacked in this order."""
    first = group[0]
    bias = normalized_arguments(first)["bias"]
    values = {"x": first.args[0], "products": tuple(group), "w": first.args[1], "b": bias}
    return Found(values, tuple(group), tuple(group))


@rewrite(find=_find, contract=Bounded(1e-4), stage=Stage.COALESCE)
def coalesce_parallel(m: Match) -> "tuple[fx.Node, ...] | Skip":
    """linear(x, A, a), linear(x, B, b), ... => split(linear(x, [A; B; ...], [a; b; ...])), also for convolutions of one
    geometry. Weights that lie on grids of one kind, a scale for each row at least, lie on the stacked grid.
    """
    return stack(m)


def stack(m: Match) -> "tuple[fx.Node, ...] | Skip":
    """The rewrite of a match by `found_products`."""
    products: tuple[fx.Node, ...] = m.products
    kinds = [tensor_type(each) for each in products]
    axis = 1 - m.w.meta["val"].ndim  # the same with and without a batch
    weights, biases = _stacked(m, "weight", "w"), _stacked(m, "bias", "b")
    given = {**normalized_arguments(products[0]), "input": m.x, "weight": weights, "bias": biases}
    whole = m.call(products[0].target, *given.values())
    sizes = [kind.shape[axis] for kind in kinds if kind is not None]
    pieces = m.call(aten.split_with_sizes.default, whole, sizes, axis)
    found = tuple(m.op.getitem(pieces, index) for index in range(len(products)))
    same = all(same_shape(a.meta["val"].shape, b.meta["val"].shape) for a, b in zip(found, products, strict=True))
    return found if same else m.skip("the pieces cannot be shown to have the products' shapes")


def _stacked(m: Match, name: str, like: str) -> fx.Node | None:
    nodes = [normalized_arguments(each)[name] for each in m.products]
    if nodes[0] is None:
        return None
    records = [m.program.weights.record(str(each.target)) for each in nodes]
    made = m.constant(torch.cat([each.tensor for each in records]), like=like, of=nodes)
    grids = [each.grid for each in records if each.grid is not None]
    if len(grids) == len(records):
        parts = {part: torch.cat([grid.tensors[part] for grid in grids]) for part in grids[0].tensors}
        m.program.set_weight(made, m.program.weights[str(made.target)], replace(grids[0], tensors=parts))
    return made
