"""Fragments of torch.compile as pure graphs of ATen operators, and the programs that compute values of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)

from sparc.capture import check_weight, to_program
from sparc.program import Program
from sparc.region import region
from sparc.signature import Leaf, Signature, Structure

Kind = Literal["weight", "input", "size"]


@dataclass(frozen=True)
class Argument:
    """One input of a fragment.

    Args:
        kind: a `weight` belongs to a module, an `input` is any other tensor, a `size` is a symbolic integer.
        name: the user's own name for it, as far as dynamo knows it.
        trainable: whether it is a parameter.
    """

    kind: Kind
    name: str
    trainable: bool = False


@dataclass
class Traced:
    """A fragment as one pure graph of ATen operators.

    Args:
        graph: its placeholders are the fragment's arguments, in order, and then the constants.
        owner: holds the bodies of higher-order operators.
        arguments: the fragment's.
        constants: tensors that the code makes from numbers, by name.
    """

    graph: fx.Graph
    owner: fx.GraphModule
    arguments: list[Argument]
    constants: dict[str, Tensor]

    @property
    def graph_module(self) -> fx.GraphModule:
        """The owner, as an exported program calls it."""
        return self.owner

    @property
    def placeholders(self) -> list[fx.Node]:
        """The nodes of the arguments, in order; constants are left out."""
        return [node for node in self.graph.nodes if node.op == "placeholder"][: len(self.arguments)]


@dataclass
class Captured:
    """What `to_program` reads of an exported program."""

    graph: fx.Graph
    graph_module: fx.GraphModule
    graph_signature: ExportGraphSignature
    state_dict: dict[str, Tensor]
    constants: dict[str, Tensor] = field(default_factory=dict)


def program_of(traced: Traced, results: Sequence[fx.Node], values: Sequence[Any]) -> Program:
    """A Program that computes some values of the fragment from its tensor inputs.

    Args:
        traced: the fragment.
        results: nodes of its graph.
        values: the fragment's inputs; the weights among them are the program's.

    Raises:
        CaptureError: SPARC105, SPARC106, SPARC111.
    """
    nodes = traced.placeholders
    kept = [node for node in traced.graph.find_nodes(op="placeholder") if _is_tensor(node)]
    graph = region(results, set(), kept)
    placeholders = dict(zip(kept, graph.find_nodes(op="placeholder"), strict=True))
    specs, weights, inputs = [], {}, []
    for node, argument, value in zip(nodes, traced.arguments, values, strict=True):
        if argument.kind == "weight":
            weights[argument.name] = value.detach().cpu()
            check_weight(argument.name, weights[argument.name], trainable=argument.trainable)
        elif argument.kind == "input":
            inputs.append(argument.name)
        if argument.kind != "size":
            kind = InputKind.PARAMETER if argument.kind == "weight" else InputKind.USER_INPUT
            specs.append(InputSpec(kind, TensorArgument(placeholders[node].name), argument.name))
    for node, name in zip(kept[len(specs) :], traced.constants, strict=True):
        specs.append(InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(placeholders[node].name), name))
    trainable = {each.name: weights[each.name] for each in traced.arguments if each.trainable}
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in results]
    captured = Captured(graph, traced.owner, ExportGraphSignature(specs, outputs), weights, traced.constants)
    return to_program(captured, _signature(inputs, len(results)), _symbols(nodes), "forward", trainable)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _signature(inputs: Sequence[str], results: int) -> Signature:
    names = tuple(inputs)
    output = Structure("tuple", (), tuple(Structure() for _ in range(results)))
    leaves = tuple(Leaf(name) for name in names)
    return Signature(names, tuple(Structure() for _ in names), leaves, output, (), names)


def _symbols(nodes: Sequence[fx.Node]) -> dict[str, str]:
    sizes = [size for node in nodes if _is_tensor(node) for size in node.meta["val"].shape]
    return {str(size): str(size) for size in sizes if not isinstance(size, int)}


def carry_sizes(traced: Traced, results: Sequence[fx.Node]) -> None:
    """Read the symbolic integers that `results` need off the tensor inputs, which are all that programs have."""
    needed = {used for used in _behind(results) if used.op == "placeholder" and not _is_tensor(used)}
    anchor = next(node for node in traced.graph.nodes if node.op != "placeholder")
    for node in needed:
        with traced.graph.inserting_before(anchor):
            size = traced.graph.call_function(torch.ops.aten.sym_size.int, _carrier(traced, node.meta["val"]))
        size.meta = {"val": node.meta["val"]}
        node.replace_all_uses_with(size)


def _carrier(traced: Traced, value: Any) -> tuple[fx.Node, int]:
    """An input, and its axis of a symbolic size."""
    return next(
        (node, axis)
        for node in traced.placeholders
        if _is_tensor(node)
        for axis, size in enumerate(node.meta["val"].shape)
        if isinstance(size, torch.SymInt) and size.node.expr == value.node.expr
    )


def _behind(results: Sequence[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = list(results)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += node.all_input_nodes
    return found
