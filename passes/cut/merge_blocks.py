"""Fewer layers: neighbouring repetitions of a block become one that takes over what each of them adds."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from sparc import codes
from sparc.analysis.features import is_norm
from sparc.analysis.repeats import Repetition
from sparc.contract import Approximate
from sparc.diag import PassError
from sparc.encoding.operators import is_decode
from sparc.execute import Values
from sparc.pass_base import Pass, PassContext, Stage, by_name
from sparc.passes.cut.blocks import note_removed, read_outside, stacks_of
from sparc.program import Program, weight_nodes
from sparc.verify import cosine

MODES = ("differences", "replace_with_last")


@dataclass(frozen=True)
class MergeBlocks(Pass):
    """theta_l + sum_k (theta_{l+k} - theta_l), k = 1 .. size - 1, instead of the repetitions l .. l + size - 1.

    LaCo (Yang et al. 2024, section 3): from the last repetitions of a block on, `size` neighbours are merged where the
    last hidden states stay similar: the mean over calibration inputs of cos(H, H') of the flattened states of the
    program as it came and with the merger must be above the threshold. Else the next ones are those one further up.

    Args:
        size: how many repetitions become one.
        interval: how far to move up after a merger.
        threshold: the least similarity. The defaults of all three are the paper's for a model of 40 layers.
        mode: `differences`, or `replace_with_last`, which keeps the weights of the last repetition, as the paper's
            published notebook does.

    Raises:
        PassError: SPARC209 when an option is out of range.
    """

    name: ClassVar[str] = "merge_blocks"
    stage: ClassVar[Stage] = Stage.CUT
    needs: ClassVar[frozenset[str]] = frozenset({"batches"})
    scope: ClassVar[str] = "program"

    size: int = 7
    interval: int = 1
    threshold: float = 0.45
    mode: str = "differences"

    def __post_init__(self) -> None:
        super().__post_init__()
        bad = {
            "size": self.size < 2,
            "interval": self.interval < 1,
            "threshold": not -1 <= self.threshold <= 1,
            "mode": self.mode not in MODES,
        }
        for name in (name for name, wrong in bad.items() if wrong):
            raise PassError(
                codes.BAD_OPTION,
                f"merge_blocks cannot work with {name}={getattr(self, name)!r}",
                hint=f"size from 2, interval from 1, threshold from -1 to 1, mode {' or '.join(MODES)}",
            )

    @property
    def contract(self) -> Approximate:
        """The change is measured at the weights that changed and where repetitions were bypassed."""
        return Approximate()

    def watches(self, program: Program, context: PassContext) -> Iterator[tuple[fx.Node, str]]:
        """The inputs, to run trials on."""
        return ((node, "batches") for node in program.main.placeholders)

    def run(self, program: Program, context: PassContext) -> None:
        """Merge every stack of repetitions, from its end."""
        assert context.statistics is not None
        inputs = [context.statistics(node, "batches") for node in program.main.placeholders]
        for repeats in stacks_of(program, context):
            if any(batches is None for batches in inputs):
                context.skip(repeats.repetitions[0].result, "no calibration input reaches it")
            else:
                self._merge_stack(program, context, list(repeats), [list(batch) for batch in zip(*inputs, strict=True)])

    def _merge_stack(
        self, program: Program, context: PassContext, left: list[Repetition], batches: list[list[Tensor]]
    ) -> None:
        """The paper's algorithm 1 on one stack."""
        expected = last_states(program, left[-1], batches)
        first = len(left) - self.size
        if first < 0:
            context.skip(left[0].result, f"there are fewer than {self.size} repetitions")
        while first >= 0:
            chosen = left[first : first + self.size]
            kept = [*left[: first + 1], *left[first + self.size :]]
            why = _obstacle(program, chosen)
            if not why:
                trial = program.clone()
                merge(trial, chosen, self.mode)
                similarity = _similarity(expected, last_states(trial, kept[-1], batches))
                if not similarity > self.threshold:
                    why = f"with it merged, similarity {similarity:.3g} is not above {self.threshold:g}"
            if why:
                context.skip(chosen[0].result, why)
                first -= 1
            elif context.edit():
                merge(program, chosen, self.mode)
                for block in chosen[1:]:
                    note_removed(context, block, f"merged into {chosen[0].result.name}, similarity {similarity:.3g}")
                left = kept
                first = min(first - self.interval, len(left) - self.size)
            else:
                return


def merge(program: Program, blocks: Sequence[Repetition], mode: str = "differences") -> None:
    """Let the first repetition stand for all of them, in place.

    Args:
        program: the program of the repetitions, or a clone of it.
        blocks: neighbours.
        mode: one of `MODES`. Computed in float64 and rounded once.
    """
    for names in zip(*(block.weights for block in blocks), strict=True):
        first, *others = (program.weights[name] for name in names)
        if len(set(names)) > 1 and first.is_floating_point():
            value = first.double()
            if mode == "differences":
                value = value + sum((other.double() - first.double() for other in others), torch.zeros_like(value))
            else:
                value = others[-1].double()
            program.set_weight(names[0], value.to(first.dtype))
    nodes = by_name(program.graph.nodes)
    for block in blocks[1:]:
        nodes[block.result.name].replace_all_uses_with(nodes[blocks[0].result.name])
    program.sweep()


def last_states(program: Program, block: Repetition, batches: Sequence[list[Tensor]]) -> list[Tensor]:
    """What the last repetition of a stack hands on, behind the norm if nothing else reads it: one tensor a batch.

    Args:
        program: the program of the repetition, or a clone of it.
        block: the last repetition.
        batches: flat inputs.
    """
    state = by_name(program.graph.nodes)[block.result.name]
    readers = list(state.users)
    wanted = readers[0] if len(readers) == 1 and is_norm(readers[0]) else state
    found: list[Tensor] = []

    def see(node: fx.Node, value: Any, _: Values) -> None:
        if node is wanted:
            found.append(value)

    for batch in batches:
        program.run_flat(batch, watch=see)
    return found


def _similarity(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    return sum(map(cosine, expected, found)) / len(expected)


def _obstacle(program: Program, blocks: Sequence[Repetition]) -> str:
    """Why repetitions cannot become one; empty when they can."""
    if any(is_decode(node) for block in blocks for node in block.nodes):
        return "its weights are encoded already"
    if why := next(filter(None, map(read_outside, blocks[1:])), ""):
        return why
    own = set(blocks[0].nodes)
    for names in zip(*(block.weights for block in blocks), strict=True):
        first, *others = (program.weights[name] for name in names)
        if len(set(names)) == 1:
            continue
        if not first.is_floating_point():
            if not all(torch.equal(first, other) for other in others):
                return f"the constant {names[0]} differs between repetitions"
        elif any(user not in own for node in weight_nodes(program.graph, names[0]) for user in node.users):
            return f"{names[0]} is also read outside its block"
    return ""
