"""A plan carried out: every weight around the rotated streams gets its new value, once."""

from collections import defaultdict

import torch
from torch import Tensor, fx

from sparc.analysis.features import is_norm, packet
from sparc.passes.fold.norm import Affine, along_columns, bias_of, shift_through
from sparc.passes.rotate.hadamard import Kind, rotation
from sparc.passes.rotate.plan import Plan, Role, Turn, affine_vectors, weight_of
from sparc.passes.rotate.weights import Store, name_of, turned
from sparc.pattern import normalized_arguments
from sparc.program import Program, is_weight, location

aten = torch.ops.aten


def apply_plan(program: Program, plan: Plan, store: Store, kind: Kind, seed: int) -> None:
    """Rotate every stream of a plan.

    Args:
        program: is edited.
        plan: made for this program.
        store: takes the new weights.
        kind: of the rotations.
        seed: of the rotations; streams of one size share one.
    """
    readers: dict[str, dict[Role, list[fx.Node]]] = defaultdict(dict)
    for node, role in plan.roles.items():
        readers[name_of(weight_of(node))].setdefault(role.matrix, []).append(node)
    for name, groups in readers.items():
        old = store[name]
        # the group that takes over no gain keeps the name: an embedding, where the head is untied from it
        ordered = sorted(groups.items(), key=lambda group: bool(group[0].columns and group[0].columns.affine))
        for index, (role, nodes) in enumerate(ordered):
            for each in dict.fromkeys(plan.roles[node] for node in nodes):
                _rotate_biases(store, each, [node for node in nodes if plan.roles[node] == each], old, kind, seed)
            new = _new_weight(store, role, old, kind, seed)
            if index == 0:
                store.put(name, new)
            else:
                _untie(store, name, new, nodes)
    for affine in plan.norms.values():
        _strip(program, affine, plan)


def _turned(tensor: Tensor, turn: Turn, axis: int, kind: Kind, seed: int) -> Tensor:
    return turned(tensor, axis, rotation(turn.size, kind, seed), turn.centred)


def _new_weight(store: Store, role: Role, old: Tensor, kind: Kind, seed: int) -> Tensor:
    new = old
    if role.columns is not None:
        gain, _ = affine_vectors(store, role.columns)
        new = new if gain is None else new * along_columns(new, gain)
        new = _turned(new, role.columns, role.columns.axis, kind, seed)
    return new if role.rows is None else _turned(new, role.rows, 0, kind, seed)


def _rotate_biases(store: Store, role: Role, nodes: list[fx.Node], old: Tensor, kind: Kind, seed: int) -> None:
    """`b => R_rowsᵀ (b + W shift)`, for every bias that stands beside one weight."""
    if is_weight(nodes[0]) or packet(nodes[0]) is aten.embedding:
        return
    _, shift = (None, None) if role.columns is None else affine_vectors(store, role.columns)
    added = None if shift is None else shift_through(old, shift)
    if added is None and role.rows is None:
        return
    without = [node for node in nodes if bias_of(node) is None]
    for name in {name_of(bias_of(node)) for node in nodes if node not in without}:
        bias = store[name] if added is None else store[name] + added
        store.put(name, bias if role.rows is None else _turned(bias, role.rows, 0, kind, seed))
    if without and added is not None:
        bias = added if role.rows is None else _turned(added, role.rows, 0, kind, seed)
        wished = name_of(without[0].args[1]).rpartition(".")[0]
        store.add(f"{wished}.bias" if wished else "bias", bias, without, 2, without[0].args[1])  # type: ignore[arg-type]


def _untie(store: Store, name: str, new: Tensor, nodes: list[fx.Node]) -> None:
    """Store a weight of its own for some readers of a tied one, under the name they had for it."""
    module, leaf = location(nodes[0]).module, name.rpartition(".")[2]
    wished = f"{module}.{leaf}" if module else leaf
    made = store.add(wished, new, nodes, 0 if packet(nodes[0]) is aten.embedding else 1, weight_of(nodes[0]))
    store.program.weights.aliases.pop(made, None)


def _strip(program: Program, affine: Affine, plan: Plan) -> None:
    """Take away what the readers of a norm (or of a gain) took over; a layer norm of centred values is an RMS norm."""
    node = affine.value
    if not is_norm(node):
        if affine.gain is None:
            node.replace_all_uses_with(affine.x)
            node.graph.erase_node(node)
        return
    arguments = normalized_arguments(node)
    shape, eps = arguments["normalized_shape"], arguments["eps"]
    stripped = program.entry_of(node).call(
        aten.rms_norm.default, affine.x, shape, affine.gain, eps, before=node, like=node
    )
    node.replace_all_uses_with(stripped)
    node.graph.erase_node(node)
