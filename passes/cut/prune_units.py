"""Structural pruning: whole neurons, channels, heads or experts leave the program, with everything coupled to them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from sparc import codes
from sparc.analysis.coupling_rules import KERNEL_POSITION
from sparc.analysis.dependency import KINDS, Group
from sparc.contract import Approximate
from sparc.diag import PassError
from sparc.pass_base import Pass, PassContext, Stage
from sparc.passes.cut.claims import are_kernel_positions, claimed_groups, described
from sparc.passes.cut.gradients import PROJECTION, gradients
from sparc.passes.cut.importance import (
    activation,
    activation_watches,
    fisher,
    from_gradients,
    magnitude,
    scored_members,
    taylor,
)
from sparc.passes.cut.refit import gram_watches, refit
from sparc.passes.cut.select import choose, rivals
from sparc.passes.cut.slice import cut_groups
from sparc.program import Program, location

IMPORTANCES = ("magnitude", "activation", "taylor", "hessian")
RANKINGS = ("group", "global")


@dataclass(frozen=True)
class PruneUnits(Pass):
    """The least important units of dependency groups are removed: rows, columns, filters, heads, experts and all.

    A group (`sparc.analysis.dependency`) is what can only be removed together, found from the operators alone
    (DepGraph, Fang et al. 2023). A step's selector claims a group when it selects a matrix among its members. What is
    left is an ordinary smaller program, which computes what the program with zeros in place of the removed weights
    does. So units that a norm or a softmax takes a statistic of are left alone, with the reason; but for experts, of
    which a removed one counts as never chosen.

    Of groups that are factors of one axis a step cuts one, so that `keep` is the part of the axis: whole heads and
    experts rather than what is inside them; of one kind the inner one (a grouped convolution's channels, not its
    groups), but heads of keys with all their queries rather than one query of each.

    Args:
        kinds: which units: `neuron`, `channel`, `head` (with grouped queries: a head of keys and values with its
            queries), `queries of a head` (the same query of every head of keys), `head_dim`, `hidden`, `expert`.
        keep: the part of the units that stays, above 0 up to 1.
        importance: what units are ranked by: `magnitude`, the squared norm of their weights; `activation`, how much of
            what their readers compute comes from them (for experts: how many rows they get); `taylor` and `hessian`,
            the first- and second-order change of a loss without them.
        ranking: `group` keeps `keep` of every group; `global` lets all groups of one kind compete.
        multiple: what is left is a multiple of so many channels wide, the nearest one, so that kernels stay efficient.
            A group that has no smaller multiple stays as it is.
        compensate: refit what reads the units, by least squares on calibration data.
        loss: of `taylor` and `hessian`: `projection`, a random projection of the outputs; `next_token`; or the name of
            an output of one number.

    Raises:
        PassError: SPARC209 when an option is out of range, or the program has no such loss.
    """

    name: ClassVar[str] = "prune_units"
    stage: ClassVar[Stage] = Stage.CUT
    scope: ClassVar[str] = "program"

    kinds: tuple[str, ...] = ("neuron", "channel", "head")
    keep: float = 0.75
    importance: str = "magnitude"
    ranking: str = "group"
    multiple: int = 8
    compensate: bool = False
    loss: str = PROJECTION

    def __post_init__(self) -> None:
        bad = {
            "kinds": not self.kinds or not set(self.kinds) <= set(KINDS),
            "keep": not 0 < self.keep <= 1,
            "importance": self.importance not in IMPORTANCES,
            "ranking": self.ranking not in RANKINGS,
            "multiple": self.multiple < 1,
        }
        hints = {
            "kinds": f"some of {', '.join(KINDS)}",
            "keep": "above 0, and 1 at most: the part of the units that stays",
            "importance": f"one of {', '.join(IMPORTANCES)}",
            "ranking": f"one of {', '.join(RANKINGS)}",
            "multiple": "a number from 1",
        }
        for name in (name for name, wrong in bad.items() if wrong):
            what = f"prune_units cannot work with {name}={getattr(self, name)!r}"
            raise PassError(codes.BAD_OPTION, what, hint=hints[name])

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Mean squares of what readers read, and their Gram matrices, as far as the options ask for them."""
        kinds = {"moments": self.importance == "activation", "gram": self.compensate}
        return frozenset(kind for kind, wanted in kinds.items() if wanted)

    @property
    def contract(self) -> Approximate:
        """The program's outputs are compared with those before."""
        return Approximate()

    def watches(self, program: Program, context: PassContext) -> Iterator[tuple[fx.Node, str]]:
        """What reads the claimed groups."""
        for group in self._candidates(program, context, silent=True):
            if self.importance == "activation":
                yield from activation_watches(group)
            if self.compensate:
                yield from gram_watches(group)

    def run(self, program: Program, context: PassContext) -> None:
        """Rank the units, refit what reads them, and cut."""
        candidates = list(self._candidates(program, context))
        scores = {}
        for group, score in zip(candidates, self._scores(program, context, candidates), strict=True):
            if isinstance(score, str) or not bool(torch.isfinite(score).all()):
                why = score if isinstance(score, str) else "their importance is not a number"
                self._skip(context, group, why)
            else:
                scores[group] = score
        for group, rival in rivals(scores).items():
            del scores[group]
            self._skip(context, group, f"one axis is cut once, here along {rival.name} ({described(rival)})")
        chosen = choose(scores, self.keep, self.ranking, self.multiple)
        if self.keep < 1:
            for group in [group for group in scores if group not in chosen]:
                self._skip(context, group, "the nearest allowed number is all", f"{group.units} units")
        kept = {group: units for group, units in chosen.items() if context.edit()}
        if not kept:
            return
        refitted: set[Group] = set()
        if self.compensate:
            assert context.statistics is not None
            refitted = refit(program, kept, context.statistics, context.skip)
        for group, units in kept.items():
            self._note(context, group, units, group in refitted)
        cut_groups(program, kept)

    def _candidates(self, program: Program, context: PassContext, silent: bool = False) -> Iterator[Group]:
        for group in claimed_groups(program, context):
            if group.kind not in self.kinds:
                continue
            why = group.frozen or (group.statistic if group.kind != "expert" else "")
            if not why:
                yield group
            elif not silent and why != KERNEL_POSITION:
                self._skip(context, group, why)
            elif not silent and not are_kernel_positions(program, group):
                self._skip(context, group, "a convolution moves along them")

    def _scores(self, program: Program, context: PassContext, found: list[Group]) -> list[Tensor | str]:
        """For each group the importance of its units, `[units]` float64, or why there is none."""
        if self.importance == "magnitude":
            return [magnitude(program, group) for group in found]
        if self.importance == "activation":
            assert context.statistics is not None
            return [activation(program, group, context.statistics) for group in found]
        if not any(context.calibration.values()):
            raise PassError(codes.DATA_NEEDED, f"pass {self.name!r} needs calibration data")
        names = [member.weight for group in found for member in scored_members(program, group)]
        slopes = gradients(program, names, context.calibration, self.loss) if names else iter(())
        return from_gradients(program, found, slopes, taylor if self.importance == "taylor" else fisher)

    def _skip(self, context: PassContext, group: Group, why: str, units: str = "units") -> None:
        context.skip(group.name, f"its {units} stay ({described(group)}): {why}")

    def _note(self, context: PassContext, group: Group, units: Tensor, refitted: bool) -> None:
        where = location(group.contractions[0].node if group.contractions else group.values[0][0])
        gone = group.units - len(units)
        what = f"{gone} of {group.units} units of {group.name} were removed ({described(group)})"
        why = f"by {self.importance}" + (", and what reads them was refitted" if refitted else "")
        context.diagnostics.remark(codes.UNITS_PRUNED, what, where=where, why=why)
