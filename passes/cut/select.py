"""Which units of dependency groups stay: so many of each group, or so many of all, those of greatest importance."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from sparc.analysis.axes import positions
from sparc.analysis.dependency import KINDS, Group
from sparc.passes.cut.importance import readers


def rivals(found: Iterable[Group]) -> dict[Group, Group]:
    """Groups that stay since units of another one lie at the same places of a weight, with that one.

    Both are factors of one axis, such as the groups of a convolution and the channels in each: if both were cut, the
    part of the axis that is left would be the product of two.

    Args:
        found: the groups. Whole heads and experts are cut rather than what is inside them, by the order of `KINDS`; of
            one kind the inner units are, but heads of keys with all their queries rather than one query of each.
    """
    cut: dict[tuple[str, int], list[tuple[Group, Tensor]]] = {}
    left: dict[Group, Group] = {}
    for group in sorted(found, key=lambda each: (KINDS.index(each.kind), _depth(each))):
        taken = ((member, *each) for member in group.members for each in cut.get((member.weight, member.axis), ()))
        rival = next((other for member, other, index in taken if bool(torch.isin(member.index, index).any())), None)
        if rival is not None:
            left[group] = rival
            continue
        for member in group.members:
            cut.setdefault((member.weight, member.axis), []).append((group, member.index))
    return left


def _depth(group: Group) -> int:
    """Orders factors of one axis by how far apart two units are: inner ones first, outer ones of heads."""
    stride = max(int(member.index[1, 0] - member.index[0, 0]) for member in group.members)
    return -stride if group.kind == "head" else stride


def rounding_step(group: Group, multiple: int) -> int:
    """How many units are removed at a time, so that what products read is a multiple of so many channels wide.

    A head of 64 channels is a multiple of 8 by itself, and so is a channel in each of 8 groups of a convolution;
    experts are no channels.
    """
    if group.kind == "expert":
        return 1
    widths = {(member.weight, member.axis): member.index.shape[1] for member in group.members if member.read}
    for reader in readers(group):
        places = positions(group.coupling.of(reader.value)[reader.axis], group.channels)
        assert places is not None  # only channels that are coupled with themselves have none
        widths[reader.weight, reader.place] = places.shape[1]
    return math.lcm(*(multiple // math.gcd(multiple, width) for width in widths.values() or [1]))


def kept_count(group: Group, wanted: float, multiple: int) -> int:
    """The number of units nearest to `wanted` that is allowed: a multiple, not none, all where no smaller one is.

    Args:
        group: says how many there are, and how many must stay.
        wanted: a number of units.
        multiple: of channels, see `rounding_step`.
    """
    step = rounding_step(group, multiple)
    least = math.ceil(max(1, group.least) / step) * step
    return min(group.units, max(least, math.floor(wanted / step + 0.5) * step))


def best(scores: Tensor, count: int) -> Tensor:
    """`[count]` int64: the units of greatest importance, in ascending order; of equals, the first ones."""
    return torch.sort(torch.argsort(scores, descending=True, stable=True)[:count]).values


def wanted_counts(scores: Mapping[Group, Tensor], keep: float, ranking: str) -> dict[Group, float]:
    """How many units of each group the ranking wants to stay.

    Args:
        scores: `[units]` for each group.
        keep: the part of all units.
        ranking: `group` keeps that part of every group; `global` lets all groups of one kind compete, each one's scores
            divided by their mean (Torch-Pruning's normalizer, Fang et al. 2023).
    """
    if ranking == "group":
        return {group: keep * group.units for group in scores}
    found: dict[Group, float] = {}
    for kind in dict.fromkeys(group.kind for group in scores):
        ours = [group for group in scores if group.kind == kind]
        found.update(_compete({group: scores[group] for group in ours}, keep))
    return found


def _compete(scores: Mapping[Group, Tensor], keep: float) -> dict[Group, float]:
    normal = [_normalized(each) for each in scores.values()]
    owner = torch.repeat_interleave(torch.tensor([len(each) for each in normal]))
    every = torch.cat(normal)
    chosen = torch.argsort(every, descending=True, stable=True)[: math.floor(keep * len(every) + 0.5)]
    counts = torch.bincount(owner[chosen], minlength=len(normal))
    return dict(zip(scores, map(float, counts), strict=True))


def _normalized(scores: Tensor) -> Tensor:
    mean = scores.mean()
    return scores / mean if float(mean) > 0 else scores


def choose(scores: Mapping[Group, Tensor], keep: float, ranking: str, multiple: int) -> dict[Group, Tensor]:
    """For each group the units that stay, int64, in ascending order; groups that keep all of them are left out."""
    wanted = wanted_counts(scores, keep, ranking)
    counts = {group: kept_count(group, wanted[group], multiple) for group in scores}
    return {group: best(scores[group], count) for group, count in counts.items() if count < group.units}
