"""Which units of a dependency group are superfluous: duplicates, constants, and what nobody reads."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparc.analysis.dependency import Group, Member
from sparc.program import Program

_SAMPLE = 4
_PROPORTIONAL = 1e-12
_POSITIVE = frozenset(
    {"linear", "conv1d", "conv2d", "conv3d", "relu", "leaky_relu", "neg", "abs", "dropout", "clone", "contiguous"}
    | {"max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"}
    | {"reshape", "view", "flatten", "permute", "transpose", "unsqueeze", "squeeze"}
)


@dataclass(frozen=True)
class Superfluous:
    """Units that can go.

    Args:
        duplicates: `[n, 2]` int64, each a unit and the kept unit that computes the same up to a factor.
        factors: `[n]` float64, what the kept unit's value is multiplied by to give the duplicate's.
        unread: `[n]` int64, units whose columns are zero wherever they are read.
    """

    duplicates: Tensor = field(default_factory=lambda: torch.empty(0, 2, dtype=torch.int64))
    factors: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    unread: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


def find_superfluous(program: Program, group: Group, dead: Tensor) -> Superfluous:
    """Duplicates and unread units among those that are not dead.

    Equal rows are found by sorting a few of their elements, and only where those agree by sorting whole rows; so a
    model without duplicates is hardly read.

    Args:
        program: the program.
        group: its channels are coupled one by one, so units with equal weights have equal values.
        dead: `[n]` int64, units that are known to be superfluous.
    """
    left = torch.ones(group.units, dtype=torch.bool).index_fill(0, dead, False)
    readers = [member for member in group.members if member.read]
    unread = zero_units(program, readers) if readers else torch.empty(0, dtype=torch.int64)
    unread = unread[left[unread]]
    left[unread] = False
    units = torch.nonzero(left).flatten()
    pairs, factors = _duplicates(program, group, units)
    return Superfluous(pairs, factors, unread)


def obstacle(group: Group) -> str:
    """Why units of the group cannot be merged, copied or removed; empty when they can."""
    if group.frozen or group.statistic:
        return group.frozen or group.statistic
    if group.cached:
        return "the cache holds them"
    if group.kind == "expert":
        return "which of them is used depends on data"
    for reader in group.contractions:
        if reader.weight is None:
            return f"they are read by {reader.node.name}, whose operands are all computed"
        key = (str(reader.weight[0].target), reader.weight[1])
        if not all(member.read for member in group.members if (member.weight, member.axis) == key):
            return f"the columns of {key[0]} are also used otherwise"
    return ""


def rows(program: Program, member: Member, units: Tensor, sample: bool = False) -> Tensor:
    """`[len(units), elements]`: the weights of some units in one member; with `sample`, only a few of each."""
    weight = program.weights[member.weight].movedim(member.axis, 0)
    if sample:
        for axis in range(1, weight.ndim):
            weight = weight.narrow(axis, 0, min(_SAMPLE if axis == 1 else 1, weight.shape[axis]))
    index = member.index[units][:, :_SAMPLE] if sample else member.index[units]
    return weight.index_select(0, index.flatten()).reshape(len(units), -1)


def zero_units(program: Program, members: Sequence[Member]) -> Tensor:
    """`[n]` int64: the units whose weights are zero in every one of the members."""
    units = torch.arange(len(members[0].index))
    for sample in (True, False):
        for member in members:
            if len(units):
                units = units[~rows(program, member, units, sample).any(1)]
    return units


def _duplicates(program: Program, group: Group, units: Tensor) -> tuple[Tensor, Tensor]:
    writers = [member for member in group.members if not member.read]
    scaled = is_homogeneous(group)
    empty = torch.empty(0, 2, dtype=torch.int64), torch.empty(0, dtype=torch.float64)
    for sample in (True, False):
        if len(units) < 2 or not writers:
            return empty
        found = torch.cat([rows(program, member, units, sample).double() for member in writers], 1)
        directions = _directions(found) if scaled else found
        key, axis = (_hashed(directions), None) if sample else (directions, 0)
        classes, counts = torch.unique(key, dim=axis, return_inverse=True, return_counts=True)[1:]
        chosen = counts[classes] > 1
        units, found, classes = units[chosen], found[chosen], classes[chosen]
    if not len(units):
        return empty
    first = torch.full((int(classes.max()) + 1,), len(units))
    first = first.scatter_reduce(0, classes, torch.arange(len(units)), "amin")[classes]
    factors = _ratios(found, found[first]) if scaled else torch.ones(len(units), dtype=torch.float64)
    error = (found - factors[:, None] * found[first]).abs().amax(1)
    same = (first != torch.arange(len(units))) & (error <= _PROPORTIONAL * found.abs().amax(1))
    return torch.stack([units[same], units[first[same]]], 1), factors[same]


def _hashed(found: Tensor) -> Tensor:
    """`[n]`: one number for each row, equal for equal rows, which are sorted faster than rows."""
    hashed = torch.zeros(len(found), dtype=torch.float64)
    for column in range(found.shape[1]):
        hashed = hashed * 0.61803398875 + found[:, column]
    return hashed


def _directions(found: Tensor) -> Tensor:
    """Each row divided by its largest magnitude, rounded so that proportional rows become equal."""
    largest = found.abs().amax(1, keepdim=True)
    return torch.where(largest > 0, found / largest, found).mul(2.0**30).round()


def _ratios(found: Tensor, reference: Tensor) -> Tensor:
    squares = (reference * reference).sum(1)
    place = reference.abs().argmax(1, keepdim=True)
    ratio = found.gather(1, place) / reference.gather(1, place)
    return torch.where(squares > 0, ratio.flatten(), torch.ones_like(squares))


def is_homogeneous(group: Group) -> bool:
    """Whether the units' values grow in proportion to their weights: one product writes them, and what follows until
    they are read commutes with positive factors.
    """
    names = {str(getattr(node.target, "_opname", "")) for node, _ in group.values}
    products = [node for node, _ in group.values if _is_product(str(getattr(node.target, "_opname", "")))]
    written = {member.weight for member in group.members if not member.read}
    own = {str(used.target) for node in products for used in node.all_input_nodes if used.op == "get_attr"}
    return len(products) == 1 and names <= _POSITIVE and written <= own


def _is_product(name: str) -> bool:
    return name == "linear" or name.startswith("conv")
