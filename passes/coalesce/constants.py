"""Units whose value does not depend on the input: their row is zero, and so is what it is multiplied by."""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from sparc.analysis.axes import leaves, positions
from sparc.analysis.coupling import Contraction
from sparc.analysis.dependency import Group
from sparc.analysis.values import size_hint
from sparc.execute import WideWeights, run_node
from sparc.pattern import normalized_arguments
from sparc.program import Program

_FUNCTIONS = frozenset(
    {"relu", "relu6", "leaky_relu", "gelu", "silu", "sigmoid", "tanh", "hardswish", "hardsigmoid", "hardtanh", "elu"}
    | {"selu", "softplus", "mish", "exp", "neg", "abs", "add", "sub", "div", "square", "cat", "chunk", "split"}
    | {"split_with_sizes", "slice", "reshape", "view", "flatten", "permute", "transpose", "unsqueeze", "squeeze"}
    | {"dropout", "clone", "contiguous", "max_pool1d", "max_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"}
)
_PRODUCTS = frozenset({"linear", "conv1d", "conv2d", "conv3d"})


@dataclass(frozen=True)
class ConstantInput:
    """What is constant in an input of a product.

    Args:
        index: `[units, each]` int64, the places of each unit along the axis that is summed over.
        value: `[units, each]` float64, the number at each place; NaN where it depends on the program's input.
        size: how long the axis is.
    """

    index: Tensor
    value: Tensor
    size: int


def constants(program: Program, group: Group) -> dict[Contraction, ConstantInput]:
    """The value of each unit where it is read, where that is one number for every input; else NaN.

    The nodes that hold the units are evaluated in float64 with NaN for all that depends on the input. A product gives
    its bias where its row is zero; zero times anything is zero; all other functions that are let through keep NaN.

    Args:
        program: the program.
        group: one whose channels are read by weights only.

    Returns:
        What is constant in the input of each reader.
    """
    weights = WideWeights(program.weights)
    known: dict[fx.Node, Any] = {}
    found: dict[Contraction, ConstantInput] = {}
    inner = set(held_nodes(group))
    for entry in program.entries.values():
        for node in (node for node in entry.graph.nodes if node in inner):
            known[node] = _value(node, known, weights)
    for reader in group.contractions:
        source = next(each for each in reader.operands if reader.weight is None or each is not reader.weight[0])
        found[reader] = _per_unit(group, source, known.get(source))
    return found


def held_nodes(group: Group) -> list[fx.Node]:
    """Every node that holds the units, also those that hold them as one of several results."""
    held = dict.fromkeys(node for node, _ in group.values)
    for node in list(held):
        if node.target is operator.getitem:
            held.setdefault(node.args[0])  # type: ignore[arg-type]
    return list(held)


def _unknown(node: fx.Node) -> Any:
    def fill(kind: Any) -> Any:
        if not isinstance(kind, Tensor):
            return size_hint(kind) if isinstance(kind, torch.SymInt) else kind
        return torch.full([size_hint(size) for size in kind.shape], torch.nan, dtype=torch.float64)

    return pytree.tree_map(fill, node.meta["val"])


def _value(node: fx.Node, known: dict[fx.Node, Any], weights: WideWeights) -> Any:
    name = str(getattr(node.target, "_opname", ""))
    if name in _PRODUCTS:
        return _product(node, weights)
    if name == "mul":
        return _multiplied(node, known, weights)
    if name not in _FUNCTIONS and node.target is not operator.getitem:
        return _unknown(node)
    if any(_is_unfit(used) for used in node.all_input_nodes):
        return _unknown(node)
    return run_node(node, _inputs(node, known, weights), weights, wide=True)


def _is_unfit(node: fx.Node) -> bool:
    """What is neither a floating tensor nor a size has no value that says "unknown"."""
    kind = node.meta.get("val")
    return isinstance(kind, Tensor) and not kind.is_floating_point()


def _inputs(node: fx.Node, known: dict[fx.Node, Any], weights: WideWeights) -> dict[fx.Node, Any]:
    return {
        used: weights[str(used.target)] if used.op == "get_attr" else known.get(used, _unknown(used))
        for used in node.all_input_nodes
    }


def _product(node: fx.Node, weights: WideWeights) -> Any:
    """NaN, and the bias at the channels whose row is zero."""
    result, given = _unknown(node), normalized_arguments(node)
    if given["weight"].op != "get_attr":
        return result
    weight = weights[str(given["weight"].target)]
    bias = given.get("bias")
    if bias is not None and bias.op != "get_attr":
        return result
    constant = weights[str(bias.target)] if bias is not None else torch.zeros(len(weight), dtype=torch.float64)
    value = torch.where(weight.flatten(1).any(1), torch.nan, constant)
    axis = result.ndim - 1 if given.get("stride") is None else result.ndim - weight.ndim + 1
    return value.reshape(-1, *[1] * (result.ndim - 1 - axis)).expand(result.shape)


def _multiplied(node: fx.Node, known: dict[fx.Node, Any], weights: WideWeights) -> Any:
    if any(_is_unfit(used) for used in node.all_input_nodes) or len(node.args) != 2:
        return _unknown(node)
    inputs = _inputs(node, known, weights)
    a, b = (torch.as_tensor(inputs[arg] if isinstance(arg, fx.Node) else arg) for arg in node.args)
    return torch.where((a == 0) | (b == 0), 0.0, a * b)


def _per_unit(group: Group, source: fx.Node, value: Any) -> ConstantInput:
    axes = group.coupling.of(source)
    place = next(place for place, axis in enumerate(axes) if group.channels in leaves(axis))
    index = positions(axes[place], group.channels)
    assert index is not None
    size = int(source.meta["val"].shape[place])
    constant = torch.full((size,), torch.nan, dtype=torch.float64)
    if value is not None:
        along = value.movedim(place, 0).reshape(size, -1)
        constant = torch.where((along == along[:, :1]).all(1), along[:, 0], constant)
    return ConstantInput(index, constant[index.flatten()].reshape(index.shape), size)
