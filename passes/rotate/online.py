"""Rotations by an operator, where no weight writes the value: the input of a layer behind an activation function."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sparc.analysis.features import operator_name, packet
from sparc.pass_base import PassContext
from sparc.passes.fold.norm import uses
from sparc.passes.rotate.hadamard import Kind, rotation, split
from sparc.passes.rotate.weights import Store, name_of
from sparc.program import Program

aten = torch.ops.aten

_POINTWISE = frozenset({aten.mul, aten.relu, aten.gelu, aten.silu, aten.tanh, aten.sigmoid, aten.square, aten.pow})


def kronecker(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """`[..., a b] => [..., b a]`: each row as a matrix X `[a, b]` becomes `second (first X)ᵀ`, an orthogonal map.

    Args:
        x: `[..., a * b]`.
        first: `[a, a]`, orthogonal.
        second: `[b, b]`, orthogonal.
    """
    matrices = x.reshape(*x.shape[:-1], first.shape[0], second.shape[0])
    return (second @ (first @ matrices).transpose(-1, -2)).flatten(-2)


def rotate_inputs(
    program: Program, context: PassContext, store: Store, products: Sequence[fx.Node], kind: Kind, seed: int
) -> None:
    """linear(h, W) => linear(h T, W T), with an orthogonal T that costs two small products, where h is written by an
    element-wise operator.

    Args:
        program: is edited.
        context: is asked before each edit.
        store: takes the new weights.
        products: linear layers that write rotated streams.
        kind: of the factors of T.
        seed: of the factors.
    """
    groups: dict[str, list[fx.Node]] = defaultdict(list)
    for product in products:
        if packet(product) is aten.linear and packet(product.args[0]) in _POINTWISE:
            groups[name_of(product.args[1])].append(product)
    for name, nodes in groups.items():
        others = [user for user in uses(program, name) if user not in nodes]
        if others:
            context.skip(nodes[0], f"its weight is also read by {operator_name(others[0])}")
        elif context.edit():
            factors = [rotation(size, kind, seed) for size in split(store[name].shape[1], kind)]
            store.put(name, kronecker(store[name], *factors))
            for node in nodes:
                _insert(program, store, node, factors)


def _insert(program: Program, store: Store, product: fx.Node, factors: list[Tensor]) -> None:
    """The rotation of what a product reads, as operators before it."""
    entry, x = program.entry_of(product), product.args[0]
    a, b = (factor.shape[0] for factor in factors)
    first, second = (_factor(program, store, product, factor) for factor in factors)

    def call(target: Any, *args: Any) -> fx.Node:
        return entry.call(target, *args, before=product, like=product)

    matrices = call(aten.unflatten.int, x, -1, [a, b])
    left = call(aten.transpose.int, call(aten.matmul.default, first, matrices), -1, -2)
    rotated = call(aten.flatten.using_ints, call(aten.matmul.default, second, left), -2, -1)
    product.args = (rotated, *product.args[1:])


def _factor(program: Program, store: Store, product: fx.Node, factor: Tensor) -> fx.Node:
    """A weight with a rotation; there is one for each size and dtype."""
    weight: Any = product.args[1]
    dtype = str(weight.meta["val"].dtype).removeprefix("torch.")
    name = f"rotation_{factor.shape[0]}_{dtype}"
    if name not in program.weights:
        store.add(name, factor, (), 0, weight)
    return program.weight_node(program.entry_of(product), name)
