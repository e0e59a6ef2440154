"""What a norm multiplies and adds per feature merges into the layers that read it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sparc.analysis.features import (
    NORMS,
    Readers,
    carries_shift,
    is_norm,
    operator_name,
    packet,
    product_readers,
    vector,
)
from sparc.analysis.values import tensor_type
from sparc.contract import Bounded
from sparc.encoding.operators import is_decode
from sparc.pass_base import Stage
from sparc.pattern import Found, normalized_arguments
from sparc.program import Program, is_weight, weight_nodes
from sparc.rewrite import Match, Skip, rewrite

aten = torch.ops.aten


@dataclass(frozen=True)
class Affine:
    """`value = gain * x + shift`, or `gain * norm(x) + shift`, per feature.

    Args:
        value: the node.
        x: what it is computed from.
        gain: the node of the factors; None when there are none.
        shift: the node of the addends; None when there are none.
        axis: the axis of the features, from the end.
    """

    value: fx.Node
    x: fx.Node
    gain: Any = None
    shift: Any = None
    axis: int = -1

    @property
    def weights(self) -> list[Any]:
        """What it multiplies and adds."""
        return [each for each in (self.gain, self.shift) if each is not None]

    def vector(self, program: Program, value: Any) -> Tensor | None:
        """`[features]` float64: the gain or the shift; None for None and for what is no weight."""
        found = vector(program, value, self.axis, int(self.value.meta["val"].shape[self.axis]))
        return None if found is None else found.double()


def affine_at(program: Program, node: fx.Node) -> Affine | None:
    """The affine map per feature that a node ends with: a norm over the last axis, `mul(x, c)` or `add(x, c)`."""
    arguments = normalized_arguments(node) if node.op == "call_function" else {}
    if is_norm(node):
        return Affine(node, arguments["input"], arguments["weight"], arguments.get("bias"))
    if packet(node) not in (aten.mul, aten.add) or arguments.get("alpha", 1) != 1:
        return None
    for x, constant in (node.args[:2], node.args[1::-1]):
        kind = tensor_type(constant) if is_weight(constant) else None
        axes = [] if kind is None else [axis for axis in range(-kind.ndim, 0) if kind.shape[axis] != 1]
        if len(axes) == 1 and tensor_type(x) is not None and str(x.meta["val"].shape) == str(node.meta["val"].shape):  # type: ignore[union-attr]
            names = {"gain" if packet(node) is aten.mul else "shift": constant}
            return Affine(node, x, axis=axes[0], **names)  # type: ignore[arg-type]
    return None


def uses(program: Program, name: str) -> Iterator[fx.Node]:
    """Every node that reads a weight, in every entry."""
    for entry in program.entries.values():
        for node in weight_nodes(entry.graph, name):
            yield from node.users


def kept_elsewhere(program: Program, found: Found, again: Callable[[fx.Node], Iterable[object]]) -> Skip | None:
    """Why a weight that a match frees in its own entry stays for another one; None when none does.

    Args:
        program: the program.
        found: a match.
        again: what is found around a node of another entry: a match there frees the weight too.
    """
    if len(program.entries) == 1:
        return None
    inner, graph = set(found.nodes), found.roots[0].graph
    weights = dict.fromkeys(used for node in found.nodes for used in node.all_input_nodes if is_weight(used))
    for weight in weights:
        if any(user not in inner for user in weight.users):
            continue
        for user in uses(program, str(weight.target)):
            if user.graph is graph:
                continue
            if not any(isinstance(each, Found) and user in each.nodes for each in again(user)):
                return Skip(f"another entry reads {str(weight.target)!r} too, which would be stored twice")
    return None


def weight_reason(program: Program, node: Any, what: str = "weight") -> str | None:
    """Why a weight cannot be given another value; None when it can, as far as its own kind goes."""
    if is_decode(node):
        return f"a {what} is encoded already"
    if not is_weight(node) or not node.meta["val"].is_floating_point():
        return f"a {what} is computed"
    return f"a {what} is rounded already" if program.grid(node) is not None else None


def bias_of(product: fx.Node) -> Any:
    """The bias argument of a product."""
    return normalized_arguments(product).get("bias")


def _twins(program: Program, affine: Affine) -> dict[fx.Node, Readers]:
    """The readers of every affine map that has the same gain and shift, in any entry, where they are products."""
    found = {}
    names = [str(each.target) for each in affine.weights]
    for value in uses(program, names[0]):
        other = affine_at(program, value)
        if other is not None and [str(each.target) for each in other.weights if is_weight(each)] == names:
            readers = product_readers(program, value, other.axis)
            if isinstance(readers, Readers):
                found[value] = readers
    return found


def _shifted(program: Program, affine: Affine) -> bool:
    shift = affine.vector(program, affine.shift)
    return shift is not None and bool((shift != 0).any())


def _product_reason(program: Program, product: fx.Node, shifted: bool, known: set[fx.Node]) -> str | None:
    """Why one product cannot take the affine map over."""
    weight, bias = product.args[1], bias_of(product)
    checked = [("weight", weight), *([("bias", bias)] if shifted and bias is not None else [])]
    for what, node in checked:
        reason = weight_reason(program, node, what)
        if reason is not None:
            return f"{reason} ({product.name})"
        others = [user for user in uses(program, str(node.target)) if user not in known]  # type: ignore[union-attr]
        if others:
            return f"the {what} {str(node.target)!r} is also read by {operator_name(others[0])}"  # type: ignore[union-attr]
    padding: Any = normalized_arguments(product).get("padding", 0)
    if shifted and (any(padding) if isinstance(padding, (list, tuple)) else padding not in (0, "valid")):
        return "a convolution pads with zeros, which the shift would not reach"
    return None


def _growth(program: Program, affine: Affine, products: Iterable[fx.Node], twins: Iterable[fx.Node]) -> int:
    """How many bytes the biases that must be added take beyond what the gain and the shift give back."""
    added = {str(each.args[1].target): each for each in products if bias_of(each) is None}  # type: ignore[union-attr]
    new = sum(program.weights[name].shape[0] * program.weights[name].element_size() for name in added)
    gone = [str(each.target) for each in affine.weights if set(uses(program, str(each.target))) <= set(twins)]
    return new - sum(program.weights[name].nbytes for name in gone)


def _reason(program: Program, affine: Affine, readers: Readers) -> str | None:
    for node in affine.weights:
        if (reason := weight_reason(program, node, "gain" if node is affine.gain else "shift")) is not None:
            return reason
        if node.meta["val"].dtype != affine.x.meta["val"].dtype:
            return "the gain has another dtype than the input"
    twins = _twins(program, affine)
    known = {product for each in twins.values() for product in each.products}
    shifted = _shifted(program, affine)
    for product in readers.products:
        if (reason := _product_reason(program, product, shifted, known)) is not None:
            return reason
    stopped = next((each for each in readers.carriers if shifted and not carries_shift(each)), None)
    if stopped is not None:
        return f"the shift does not pass {operator_name(stopped)}"
    growth = _growth(program, affine, readers.products, twins) if shifted else 0
    return f"the biases to be added take {growth} bytes more than the norm gives back" if growth > 0 else None


def _find(program: Program, node: fx.Node) -> Found | Skip | None:
    """products(carriers(gain * norm(x) + shift))."""
    if packet(node) in NORMS and not is_norm(node):
        return Skip("it normalises more than the last axis")
    affine = affine_at(program, node)
    if affine is None or not affine.weights:
        return None
    readers = product_readers(program, node, affine.axis)
    if isinstance(readers, str):
        return Skip(readers) if is_norm(node) else None
    if not readers.products:
        return None
    reason = _reason(program, affine, readers)
    if reason is not None:
        return Skip(reason)
    values: dict[str, Any] = {"x": affine.x, "affine": affine, "readers": readers}
    for index, product in enumerate(readers.products):
        values |= {f"w{index}": product.args[1], f"b{index}": bias_of(product)}
    return Found(values, (node, *readers.carriers, *readers.products), readers.products)


def _bare(m: Match) -> fx.Node:
    """The value without its gain and its shift."""
    value = m.affine.value
    if not is_norm(value):
        return m.x  # type: ignore[no-any-return]
    arguments = {**normalized_arguments(value), "weight": None}
    if "bias" in arguments:
        arguments["bias"] = None
    return m.call(value.target, *arguments.values())


def along_columns(tensor: Tensor, vector: Tensor) -> Tensor:
    """`vector` as a tensor that multiplies each input feature (axis 1) of a product's weight."""
    return vector.reshape(-1, *[1] * (tensor.ndim - 2))


def shift_through(weight: Tensor, shift: Tensor) -> Tensor:
    """`[out]`: what a product makes of a constant input, `W shift`."""
    return (weight * along_columns(weight, shift)).flatten(1).sum(1)


@rewrite(find=_find, contract=Bounded(1e-4), stage=Stage.FOLD)
def fold_norm_affine(m: Match) -> tuple[fx.Node, ...]:
    """linear(gain * norm(x) + shift, W, b) => linear(norm(x), W diag(gain), b + W shift), for every reader at once.

    The norm is a layer norm or an RMS norm over the last axis, or there is none: `mul(x, gain)` and `add(x, shift)` by
    a constant per feature. The readers are linear layers and convolutions, reached through operators that carry the
    features (reshape, transpose, slice, ...). A layer without a bias gets one only if all new ones together take no
    more bytes than the gain and the shift give back.
    """
    affine: Affine = m.affine
    gain, shift = (affine.vector(m.program, each) for each in (affine.gain, affine.shift))
    shifted = shift is not None and bool((shift != 0).any())
    copies = {affine.value: _bare(m)}
    for carrier in m.readers.carriers:
        args, kwargs = fx.node.map_arg((carrier.args, carrier.kwargs), lambda used: copies.get(used, used))
        copies[carrier] = m.call(carrier.target, *args, **kwargs)
    results = []
    for index, product in enumerate(m.readers.products):
        weight, bias = m.weight(f"w{index}"), bias_of(product)
        assert weight is not None
        arguments = {**normalized_arguments(product), "input": copies[product.args[0]]}
        if gain is not None:
            arguments["weight"] = m.constant(weight * along_columns(weight, gain), like=f"w{index}")
        if shift is not None and shifted:
            added = shift_through(weight, shift)
            if bias is None:
                arguments["bias"] = m.constant(added, like=f"w{index}", name="bias")
            else:
                old = m.weight(f"b{index}")
                assert old is not None
                arguments["bias"] = m.constant(old + added, like=f"b{index}")
        results.append(m.call(product.target, *arguments.values()))
    return tuple(results)
