"""What the units of dependency groups are worth, by what coupled weights hold: four measures, a number for each unit.

They are sums over a unit's own weights, and means over the group's members (Torch-Pruning, Fang et al. 2023, section
4.2): the rows and filters that make a unit, the columns that read it, and the gains of norms. Biases and running
statistics say nothing of it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sparc.analysis.axes import Axis, extent, leaves
from sparc.analysis.coupling import Contraction
from sparc.analysis.dependency import Group, Member
from sparc.pattern import normalized_arguments
from sparc.program import Program, weight_nodes

POWER = 2
_NORMS = ("batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm", "_native_batch_norm_legit_no_training")

Statistics = Callable[[fx.Node, str], Any]


def scored_members(program: Program, group: Group) -> list[Member]:
    """The members that importances are summed over: matrices, filters and norms' gains."""
    return [member for member in group.members if _counts(program, member)]


def _counts(program: Program, member: Member) -> bool:
    weight = program.weights[member.weight]
    if not weight.is_floating_point():
        return False
    nodes = [node for entry in program.entries.values() for node in weight_nodes(entry.graph, member.weight)]
    return weight.ndim > 1 or any(_is_gain(user, node) for node in nodes for user in node.users)


def _is_gain(user: fx.Node, node: fx.Node) -> bool:
    return getattr(user.target, "_opname", "") in _NORMS and normalized_arguments(user).get("weight") is node


def per_unit(values: Tensor, member: Member) -> Tensor:
    """`[units]` float64: what is in a member's weight, summed over each unit's places and all other axes.

    Args:
        values: of the weight's shape.
        member: the axis of a weight.
    """
    rows = values.movedim(member.axis, 0).flatten(1) if values.ndim > 1 else values[:, None]
    totals = rows.sum(1, dtype=torch.float64)
    return totals[member.index.flatten()].reshape(member.index.shape).sum(1)


def magnitude(program: Program, group: Group) -> Tensor | str:
    """`I_k = mean over members of sum |w|^2` (group norm, Fang et al. 2023, equation 6), `[units]` float64; or why
    there is none.
    """
    members = scored_members(program, group)
    each = [per_unit(program.weights[member.weight].double().abs() ** POWER, member) for member in members]
    return torch.stack(each).mean(0) if each else "no matrix, filter or gain says what they are worth"


# activations ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Reader:
    """A product of a weight with a group's channels.

    Args:
        product: the operator, and what it sums over.
        weight: the name of the weight whose columns meet the channels.
        place: which of its axes these are.
        value: what is multiplied with it.
        axis: the value's axis, counted from the end.
        groups: how many parts of the value's axis a convolution sums by themselves, each with its part of the weight's
            first axis.
    """

    product: Contraction
    weight: str
    place: int
    value: fx.Node
    axis: int
    groups: int = 1

    @property
    def columns(self) -> Axis:
        """What is summed over."""
        return self.product.axis


def readers(group: Group) -> Iterator[Reader]:
    """The products of a weight with the group's channels. One whose channels lie along several of a value's axes is
    left out.
    """
    for product in group.contractions:
        if product.weight is None:
            continue
        node, place = product.weight
        count = int(normalized_arguments(product.node).get("groups") or 1)  # type: ignore[arg-type]
        wanted = list(leaves(product.axis))
        for value in product.operands:
            if value is node:
                continue
            found = [list(leaves(axis)) for axis in group.coupling.of(value)]
            places = [at for at, each in enumerate(found) if (each if count == 1 else each[-len(wanted) :]) == wanted]
            if len(places) == 1:
                yield Reader(product, str(node.target), place, value, places[0] - len(found), count)


def statistic_kind(name: str, axis: int) -> str:
    """A kind of statistic along an axis, counted from the end."""
    return name if axis == -1 else f"{name}:{axis}"


def counted(group: Group) -> list[fx.Node]:
    """For experts: the nodes that count how many rows go to each."""
    experts = group.coupling.experts.items()
    return [node for node, axis in experts if group.channels in leaves(axis) and _name(node) == "histc"]


def activation_watches(group: Group) -> Iterator[tuple[fx.Node, str]]:
    """The statistics that `activation` wants, as (node, kind)."""
    yield from ((each.value, statistic_kind("moments", each.axis)) for each in readers(group))
    yield from ((node, "moments") for node in counted(group))


def activation(program: Program, group: Group, statistics: Statistics) -> Tensor | str:
    """`I_k = mean over readers of sum_c E[x_c^2] |W[:, c]|^2` over the columns c of a unit: how much of what its
    readers compute comes from it (Wanda's score, Sun et al. 2023, summed over a unit), and what the diagonal of the
    layer's Hessian says its loss would be.

    For experts: the mean number of rows that are sent to each.

    Returns:
        `[units]` float64, or why there is none.
    """
    if group.kind == "expert":
        moments = [statistics(node, "moments") for node in counted(group)]
        rows = [each[0] for each in moments if each is not None]
        return torch.stack(rows).sum(0) if rows else "no calibration data reached its router"
    columns = {(member.weight, member.axis): member for member in group.members}
    found = []
    for reader in readers(group):
        moments = statistics(reader.value, statistic_kind("moments", reader.axis))
        if moments is not None and len(moments[1]) == reader.groups * extent(reader.columns):
            square = _parts(program.weights[reader.weight], reader).double().square()
            scaled = square * _along(moments[1].reshape(reader.groups, -1), square, reader)
            found.append(per_unit(scaled.flatten(0, 1), columns[reader.weight, reader.place]))
    return torch.stack(found).mean(0) if found else "no product with data reads its units alone"


def _parts(weight: Tensor, reader: Reader) -> Tensor:
    """`[groups, ...]`: the parts of a weight that are multiplied with one part of the value each."""
    return weight.unflatten(0, (reader.groups, -1))


def _along(values: Tensor, parts: Tensor, reader: Reader) -> Tensor:
    """`[groups, columns]` as a factor of every part's columns."""
    return values.reshape(reader.groups, *[-1 if at == reader.place else 1 for at in range(parts.ndim - 1)])


# gradients -----------------------------------------------------------------------------------------------------------
def taylor(weight: Tensor, gradient: Tensor, member: Member) -> Tensor:
    """`|sum w dL/dw|` over a unit's weights: the change of the loss, to first order, when they become zero (Molchanov
    et al. 2019, section 3.1; summed before the absolute value, as of one variable), `[units]` float64.
    """
    return per_unit(weight.double() * gradient, member).abs()


def fisher(weight: Tensor, gradient: Tensor, member: Member) -> Tensor:
    """`sum w^2 (dL/dw)^2 / 2`: the second-order change of the loss, with squared gradients for the Hessian's diagonal
    (optimal brain damage, LeCun et al. 1989; Theis et al. 2018, section 2), `[units]` float64.
    """
    return per_unit((weight.double() * gradient).square(), member) / 2


def from_gradients(
    program: Program,
    groups: Sequence[Group],
    gradients: Iterator[Mapping[str, Tensor]],
    score: Callable[[Tensor, Tensor, Member], Tensor],
) -> list[Tensor | str]:
    """`I_k = mean over gradients of the mean over members` of a score; for each group, `[units]` float64, or why not.

    Args:
        program: holds the weights.
        groups: the groups.
        gradients: one mapping from weights' names at a time; weights that the loss does not depend on may be missing.
        score: `taylor` or `fisher`.
    """
    members = [scored_members(program, group) for group in groups]
    totals = [torch.zeros(group.units, dtype=torch.float64) for group in groups]
    seen, count = [False] * len(groups), 0
    for gradient in gradients:
        count += 1
        for at, group_members in enumerate(members):
            reached = [member for member in group_members if member.weight in gradient]
            each = [score(program.weights[member.weight], gradient[member.weight], member) for member in reached]
            if each:
                seen[at] = True
                totals[at] += torch.stack(each).sum(0) / len(group_members)
    return [
        total / max(1, count) if ok else "no gradient of the loss reaches it"
        for total, ok in zip(totals, seen, strict=True)
    ]


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "_opname", ""))
