"""Padding with what a pointwise layer gives for zero is padding its input with zeros (diverse branch blocks)."""

from typing import Any

import torch
from torch import Tensor, fx

from sparc.analysis.values import is_deterministic, tensor_type
from sparc.contract import Bounded
from sparc.execute import execute
from sparc.pass_base import Stage
from sparc.pattern import Found, normalized_arguments
from sparc.program import Program, is_weight
from sparc.region import cone, region
from sparc.rewrite import Match, Skip, rewrite

aten = torch.ops.aten

_CONV = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
_MOVES = {"slice", "expand", "expand_as", "reshape", "view", "unsqueeze", "detach", "alias", "slice_scatter", "pad",
          "constant_pad_nd"}  # fmt: skip
_EQUAL = 1e-12  # of the border and of what the layer gives for zero, in float64


def _find(program: Program, node: fx.Node) -> Found | Skip | None:
    """The last of the `slice_scatter` that write constants around `pad(layer(x))`."""
    scatter = aten.slice_scatter.default
    if node.target is not scatter or any(user.target is scatter and user.args[0] is node for user in node.users):
        return None
    writes: list[fx.Node] = []
    padded: Any = node
    while isinstance(padded, fx.Node) and padded.target is scatter:
        writes.append(padded)
        padded = padded.args[0]
    amounts = _zero_padding(padded)
    if amounts is None:
        return None
    layer: list[fx.Node] = []
    value = padded.args[0]
    while _is_pointwise(program, value):
        layer.append(value)
        value = value.args[0]
    if not layer or not isinstance(value, fx.Node):
        return None
    inner = _moves(program, [node], layer[0])
    if inner is None:
        return Skip("what is written around the padded value is computed")
    values = {"x": value, "amounts": amounts, "layer": tuple(reversed(layer)), "inner": inner}
    return Found(values, (*layer, *cone_behind(inner, node)), (node,))


def cone_behind(inner: set[fx.Node], node: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes between, in order, the last one at the end."""
    return tuple(each for each in cone([node]) if each in inner)


def _zero_padding(node: Any) -> list[int] | None:
    """The amounts of a padding with zeros of the last axes; None for anything else."""
    if not isinstance(node, fx.Node) or node.target not in (aten.pad.default, aten.constant_pad_nd.default):
        return None
    given = normalized_arguments(node)
    amounts = list(given["pad"])
    plain = given.get("mode", "constant") == "constant" and not given.get("value")
    known = all(isinstance(each, int) and each >= 0 for each in amounts)
    return amounts if plain and known and len(amounts) <= 2 * (node.meta["val"].ndim - 2) else None


def _is_pointwise(program: Program, node: Any) -> bool:
    """A convolution of single positions, or a batch norm with known statistics, of one image, with stored weights."""
    if not isinstance(node, fx.Node) or not all(is_weight(each) for each in node.all_input_nodes[1:]):
        return False
    if node.target is aten.batch_norm.default:
        given = normalized_arguments(node)
        return not given["training"] and given["running_mean"] is not None and given["running_var"] is not None
    if node.target not in _CONV:
        return False
    given, kind = normalized_arguments(node), tensor_type(node.args[1])
    one = kind is not None and all(size == 1 for size in kind.shape[2:])
    return one and not any(given["padding"]) and all(each == 1 for each in given["stride"])


def _moves(program: Program, results: list[fx.Node], start: fx.Node) -> set[fx.Node] | None:
    """The nodes between `start` and the results, if they move values only, or depend on no input."""
    found: set[fx.Node] = set()
    stack = list(results)
    while stack:
        node = stack.pop()
        if node is start or node in found or is_weight(node):
            continue
        reads = any(each is start for each in cone([node]))
        moves = getattr(node.target, "_opname", "") in _MOVES
        if node.op != "call_function" or not is_deterministic(node) or (reads and not moves):
            return None
        found.add(node)
        stack += node.all_input_nodes
    return found


@rewrite(find=_find, contract=Bounded(1e-4), stage=Stage.CANONICALIZE)
def raise_padding(m: Match) -> "fx.Node | Skip | None":
    """layer(x), padded with b => layer(pad(x, 0)), where the layer maps every position by itself, and zero to b."""
    layer = m.layer
    if not _writes_border(m, layer[-1]):
        return m.skip("what is written around the padded value is not what the layer gives for zero")
    target = aten.constant_pad_nd.default
    value = m.call(target, m.x, m.amounts, 0.0)
    for node in layer:
        value = m.call(node.target, value, *node.args[1:], **node.kwargs)
    return value


def _writes_border(m: Match, last: fx.Node) -> bool:
    """Whether the region keeps the layer's result where it is, and has the layer's value of zero everywhere else."""
    kind, weights = last.meta["val"], m.program.weights
    sizes = [int(size) if isinstance(size, int) else int(size.node.hint) for size in kind.shape]
    x_sizes = [int(size) if isinstance(size, int) else int(size.node.hint) for size in m.x.meta["val"].shape]
    around = region([m.roots[0]], m.inner, [last])
    layer = region([last], set(m.layer), [m.x])
    zero = torch.zeros(x_sizes, dtype=torch.float64)
    (of_zero,) = execute(layer, weights, [zero], wide=True)
    marked = torch.arange(1.0, 1.0 + torch.Size(sizes).numel(), dtype=torch.float64).reshape(sizes) * 1e6
    (found,) = execute(around, weights, [marked], wide=True)
    padded: Tensor = torch.nn.functional.pad(marked, m.amounts, value=float("nan"))
    inside = ~padded.isnan()
    border = of_zero.flatten(2)[:, :, :1].reshape(*of_zero.shape[:2], *[1] * (of_zero.ndim - 2)).expand_as(padded)
    off = (found - border)[~inside].abs().max() if bool((~inside).any()) else torch.zeros(())
    return torch.equal(found[inside], padded[inside]) and bool(off <= _EQUAL * (1 + border.abs().max()))


PADDING = (raise_padding,)
