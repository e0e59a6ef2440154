"""What reads a group after a cut takes over, by least squares, what the removed channels told it."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from sparc.analysis.axes import Channels, extent, remaining
from sparc.analysis.dependency import Group
from sparc.diag import Location
from sparc.passes.cut.importance import Reader, readers, statistic_kind
from sparc.program import Program, location, weight_nodes

DAMPING = 0.1  # pulls towards the weights there were: a tenth of that fits the noise of a few thousand tokens

Statistics = Callable[[fx.Node, str], Any]
Skip = Callable[[str, str, Location], None]


def gram_watches(group: Group) -> Iterator[tuple[fx.Node, str]]:
    """The statistics that `refit` wants, as (node, kind)."""
    yield from ((each.value, statistic_kind("gram", each.axis)) for each in readers(group))


def refit(program: Program, kept: dict[Group, Tensor], statistics: Statistics, skip: Skip) -> set[Group]:
    """Change the columns that will stay in every weight that reads the groups, before they are cut.

    `W'_K = W_K + W_R G_RK (G_KK + λI)^-1` minimises `E |W x - W'_K x_K|^2 + λ |W'_K - W_K|^2`, where `G = E[x xᵀ]`, K
    are the channels that stay, R the others, and λ is a tenth of the mean of G's diagonal. A convolution's filter is
    changed at each of its positions by the same matrix, which is exact least squares where it has one position; a
    grouped one's by a matrix for each of its groups.

    Args:
        program: not yet cut; is edited.
        kept: for each group of one analysis, the units that stay.
        statistics: the Gram matrix of an axis of a node.
        skip: told of what is left as it is: a weight's or a group's name, why, and where.

    Returns:
        The groups that a refitted weight reads.
    """
    leaves: dict[Channels, Tensor] = {group.channels: units for group, units in kept.items()}
    found: dict[tuple[str, int], dict[Reader, set[Group]]] = {}
    for group in kept:
        known = list(readers(group))
        for reader in known:
            found.setdefault((reader.weight, reader.place), {}).setdefault(reader, set()).add(group)
        _note_unread(group, known, skip)
    refitted_groups: set[Group] = set()
    for (name, place), uses in found.items():
        grams = [statistics(each.value, statistic_kind("gram", each.axis)) for each in uses]
        why = _why_not(program, name, list(uses), grams)
        if why:
            skip(name, f"its columns are not refitted: {why}", location(next(iter(uses)).product.node))
            continue
        reader, mean = next(iter(uses)), torch.stack(grams).mean(0)
        columns, parts = remaining(reader.columns, leaves), program.weights[name].chunk(reader.groups)
        pairs = zip(parts, _blocks(mean, reader.groups), strict=True)
        program.set_weight(name, torch.cat([refitted(part, place, columns, gram) for part, gram in pairs]))
        refitted_groups.update(*uses.values())
    return refitted_groups


def refitted(weight: Tensor, axis: int, columns: Tensor, gram: Tensor) -> Tensor:
    """A weight whose `columns` of an axis stand for all of them; the others are as they were.

    Args:
        weight: any shape; products are summed over `axis`.
        axis: of `n` places.
        columns: int64, the places that stay.
        gram: `[n, n]`, of what meets the axis.
    """
    stays = torch.zeros(weight.shape[axis], dtype=torch.bool).index_fill(0, columns, True)
    gone = torch.nonzero(~stays).flatten()
    if not gram.any():
        return weight  # one group's inputs are zero
    wide, gram = weight.movedim(axis, -1).double(), gram.double()
    damped = gram[columns][:, columns] + DAMPING * gram.diagonal().mean() * torch.eye(len(columns), dtype=torch.float64)
    share = torch.linalg.solve(damped, gram[columns][:, gone]).T
    wide = wide.index_add(-1, columns, wide[..., gone] @ share)
    return wide.movedim(-1, axis).to(weight.dtype).contiguous()


def _blocks(gram: Tensor, groups: int) -> Iterator[Tensor]:
    """The Gram matrix of each of several equal parts of the channels."""
    width = len(gram) // groups
    return (gram[start : start + width, start : start + width] for start in range(0, len(gram), width))


def _note_unread(group: Group, known: list[Reader], skip: Skip) -> None:
    """Say what reads a group and cannot be refitted, since no Gram matrix of one axis describes it."""
    seen = {each.product.node for each in known}
    others = [each for each in group.contractions if each.weight is not None and each.node not in seen]
    for each in others:
        assert each.weight is not None
        why = "its columns are not refitted: its channels lie along several axes of what it reads"
        skip(str(each.weight[0].target), why, location(each.node))
    if not known and not others:
        why = f"nothing is refitted where its units are cut ({group.kind}): no product with a weight sums over them"
        skip(group.name, why, location(group.values[0][0]))


def _why_not(program: Program, name: str, uses: list[Reader], grams: list[Tensor | None]) -> str:
    nodes = [node for entry in program.entries.values() for node in weight_nodes(entry.graph, name)]
    if {user for node in nodes for user in node.users} != {each.product.node for each in uses}:
        return "it is also used otherwise"
    if len({each.groups for each in uses}) > 1:
        return "convolutions with different groups read it"
    wide = [gram for gram, each in zip(grams, uses, strict=True) if gram is not None and len(gram) == _width(each)]
    if len(wide) < len(uses):
        return "not every product that reads it has data for each of its columns"
    if not all(bool(torch.isfinite(gram).all()) and float(gram.diagonal().mean()) > 0 for gram in wide):
        return "its inputs are zero"
    return ""


def _width(reader: Reader) -> int:
    return int(reader.groups * extent(reader.columns))
