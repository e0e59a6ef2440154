"""Which dependency groups a step of a recipe claims, and how its report names them."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor, fx

from sparc.analysis.axes import leaves
from sparc.analysis.dependency import Group, Member, groups
from sparc.analysis.sites import Site, find_sites, use_of
from sparc.pass_base import PassContext
from sparc.program import Program, is_weight, weight_nodes


@dataclass(frozen=True)
class Plain:
    """A weight that is no site, as a selector sees it.

    Args:
        weight: its name.
        origins: the user's names it comes from.
        operator: the type of the first operator that reads it as a matrix; empty when none does.
    """

    weight: str
    origins: tuple[str, ...]
    operator: str


def claimed_groups(program: Program, context: PassContext) -> Iterator[Group]:
    """The groups of two or more units that hold a floating matrix which the step's selector selects.

    Vectors count where a group has nothing else: a layer's bias claims nothing that its matrix does not.
    """
    claimed = {each.weight for each in _selectable(program) if context.selects(each)}
    for group in groups(program):
        names = {member.weight for member in group.members}
        matrices = {name for name in names if program.weights[name].ndim > 1}
        if group.units > 1 and not claimed.isdisjoint(matrices or names):
            yield group


def are_kernel_positions(program: Program, group: Group) -> bool:
    """Whether a group is nothing but the positions of convolutions' kernels."""
    return all(_is_kernel_axis(program, member) for member in group.members)


def described(group: Group) -> str:
    """The kind of a group's units; and where the first one lies along the axis that names the group, if other units do,
    so that no two groups of a program are told alike.
    """
    first = group.members[0]
    alone = len(set(leaves(group.coupling.weights[first.weight][first.axis]))) == 1
    return group.kind if alone or not first.index.numel() else f"{group.kind}, the first at {_runs(first.index[0])}"


def _runs(places: Tensor) -> str:
    """`0-3, 8-11, …, 56-59`."""
    runs = [[place for _, place in run] for _, run in groupby(enumerate(places.tolist()), lambda at: at[1] - at[0])]
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return ", ".join(texts if len(texts) < 5 else [*texts[:2], "…", texts[-1]])


def _selectable(program: Program) -> list[Site | Plain]:
    """Every floating weight."""
    sites = {site.weight: site for site in find_sites(program)[0]}
    operators: dict[str, str] = {}
    for _, node in program.nodes():
        name = str(node.target)
        if is_weight(node) and program.weights[name].is_floating_point():
            uses = (use_of(user, node, "") for user in node.users)
            operators[name] = operators.get(name) or next((use.operator for use in uses if use is not None), "")
    return [
        sites.get(name) or Plain(name, program.weights.record(name).origins, operator)
        for name, operator in operators.items()
    ]


def _is_kernel_axis(program: Program, member: Member) -> bool:
    nodes = [node for entry in program.entries.values() for node in weight_nodes(entry.graph, member.weight)]
    return member.axis > 1 and all(_is_convolution(user) for node in nodes for user in node.users)


def _is_convolution(node: fx.Node) -> bool:
    return str(getattr(node.target, "_opname", "")).startswith("conv")
