"""Units of a layer that compute the same, or nothing, are removed, and what read them reads what is left."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx

from sparc import codes
from sparc.analysis.coupling import Contraction
from sparc.analysis.dependency import Group, groups
from sparc.contract import Bounded
from sparc.diag import PassError
from sparc.pass_base import Pass, PassContext, Rewrite, Stage
from sparc.passes.coalesce.constants import ConstantInput, constants, held_nodes
from sparc.passes.coalesce.readers import add_biases, cannot_take_constant, new_columns
from sparc.passes.coalesce.units import Superfluous, find_superfluous, obstacle, zero_units
from sparc.passes.cut.slice import cut
from sparc.program import Program, location
from sparc.region import region, region_inputs


@dataclass(frozen=True)
class Removal:
    """What is to be removed from a group.

    Args:
        group: the group.
        dead: `[n]` int64, units with a constant value.
        values: for each reader, the constants in its input.
        others: duplicates and units that are not read.
    """

    group: Group
    dead: Tensor
    values: dict[Contraction, ConstantInput]
    others: Superfluous

    @property
    def gone(self) -> Tensor:
        """`[n]` int64: all units that are to be removed."""
        return torch.cat([self.dead, self.others.unread, self.others.duplicates[:, 0]])

    def __str__(self) -> str:
        counts = {
            "duplicates": len(self.others.duplicates),
            "constant": len(self.dead),
            "never read": len(self.others.unread),
        }
        return ", ".join(f"{count} {what}" for what, count in counts.items() if count)


@dataclass(frozen=True)
class MergeNeurons(Pass):
    """W2 f(W1 x + b1) => the same with fewer rows of W1 and columns of W2, where units are superfluous.

    - Duplicates: `(w_n, b_n) = s (w_m, b_m)`; the column of n times s is added to that of m. With s = 1 for any f that
      acts on each unit by itself (activations, gates, depthwise convolutions, attention of a whole head), with any
      s > 0 where f is positively homogeneous (relu, leaky relu, none).
    - Constants: `w_n = 0`, so that the unit's value is f(b_n) for every input, or zero because it is multiplied by
      zero; its column times the value is added to the next bias.
    - What is never read: the column is zero.

    Units are those of dependency groups, so gated layers, convolutions and whole attention heads are found alike. It
    undoes Net2WiderNet (Chen et al. 2016). Run it after batch norms are folded.

    Args:
        multiple: what is left is a multiple of this many units, and superfluous ones stay for it. Kernels and formats
            with groups like sizes that 8 or 32 divide.
    """

    name: ClassVar[str] = "merge_neurons"
    stage: ClassVar[Stage] = Stage.COALESCE

    multiple: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.multiple < 1:
            raise PassError(codes.BAD_OPTION, f"multiple={self.multiple!r}", hint="a number from 1")

    @property
    def contract(self) -> Bounded:
        """Equal in real arithmetic; sums are rounded anew."""
        return Bounded(1e-4)

    def run(self, program: Program, context: PassContext) -> None:
        """Remove superfluous units of every group, until there are none: what is removed may reveal others."""
        cut_nodes: set[fx.Node] = set()
        before = -1
        while context.edits != before:
            before = context.edits
            _sweep(program, context, self.multiple, cut_nodes)
            program.sweep()


def _sweep(program: Program, context: PassContext, multiple: int, cut_nodes: set[fx.Node]) -> None:
    """Every group once, the last first: when its units go, columns of the group before it do."""
    edited: set[tuple[str, int]] = set()
    for group in reversed(groups(program)):
        axes = {(member.weight, member.axis) for member in group.members}
        if group.units == 1 or edited & axes:
            continue
        removal = _find(program, context, group, multiple)
        if removal is not None and context.edit():
            made = _remove(program, context, removal, cut_nodes)
            cut_nodes.update(held_nodes(group))
            if made:  # the groups do not know the new weight
                return
            edited |= axes


def _find(program: Program, context: PassContext, group: Group, multiple: int) -> Removal | None:
    """What can be removed from a group; None when there is nothing, or something stands in the way."""
    if not group.contractions:
        return None
    dead, values = _dead(program, context, group)
    removal = Removal(group, dead, values, find_superfluous(program, group, dead))
    if not len(removal.gone):
        return None
    why = obstacle(group)
    if why:
        context.skip(group.name, f"{removal} of {group.units} units stay: {why}")
        return None
    left = math.ceil(max(1, group.units - len(removal.gone)) / multiple) * multiple
    if left >= group.units:
        context.skip(group.name, f"{removal} of {group.units} units stay: no smaller multiple of {multiple} is left")
        return None
    return _first(removal, group.units - left)


def _first(removal: Removal, count: int) -> Removal:
    """So many of the units: constants, then those that are never read, then duplicates."""
    dead, unread = removal.dead[:count], removal.others.unread[: max(0, count - len(removal.dead))]
    rest = count - len(dead) - len(unread)
    others = Superfluous(removal.others.duplicates[:rest], removal.others.factors[:rest], unread)
    return replace(removal, dead=dead, others=others)


def _dead(program: Program, context: PassContext, group: Group) -> tuple[Tensor, dict[Contraction, ConstantInput]]:
    """`[n]` int64: the units that are constant and can be folded into what reads them; and the constants."""
    none = torch.empty(0, dtype=torch.int64)
    if obstacle(group) or not _has_zero_rows(program, group):
        return none, {}
    values = constants(program, group)
    dead = torch.stack([~constant.value.isnan().any(1) for constant in values.values()]).all(0)
    for reader, constant in values.items():
        heavy = dead & (constant.value != 0).any(1)
        why = cannot_take_constant(program, reader) if bool(heavy.any()) else ""
        if why:
            context.skip(reader.node, f"{int(heavy.sum())} constant units of its input stay: {why}")
            dead &= ~heavy
    return torch.nonzero(dead).flatten(), values


def _has_zero_rows(program: Program, group: Group) -> bool:
    """Whether any row that writes the units is zero."""
    for member in group.members:
        if not member.read and program.weights[member.weight].ndim > 1:
            each = replace(member, index=member.index.reshape(-1, 1))
            if len(zero_units(program, [each])):
                return True
    return False


def _remove(program: Program, context: PassContext, removal: Removal, cut_nodes: set[fx.Node]) -> bool:
    """Remove the units; returns whether a reader got a bias that it had not.

    Args:
        program: is edited.
        context: gets the regions before and after.
        removal: what goes.
        cut_nodes: values that are smaller already than in the program before the pass.
    """
    group = removal.group
    inner = {*held_nodes(group), *(reader.node for reader in group.contractions)}
    before = [_region(program, name, inner, cut_nodes, " before") for name in program.entries]
    wide, made = add_biases(program, removal.values, removal.dead)
    wide |= new_columns(program, group, removal.others)
    for name, value in wide.items():
        program.set_weight(name, value.to(program.weights[name].dtype))
    stays = torch.ones(group.units, dtype=torch.bool).index_fill(0, removal.gone, False)
    keep = torch.nonzero(stays).flatten()
    cut(program, group, keep)
    sliced = {name: _sliced(value, name, group, keep) for name, value in wide.items()}
    after = [_region(program, name, inner, cut_nodes, "") for name in program.entries]
    for entry, (old, boundary, weights), (new, _, others) in zip(program.entries, before, after, strict=True):
        if boundary:
            where = location(group.contractions[0].node)
            rewrite = Rewrite(where, old, new, boundary, sliced, {**weights, **others}, entry, str(removal))
            context.rewrites.append(rewrite)
    context.diagnostics.remark(
        codes.UNITS_REMOVED,
        f"{len(removal.gone)} of {group.units} units of {group.name} were removed",
        where=location(group.contractions[0].node),
        why=str(removal),
    )
    return made


def _sliced(value: Tensor, name: str, group: Group, keep: Tensor) -> Tensor:
    for member in group.members:
        if member.weight == name:
            stays = torch.ones(value.shape[member.axis], dtype=torch.bool)  # other groups may share the axis
            stays[member.index.flatten()] = False
            stays[member.index[keep].flatten()] = True
            value = value.index_select(member.axis, torch.nonzero(stays).flatten())
    return value


def _region(
    program: Program, entry: str, inner: set[fx.Node], cut_nodes: set[fx.Node], mark: str
) -> tuple[fx.Graph, tuple[str, ...], dict[str, Tensor]]:
    """What computes the units and reads them, cut out of one entry; its boundary; and its weights, whose names are
    marked, since before and after they are called the same.

    Boundary values that are smaller already than in the program before the pass get names that no program knows, so
    that their check makes them up instead of taking what the program before the pass computes.
    """
    own = [node for node in program.entries[entry].graph.nodes if node in inner]
    results = [node for node in own if any(user not in inner for user in node.users)]
    boundary = dict.fromkeys(region_inputs(results, inner))
    names = tuple(f"{node.name}_cut" if node in cut_nodes else node.name for node in boundary)
    graph = region(results, inner, boundary)
    for node, name in zip([node for node in graph.nodes if node.op == "placeholder"], names, strict=True):
        node.name = name
    weights: dict[str, Tensor] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            weights[f"{node.target}{mark}"] = program.weights[str(node.target)]
            node.target = f"{node.target}{mark}"
    return graph, names, weights
