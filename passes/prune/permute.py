"""Permuting the channels between layers, so that a mask of N:M keeps more."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from sparc import codes
from sparc.analysis.dependency import Group, groups
from sparc.analysis.sites import Site
from sparc.contract import Bounded
from sparc.diag import PassError
from sparc.encoding.nm import NM
from sparc.pass_base import Pass, PassContext, Stage
from sparc.passes.cut.slice import resize
from sparc.passes.round.importance import column_importance, input_moments
from sparc.program import Program

_ROWS = 512
_PAIRS = 2**22  # elements that one comparison of pairs may hold
_PATIENCE = 8


@dataclass(frozen=True)
class PermuteChannels(Pass):
    """f(P g(x)) => the same, with the channels of g in an order in which N:M pruning of f's columns keeps more.

    The channels of a dependency group are permuted in all of its weights, so the function stays the same and nothing is
    computed at run time. Only groups whose products read whole axes are permuted, and only where the sum of the scores
    that `pattern` keeps in all of them grows. (Pool and Yu 2021, "Channel Permutations for N:M Sparsity": pairs of
    columns are exchanged greedily.)

    Args:
        pattern: the mask that `Prune` will choose afterwards.
        method: the score that it will choose by: `magnitude`, or `wanda`, which needs data.
        rounds: how often all m's are paired anew, each time exchanging the best two columns of every pair; the search
            ends before when some rounds in a row found nothing.

    Raises:
        PassError: SPARC209 for a pattern that is no N:M, or fewer rounds than one.
    """

    name: ClassVar[str] = "permute_channels"
    stage: ClassVar[Stage] = Stage.EQUALIZE
    scope: ClassVar[str] = "program"

    pattern: NM = field(default=NM(2, 4))
    method: Literal["magnitude", "wanda"] = "magnitude"
    rounds: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.pattern, NM):
            raise PassError(codes.BAD_OPTION, f"channels cannot be permuted for {self.pattern!r}", hint="NM(2, 4)")
        if self.method not in ("magnitude", "wanda"):
            raise PassError(codes.BAD_OPTION, f"no method {self.method!r}", hint="magnitude or wanda")
        if type(self.rounds) is not int or self.rounds < 1:
            raise PassError(codes.BAD_OPTION, f"rounds={self.rounds!r}", hint="at least 1")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Mean squares of the inputs, for `wanda`."""
        return frozenset({"moments"}) if self.method == "wanda" else frozenset()

    @property
    def contract(self) -> Bounded:
        """Sums are taken in another order."""
        return Bounded(1e-4)

    def watches(self, program: Program, context: PassContext) -> Iterator[tuple[fx.Node, str]]:
        """The inputs of the selected sites, per channel."""
        return input_moments(program, context) if self.needs else iter(())

    def run(self, program: Program, context: PassContext) -> None:
        """Permute every group that selected sites read, where that helps."""
        sites = {site.weight: site for site in context.sites(program)}
        for group in groups(program):
            readers = [
                (sites[member.weight], index)
                for member in group.members
                if member.weight in sites and _reduces(program, sites[member.weight], member.axis)
                for index in member.index.T
            ]
            if not readers or group.units % self.pattern.m:
                continue
            why = group.frozen or ("the cache holds them" if group.cached else "")
            if why:
                context.skip(group.name, f"its channels cannot be permuted: {why}")
                continue
            if not all(_is_run(index, self.pattern.m) for _, index in readers):
                continue
            scores = [self._score(program, site, context)[:, index] for site, index in readers]
            order = best_order(torch.cat(scores), self.pattern, self.rounds)
            if order is not None and context.edit():
                _permute(program, group, order, context)

    def _score(self, program: Program, site: Site, context: PassContext) -> Tensor:
        """`[rows, reduce]`: what is lost with each element."""
        matrix = site.view.to_matrix(program.weights[site.weight]).float().abs()
        importance = column_importance(program, site, context) if self.needs else None
        score = matrix if importance is None else matrix * importance.sqrt()
        return score.reshape(-1, score.shape[-1])


def best_order(score: Tensor, pattern: NM, rounds: int) -> Tensor | None:
    """An order of columns in which n of every m keep more, found by exchanges; None when none was found.

    Args:
        score: `[rows, columns]`, not negative; of many rows, 512 evenly spaced ones are searched, and the order counts
            only if it keeps more of all.
        pattern: says n and m, which divides the columns.
        rounds: at most so many times all m's are paired.

    Returns:
        int64 `[columns]`: which column comes where.
    """
    m, searched = pattern.m, score[:: max(1, len(score) // _ROWS)]
    order = torch.arange(score.shape[1])
    generator = torch.Generator().manual_seed(0)
    stripes, idle = len(order) // m, 0
    for _ in range(rounds):
        shuffled = torch.randperm(stripes, generator=generator)
        pairs = shuffled[: stripes // 2 * 2].reshape(-1, 2)
        found = [_exchange(searched, order, each, pattern) for each in pairs.split(_at_once(searched, m))]
        idle = 0 if any(found) else idle + 1
        if idle == _PATIENCE or not len(pairs):
            break
    return order if kept_score(score[:, order], pattern) > kept_score(score, pattern) else None


def kept_score(score: Tensor, pattern: NM) -> float:
    """The sum of the n greatest of every m columns, `[rows, columns]`, over all rows."""
    return float(_kept(score.unflatten(-1, (-1, pattern.m)), pattern.n).sum())


def _kept(score: Tensor, n: int) -> Tensor:
    return score.topk(n, dim=-1).values.sum(-1, dtype=torch.float64)


def _exchanged(score: Tensor, others: Tensor, n: int) -> Tensor:
    """What is kept of each m when a column gives its place to another: its n greatest, without the one, with the other.

    They are the n - 1 greatest of the rest, and the greater one of the rest's next and the newcomer.

    Args:
        score: `[rows, pairs, m]`.
        others: alike, the newcomers.
        n: how many are kept.

    Returns:
        `[rows, pairs, m, m]`: which leaves, which comes.
    """
    greatest = score.topk(n + 1, dim=-1).values
    last, next_one = greatest[..., n - 1 : n], greatest[..., n:]
    stay = greatest[..., :n].sum(-1, keepdim=True) - torch.maximum(score, last)
    rival = torch.where(score >= last, next_one, last)
    return stay.unsqueeze(-1) + torch.maximum(rival.unsqueeze(-1), others.unsqueeze(-2))


def _at_once(score: Tensor, m: int) -> int:
    return max(1, _PAIRS // (len(score) * m**2))


def _exchange(score: Tensor, order: Tensor, pairs: Tensor, pattern: NM) -> bool:
    """In each pair of m's, exchange the two columns whose exchange keeps most more; whether any did. `order` changes.

    Args:
        score: `[rows, columns]`, in the original order.
        order: which column comes where.
        pairs: `[pairs, 2]`, numbers of m's, each in one pair.
        pattern: says n and m.
    """
    n, m = pattern.n, pattern.m
    places = pairs.unsqueeze(-1) * m + torch.arange(m)  # [pairs, 2, m]
    first, second = (score[:, order[places[:, side]]] for side in (0, 1))  # [rows, pairs, m]
    before = (_kept(first, n) + _kept(second, n)).sum(0)
    forth, back = (
        _exchanged(ours, theirs, n).sum(0, dtype=torch.float64) for ours, theirs in ((first, second), (second, first))
    )
    after = forth + back.transpose(-1, -2)
    gain, best = (after - before[:, None, None]).flatten(1).max(-1)
    better = gain > 1e-6 * before
    a, b = best // m, best % m
    row = torch.arange(len(pairs))
    mine, other = places[row, 0, a][better], places[row, 1, b][better]
    order[mine], order[other] = order[other], order[mine]
    return bool(better.any())


def _permute(program: Program, group: Group, order: Tensor, context: PassContext) -> None:
    resize(program, group.coupling, {group.channels: order})
    for member in group.members:
        weight = program.weights[member.weight]
        if weight.is_floating_point():
            context.wide[member.weight] = weight.double()


def _reduces(program: Program, site: Site, axis: int) -> bool:
    """Whether an axis of a site's weight is the columns of its matrix, one each."""
    shape = program.weights[site.weight].shape
    if any(use.operator in ("embedding", "conv_transposed") for use in site.uses):
        return False
    if site.operator == "conv":
        return axis == 1 and shape[2:].numel() == 1
    return axis == len(shape) - (2 if site.view.kind == "transposed" else 1)


def _is_run(index: Tensor, m: int) -> bool:
    """Whether units are columns one after the other, from the beginning of an m."""
    return int(index[0]) % m == 0 and torch.equal(index, index[0] + torch.arange(len(index)))
