"""Constant folding: what depends on no input is computed once, at compile time."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from sparc.analysis.values import is_deterministic, is_static, same_bits
from sparc.contract import Contract, Exact
from sparc.execute import run_node
from sparc.pass_base import Pass, PassContext, Stage
from sparc.program import Entry, Program, is_weight


@dataclass(frozen=True)
class FoldConstants(Pass):
    """A subgraph of weights, literals and fixed sizes => one weight, computed natively and so bitwise equal.

    `sparc::decode` is opaque. A result larger than `limit` bytes is only stored when weights that become unused give
    up as many bytes, so that the program never grows by more than small tables. The new weight keeps the origins of
    all weights it comes from, and the name of the first one it replaces.

    Args:
        limit: bytes that a table may have which replaces nothing.
    """

    limit: int = 65536
    name: ClassVar[str] = "fold_constants"
    stage: ClassVar[Stage] = Stage.CANONICALIZE

    @property
    def contract(self) -> Contract:
        """Bitwise."""
        return Exact()

    def run(self, program: Program, context: PassContext) -> None:
        """Plan for all entries together, since they share weights; then evaluate and replace."""
        constant = {node for _, node in program.nodes() if node.op == "call_function"} & _constants(program)
        made: list[str] = []
        for entry, node in _plan(program, constant, self.limit):
            if not context.edit():
                break
            if not self._fold(program, entry, node, made):
                context.edits -= 1
        program.sweep()

    def _fold(self, program: Program, entry: Entry, node: fx.Node, made: list[str]) -> bool:
        value = _evaluate(program, node)
        stored = value.clone()  # dense tensors keep their strides: products take another path for others
        if stored.stride() != value.stride() and any(_is_product(user) for user in node.users):
            return False
        value = stored
        sources = _weights_of(node)
        name = next((each for each in made if same_bits(program.weights[each], value)), None)
        if name is None:
            base = (
                sources[0]
                if sources
                else ".".join(part for part in (str(node.meta.get("module", "")), f"constant_{node.name}") if part)
            )
            like = next((used for used in _cone(node) if is_weight(used)), node)
            name = str(program.add_weight(base, value, like=like).target)
            made.append(name)
        record = program.weights.record(name)
        origins = (origin for source in sources for origin in program.weights.record(source).origins)
        program.weights.put(name, replace(record, origins=tuple(dict.fromkeys((*record.origins, *origins)))))
        node.replace_all_uses_with(program.weight_node(entry, name))
        program.sweep()
        if sources and sources[0] not in program.weights:
            program.rename_weight(name, sources[0])
            made[made.index(name)] = sources[0]
        return True


def _constants(program: Program) -> set[fx.Node]:
    """Every node that depends on no input and may be computed once."""
    found: set[fx.Node] = set()
    for _, node in program.nodes():
        if is_weight(node):
            found.add(node)
        elif node.op == "call_function" and all(used in found for used in node.all_input_nodes):
            opaque = getattr(node.target, "namespace", "") == "sparc"
            if not opaque and is_deterministic(node) and _is_storable(node):
                found.add(node)
    return found


def _is_storable(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if isinstance(value, (list, tuple)):
        return all(isinstance(item, Tensor) and all(isinstance(size, int) for size in item.shape) for item in value)
    return is_static(node)


def _frontier(constant: set[fx.Node]) -> list[fx.Node]:
    """Constant tensors that something not constant reads; one filled with a number says more as it is."""
    return [
        node
        for node in constant
        if isinstance(node.meta["val"], Tensor)
        and any(user not in constant for user in node.users)
        and not _is_fill(node)
    ]


def _is_fill(node: fx.Node) -> bool:
    return not node.all_input_nodes and str(getattr(node.target, "_opname", "")) in (
        "full",
        "zeros",
        "ones",
        "scalar_tensor",
    )


def _plan(program: Program, constant: set[fx.Node], limit: int) -> list[tuple[Entry, fx.Node]]:
    """The nodes to store, in graph order. Where one is too large to store, its own inputs are tried instead."""
    constant, kept = set(constant), set[str]()
    while True:
        frontier = set(_frontier(constant))
        chosen = [(entry, node) for entry, node in program.nodes() if node in frontier]
        staying = kept | _read_elsewhere(program, constant)
        budget = {name: tensor.nbytes for name, tensor in program.weights.items() if name not in staying}
        rejected = {node for _, node in chosen if not _affordable(node, budget, limit)}
        if not rejected:
            return chosen
        constant -= rejected
        kept.update(name for node in rejected for name in _weights_of(node))


def _read_elsewhere(program: Program, constant: set[fx.Node]) -> set[str]:
    """The weights that something not constant reads."""
    return {
        str(node.target)
        for _, node in program.nodes()
        if is_weight(node) and any(user not in constant for user in node.users)
    }


def _affordable(node: fx.Node, budget: dict[str, int], limit: int) -> bool:
    size = node.meta["val"].numel() * node.meta["val"].element_size()
    if size <= limit:
        return True
    for name in _weights_of(node):
        spent = min(size, budget.get(name, 0))
        budget[name] = budget.get(name, 0) - spent
        size -= spent
    return size <= 0


def _cone(node: fx.Node) -> Iterator[fx.Node]:
    """The node and everything it is computed from, inputs first."""
    seen: set[fx.Node] = set()

    def visit(current: fx.Node) -> Iterator[fx.Node]:
        if current not in seen:
            seen.add(current)
            for used in current.all_input_nodes:
                yield from visit(used)
            yield current

    return visit(node)


def _weights_of(node: fx.Node) -> list[str]:
    return [str(used.target) for used in _cone(node) if is_weight(used)]


def _evaluate(program: Program, node: fx.Node) -> Tensor:
    env: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for used in _cone(node):
            env[used] = run_node(used, env, program.weights)
    value: Tensor = env[node]
    return value.detach()


def _is_product(node: fx.Node) -> bool:
    name = str(getattr(node.target, "_opname", ""))
    return "mm" in name or name.startswith(("conv", "linear", "matmul", "einsum", "scaled_dot_product"))
