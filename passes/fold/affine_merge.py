"""Products, scalings and sums that are one affine map of one value become one product.

Branches that read one value (RepVGG, MobileOne, ACNet, diverse branch blocks, OREPA, LoRA), products that follow one
another, and factors and norms around them are all the same thing: a region whose result is `K * x + b`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx

from sparc.contract import Bounded
from sparc.pass_base import Stage
from sparc.passes.fold.affine import AffineMap, Impossible, diagonal, plus, regrouped, then
from sparc.passes.fold.norm import kept_elsewhere
from sparc.passes.fold.terms import MOST, Constants, Layout, channels, is_product, layout_of, may_be_affine, terms
from sparc.pattern import Found
from sparc.program import Program, is_weight
from sparc.rewrite import Match, Skip, rewrite

aten = torch.ops.aten

_CONV = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}


@dataclass
class _Region:
    """A root as a sum of maps of the values in `maps`, through the nodes `inner`.

    Args:
        root: the result.
        layout: of channels.
        maps: of each value that is read.
        inner: the nodes between.
        why: why it cannot be extended further; empty where nothing forbids it.
    """

    root: fx.Node
    layout: Layout
    maps: dict[fx.Node, AffineMap]
    inner: list[fx.Node] = field(default_factory=list)
    why: str = ""

    @property
    def products(self) -> list[fx.Node]:
        """The linear layers and convolutions inside."""
        return [node for node in self.inner if is_product(node)]


@dataclass(frozen=True)
class _Plan:
    """What a region is replaced by: a map of `x`, through the nodes `inner`."""

    x: fx.Node
    layout: Layout
    inner: tuple[fx.Node, ...]


def _extensions(constants: Constants, root: fx.Node, layout: Layout, most: int = MOST) -> Iterator[_Region]:
    """The region of a root, growing by one node towards the inputs at a time."""
    count = channels(root, layout)
    if count is None:
        return
    region = _Region(root, layout, {root: diagonal(constants.filled((count,), 1.0), layout.rank)})
    while len(region.inner) < most:
        last = max(region.maps)  # nodes compare by their places in the graph
        if last is not root and any(user not in region.inner for user in last.users):
            outside = next(user for user in last.users if user not in region.inner)
            region.why = f"an inner value is also read by {outside.name}" if is_product(last) else ""
            yield region
            return
        try:
            found = terms(constants, last, layout)
            if found is not None:
                before = region.maps.pop(last)
                for term in found:
                    own = term.map if last is root else then(term.map, before)
                    known = region.maps.get(term.input)
                    region.maps[term.input] = own if known is None else plus(known, own)
                    before = AffineMap(before.kernel, None, *_geometry(before))  # the bias counts once
        except Impossible as error:
            region.maps.clear()
            region.why = str(error)
            yield region
            return
        if found is None:
            return
        region.inner.append(last)
        yield region


def _geometry(found: AffineMap) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    return found.stride, found.padding, found.dilation, found.groups


def _best(program: Program, root: fx.Node, layout: Layout) -> _Plan | Skip | None:
    """The largest region that ends in the root and is worth merging; why there is none, where one looked like it."""
    constants = Constants(program, "meta")
    best: _Plan | None = None
    reason = ""
    for region in _extensions(constants, root, layout):
        if region.why:
            reason = reason or (region.why if region.products else "")
            continue
        if len(region.maps) > 1 or len(region.inner) < 2 or not region.products:
            continue
        ((x, map),) = region.maps.items()
        why = _larger(program, region, map)
        if why:
            reason = reason or why
        else:
            best = _Plan(x, layout, tuple(region.inner))
    return best or (Skip(reason) if reason else None)


def _larger(program: Program, region: _Region, map: AffineMap) -> str:
    """Why the merged product is no gain; empty when it is one."""
    if any(each < 0 for each in map.padding):
        return "the merged product would crop its input"
    merged = map.kernel.numel() if region.layout.rank else map.outputs * map.inputs
    inner = set(region.inner)
    weights = {used for node in inner for used in node.all_input_nodes if is_weight(used)}
    gone = [program.weights[str(each.target)] for each in weights if all(user in inner for user in each.users)]
    freed = sum(tensor.numel() for tensor in gone if tensor.ndim > 1)
    return f"the merged weight would be larger: {merged} elements instead of {freed}" if merged > freed else ""


def _find(program: Program, node: fx.Node) -> Found | Skip | None:
    """The largest region that ends in a node, unless its weights stay for another entry."""
    found = _find_here(program, node)
    if not isinstance(found, Found):
        return found
    layout = found.values["plan"].layout

    def again(user: fx.Node) -> Iterator[object]:
        return (_find_here(program, each) for each in (user, *_onward(user, layout)))

    return kept_elsewhere(program, found, again) or found


def _find_here(program: Program, node: fx.Node) -> Found | Skip | None:
    """The largest region that ends in a node, unless one that ends further on holds it."""
    if not may_be_affine(node):
        return None
    layout = layout_of(node)
    if layout is None:
        return None
    for later in _onward(node, layout):
        plan = _best(program, later, layout)
        if isinstance(plan, _Plan) and node in plan.inner:
            return None
    plan = _best(program, node, layout)
    if not isinstance(plan, _Plan):
        return plan
    products = [each for each in reversed(plan.inner) if is_product(each)]
    largest = max(products, key=lambda each: _size(program, each))
    bias = next((each.args[2] for each in (largest, *products) if _has_bias(each)), None)
    values = {"x": plan.x, "w": largest.args[1], "b": bias, "plan": plan}
    return Found(values, plan.inner, (node,))


def _onward(node: fx.Node, layout: Layout) -> Iterator[fx.Node]:
    """The affine nodes that a node leads to without a fork."""
    for _ in range(MOST):
        users = list(node.users)
        if len(users) != 1 or not may_be_affine(users[0]) or channels(users[0], layout) is None:
            return
        node = users[0]
        yield node


def _size(program: Program, product: fx.Node) -> int:
    return program.weights[str(product.args[1].target)].numel()  # type: ignore[union-attr]


def _has_bias(product: fx.Node) -> bool:
    return len(product.args) > 2 and is_weight(product.args[2])


@rewrite(find=_find, contract=Bounded(1e-4), stage=Stage.FOLD)
def fold_affine(m: Match) -> "fx.Node | Skip":
    """A region of linear layers (or convolutions), batch norms, average pools, sums and factors per channel that is an
    affine map of one value x => linear(x, K, b) (conv(x, K, b)), when K is not larger than the weights it replaces.
    """
    plan: _Plan = m.plan
    regions = _extensions(Constants(m.program), m.roots[0], plan.layout, len(plan.inner))
    *_, region = regions
    map = region.maps[plan.x]
    kernel = regrouped(map, 1) if not plan.layout.rank else map.kernel
    weights = [each.args[1] for each in reversed(plan.inner) if is_product(each)]
    weight = m.constant(kernel, like="w", of=weights)  # type: ignore[arg-type]
    bias = None
    if map.bias is not None:
        bias = m.constant(map.bias, like="b") if m.b is not None else m.constant(map.bias, like="w", name="bias")
    if not plan.layout.rank:
        return m.op.linear(plan.x, weight, bias)
    stride, padding, dilation = list(map.stride), list(map.padding), list(map.dilation)
    return m.call(_CONV[plan.layout.rank], plan.x, weight, bias, stride, padding, dilation, map.groups)
