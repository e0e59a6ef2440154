"""Which units of dependency groups stay: so many of each group, or so many of all, those of greatest importance."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sparc.analysis.dependency import Group


def rounding_step(group: Group, multiple: int) -> int:
    """How many units are removed at a time, so that what products read is a multiple of so many channels wide.

    A head of 64 channels is a multiple of 8 by itself; experts are no channels.
    """
    if group.kind == "expert":
        return 1
    widths = [member.index.shape[1] for member in group.members if member.read] or [1]
    return multiple // math.gcd(multiple, min(widths))


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
