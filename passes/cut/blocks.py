"""Fewer layers: the repetitions of a repeated block that change what passes them least are left out."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from sparc import codes
from sparc.analysis.features import product_axes
from sparc.analysis.repeats import Repeats, Repetition, find_repeats
from sparc.contract import Approximate
from sparc.diag import PassError
from sparc.pass_base import Pass, PassContext, Stage
from sparc.program import Program, location

DISTANCES = ("cosine", "angular")


@dataclass(frozen=True)
class DropBlocks(Pass):
    """h' = f(h) => h' = h, for the repetitions f of a repeated block with the least influence.

    The influence of a repetition is 1 - E cos(h, h') over calibration tokens (ShortGPT, Men et al. 2024, section 3).
    It is 0 where every residual branch gives 0, and the removal is then exact.

    Args:
        count: how many repetitions to remove; without it, nothing is done.
        distance: `cosine` removes the repetitions of least influence, wherever they are; `angular` the stretch of
            `count` neighbours whose first input and last result are closest by E arccos(cos) / pi (Gromov et al. 2024,
            section 3).

    Raises:
        PassError: SPARC209 when `count` is not positive or the distance is unknown.
    """

    name: ClassVar[str] = "drop_blocks"
    stage: ClassVar[Stage] = Stage.CUT
    needs: ClassVar[frozenset[str]] = frozenset({"rows"})
    scope: ClassVar[str] = "program"

    count: int | None = None
    distance: str = "cosine"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count is not None and self.count < 1:
            raise PassError(codes.BAD_OPTION, f"drop_blocks cannot remove {self.count} blocks", hint="count=1 or more")
        if self.distance not in DISTANCES:
            raise PassError(codes.BAD_OPTION, f"distance={self.distance!r}", hint=f"one of {', '.join(DISTANCES)}")

    @property
    def contract(self) -> Approximate:
        """The change is measured where a repetition was bypassed."""
        return Approximate()

    def watches(self, program: Program, context: PassContext) -> Iterator[tuple[fx.Node, str]]:
        """Tokens of every state between two repetitions."""
        for repeats in find_repeats(program.graph) if self.count is not None else ():
            for block in repeats:
                yield block.carried, _tokens(repeats)
                yield block.result, _tokens(repeats)

    def run(self, program: Program, context: PassContext) -> None:
        """Bypass the repetitions of least influence."""
        if self.count is None:
            return
        length = self.count if self.distance == "angular" else 1
        stacks = stacks_of(program, context)
        spans = [span for repeats in stacks for span in self._spans(context, repeats, length)]
        chosen = sorted(spans, key=lambda span: span.distance)[: self.count // length]
        if stacks and len(chosen) * length < self.count:
            why = f"it has no {self.count} repetitions that can be removed"
            context.skip(stacks[0].repetitions[0].result, why)
            return
        for span in reversed(spans):  # the state before a stretch stays until what reads it has been moved
            if span not in chosen:
                context.skip(span.blocks[0].result, f"its {self.distance} distance {span} is not among the least")
            elif context.edit():
                span.blocks[-1].result.replace_all_uses_with(span.blocks[0].carried)
                for block in span.blocks:
                    note_removed(context, block, f"{self.distance} distance {span}")

    def _spans(self, context: PassContext, repeats: Repeats, length: int) -> Iterator["Span"]:
        """The stretches of neighbours that can be removed, in order."""
        assert context.statistics is not None
        for first in range(len(repeats) - length + 1):
            blocks = repeats.repetitions[first : first + length]
            why = next(filter(None, map(read_outside, blocks)), "")
            before, after = (
                context.statistics(node, _tokens(repeats)) for node in (blocks[0].carried, blocks[-1].result)
            )
            if why or before is None or after is None:
                context.skip(blocks[0].result, why or "no calibration input reaches it")
            else:
                yield Span(blocks, distance(before, after, self.distance))


@dataclass(frozen=True)
class Span:
    """Neighbouring repetitions, and how far the state behind them is from the one before, from 0 on."""

    blocks: Sequence[Repetition]
    distance: float

    def __str__(self) -> str:
        return f"{self.distance:.3g}"


def distance(before: Tensor, after: Tensor, kind: str = "cosine") -> float:
    """The mean distance of corresponding rows: `cosine` is 1 - cos, `angular` arccos(cos) / pi.

    Both follow from the length of the difference of unit vectors, which is 0 for equal rows and exact for close ones,
    where 1 - cos would cancel. A row of zeros is at a cosine distance of 0.5 from all others, as in ShortGPT's code.

    Args:
        before: `[tokens, features]`, floating.
        after: the same shape.
        kind: one of `DISTANCES`.
    """
    chord = torch.linalg.vector_norm(_unit(after) - _unit(before), dim=-1)
    if kind == "cosine":
        return float((chord.square() / 2).mean())
    return float((2 * torch.asin((chord / 2).clamp(max=1.0)) / math.pi).mean())


def _unit(rows: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(rows.double(), dim=-1, keepdim=True)
    return rows.double() / torch.where(length > 0, length, torch.ones_like(length))


def stacks_of(program: Program, context: PassContext) -> list[Repeats]:
    """The repeated blocks of a program of one entry; one of several, or without any, is skipped with its reason."""
    stacks = find_repeats(program.graph)
    if not stacks:
        why = "no repeated block was found: no neighbours compute the same with weights of equal shapes"
        context.skip("the program", why)
    if stacks and len(program.entries) > 1:
        why = "every entry of a program would have to lose the same blocks, and there are several"
        context.skip(stacks[0].repetitions[0].result, why)
        return []
    return stacks


def read_outside(block: Repetition) -> str:
    """Why a repetition cannot be left out: something inside it is read elsewhere; empty when nothing is.

    Its result may be: who reads it, reads the state before it instead.
    """
    inside = set(block.nodes)
    for node in block.nodes[:-1]:
        if any(user not in inside for user in node.users):
            return f"{node.name} is also read outside its block"
    return ""


def note_removed(context: PassContext, block: Repetition, why: str) -> None:
    """Say that a repetition is gone, and what it was chosen by."""
    where = location(block.result)
    what = f"{where.module or block.result.name} was removed"
    context.diagnostics.remark(codes.BLOCKS_REMOVED, what, where=where, why=why)


def _tokens(repeats: Repeats) -> str:
    """What is observed of the states: rows along the axis that products read; the last where none does at once."""
    state = repeats.repetitions[0].carried
    axes = (product_axes(reader) for reader in state.users)
    return f"rows:{next((found[0] for found in axes if found is not None), -1)}"
