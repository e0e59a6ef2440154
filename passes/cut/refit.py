"""What reads a group after a cut takes over, by least squares, what the removed channels told it."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from sparc.analysis.axes import Channels, remaining
from sparc.analysis.coupling import Contraction
from sparc.analysis.dependency import Group
from sparc.diag import Location
from sparc.passes.cut.importance import readers, statistic_kind
from sparc.program import Program, location, weight_nodes

DAMPING = 0.1  # pulls towards the weights there were: a tenth of that fits the noise of a few thousand tokens

Statistics = Callable[[fx.Node, str], Any]
Skip = Callable[[str, str, Location], None]


def gram_watches(group: Group) -> Iterator[tuple[fx.Node, str]]:
    """The statistics that `refit` wants, as (node, kind)."""
    yield from ((value, statistic_kind("gram", axis)) for _, value, axis in readers(group))


def refit(program: Program, kept: dict[Group, Tensor], statistics: Statistics, skip: Skip) -> None:
    """Change the columns that will stay in every weight that reads the groups, before they are cut.

    `W'_K = W_K + W_R G_RK (G_KK + λI)^-1` minimises `E |W x - W'_K x_K|^2 + λ |W'_K - W_K|^2`, where `G = E[x xᵀ]`, K
    are the channels that stay, R the others, and λ is a tenth of the mean of G's diagonal. A convolution's filter is
    changed at each of its positions by the same matrix: exact least squares where it has one position.

    Args:
        program: not yet cut; is edited.
        kept: for each group of one analysis, the units that stay.
        statistics: the Gram matrix of the last axis of a node.
        skip: told of a weight that is left as it is: its name, why, and where.
    """
    leaves: dict[Channels, Tensor] = {group.channels: units for group, units in kept.items()}
    found: dict[tuple[str, int], list[tuple[Contraction, Tensor | None]]] = {}
    for group in kept:
        for reader, value, axis in readers(group):
            assert reader.weight is not None
            key = str(reader.weight[0].target), reader.weight[1]
            known = found.setdefault(key, [])
            if all(reader is not other for other, _ in known):
                known.append((reader, statistics(value, statistic_kind("gram", axis))))
    state = next(iter(kept)).coupling
    for (name, place), uses in found.items():
        weight = program.weights[name]
        grams = [gram for _, gram in uses if gram is not None and len(gram) == weight.shape[place]]
        why = _why_not(program, name, uses, grams)
        if why:
            skip(name, f"its columns are not refitted: {why}", location(uses[0][0].node))
            continue
        columns = remaining(state.weights[name][place], leaves)
        program.set_weight(name, refitted(weight, place, columns, torch.stack(grams).mean(0)))


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
    wide, gram = weight.movedim(axis, -1).double(), gram.double()
    damped = gram[columns][:, columns] + DAMPING * gram.diagonal().mean() * torch.eye(len(columns), dtype=torch.float64)
    share = torch.linalg.solve(damped, gram[columns][:, gone]).T
    wide = wide.index_add(-1, columns, wide[..., gone] @ share)
    return wide.movedim(-1, axis).to(weight.dtype).contiguous()


def _why_not(program: Program, name: str, uses: list[tuple[Contraction, Tensor | None]], grams: list[Tensor]) -> str:
    nodes = [node for entry in program.entries.values() for node in weight_nodes(entry.graph, name)]
    if {user for node in nodes for user in node.users} != {reader.node for reader, _ in uses}:
        return "it is also used otherwise"
    if len(grams) < len(uses):
        return "not every product that reads it has data for each of its columns"
    if not all(bool(torch.isfinite(gram).all()) and float(gram.diagonal().mean()) > 0 for gram in grams):
        return "its inputs are zero"
    return ""
