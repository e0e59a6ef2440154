"""What reads a group takes over what is removed from it: columns of duplicates, and constants as a bias."""

import torch
from torch import Tensor

from sparc.analysis.coupling import Contraction
from sparc.analysis.dependency import Group
from sparc.passes.coalesce.constants import ConstantInput
from sparc.passes.coalesce.units import Superfluous
from sparc.pattern import normalized_arguments
from sparc.program import Program, weight_nodes

_BIASED = ("linear", "conv1d", "conv2d", "conv3d")


def new_columns(program: Program, group: Group, found: Superfluous) -> dict[str, Tensor]:
    """The float64 weights that read a group, with the columns of duplicates added to those of the units they equal.

    Args:
        program: is not edited.
        group: the group.
        found: its duplicates and their factors.
    """
    made: dict[str, Tensor] = {}
    if not len(found.duplicates):
        return made
    for member in group.members:
        if member.read:
            gone, kept = (member.index[found.duplicates[:, column]].flatten() for column in (0, 1))
            weight = made.get(member.weight, program.weights[member.weight].double())
            each = member.index.shape[1]
            factors = found.factors.repeat_interleave(each).reshape(-1, *[1] * (weight.ndim - 1))
            columns = weight.index_select(member.axis, gone).movedim(member.axis, 0) * factors
            made[member.weight] = weight.index_add(member.axis, kept, columns.movedim(0, member.axis))
    return made


def cannot_take_constant(program: Program, reader: Contraction) -> str:
    """Why a constant input of a product cannot become its bias; empty when it can."""
    name = str(getattr(reader.node.target, "_opname", ""))
    given = normalized_arguments(reader.node)
    if name not in _BIASED:
        return f"{name} takes no bias"
    kernel = program.weights[str(given["weight"].target)].shape[2:]
    padding = given.get("padding", 0)
    if any(padding) if isinstance(padding, (list, tuple)) else padding not in (0, "valid") and set(kernel) != {1}:
        return "it pads its input with zeros, which the constant is not"
    bias = given.get("bias")
    if bias is None:
        return ""
    if bias.op != "get_attr":
        return "its bias is computed"
    nodes = [node for entry in program.entries.values() for node in weight_nodes(entry.graph, str(bias.target))]
    users = {user for node in nodes for user in node.users}
    return "" if users == {reader.node} else "its bias is read elsewhere too"


def add_biases(
    program: Program, values: dict[Contraction, ConstantInput], dead: Tensor
) -> tuple[dict[str, Tensor], bool]:
    """Add what constant units contribute to the biases of their readers; a reader without one gets one.

    Args:
        program: is edited where a reader gets a bias.
        values: for each reader, the constants in its input.
        dead: `[n]` int64, the units that are constant.

    Returns:
        The float64 values of the biases, by name; and whether any is new.
    """
    biases: dict[str, Tensor] = {}
    made = False
    for reader, constant in values.items():
        if not bool((constant.value[dead] != 0).any()):
            continue
        given = normalized_arguments(reader.node)
        weight = program.weights[str(given["weight"].target)].double()
        if given.get("bias") is None:
            made = True
            _give_bias(program, reader)
            given = normalized_arguments(reader.node)
        name = str(given["bias"].target)
        biases[name] = program.weights[name].double() + _contribution(weight, constant, dead)
    return biases, made


def _give_bias(program: Program, reader: Contraction) -> None:
    node = reader.node
    weight = normalized_arguments(node)["weight"]
    stored = program.weights[str(weight.target)]
    path = str(weight.target).rpartition(".")[0]
    made = program.add_weight(f"{path}.bias" if path else "bias", stored.new_zeros(stored.shape[0]), like=weight)
    node.args = (*node.args[:2], made, *node.args[3:])


def _contribution(weight: Tensor, constant: ConstantInput, dead: Tensor) -> Tensor:
    """`[out]`: the product of `[out, in, ...]` with an input that is constant at the dead units and zero elsewhere."""
    columns = weight.reshape(*weight.shape[:2], -1).sum(-1)
    x = torch.zeros(constant.size, dtype=torch.float64)
    x[constant.index[dead].flatten()] = constant.value[dead].flatten()
    groups = constant.size // columns.shape[1]
    return torch.einsum("goi,gi->go", columns.reshape(groups, -1, columns.shape[1]), x.reshape(groups, -1)).flatten()
