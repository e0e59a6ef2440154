"""A soft prompt in front of a causal decoder becomes constant keys and values."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch
from torch import fx

from sparc.analysis.features import operator_name, packet
from sparc.analysis.values import shape_of, size_expression
from sparc.contract import Bounded, Contract
from sparc.execute import execute
from sparc.pass_base import Pass, PassContext, Stage
from sparc.passes.fold.prompt_attention import PromptedSequence
from sparc.passes.fold.unbatched import Unbatched, float_weights, is_learned
from sparc.pattern import normalized_arguments
from sparc.program import Entry, Program, is_weight, location
from sparc.region import cone, region


@dataclass(frozen=True)
class FoldPrompt(Pass):
    """decoder(cat([P, x], 1)) => decoder of x alone, whose attention is attention(q, cat([K_P, k]), cat([V_P, v]),
    mask) with constants K_P and V_P, for a prompt P that is the same for every input (Lester et al., 2021).

    In a causal decoder the hidden states at the prompt depend on the prompt alone. The places keep their positions: the
    query at place i of x sees the key at place j of the whole where j <= i + |P|. Where something reads the whole
    sequence (the program's output may), its constant front is put before it again.

    The keys and values take more bytes than the prompt, but no row of the prompt is computed any more.

    Args:
        limit: the part of the program's bytes by which it may grow.
    """

    limit: float = 0.1
    name: ClassVar[str] = "fold_prompt"
    stage: ClassVar[Stage] = Stage.FOLD
    scope: ClassVar[str] = "program"

    @property
    def contract(self) -> Contract:
        """Rounding only: the constants are computed in float64 and rounded once."""
        return Bounded(1e-4)

    def run(self, program: Program, context: PassContext) -> None:
        """Fold each prompt of each entry."""
        for entry in program.entries.values():
            done: set[tuple[int, sympy.Expr]] = set()
            while found := next((each for each in _prompts(entry) if _key(*each[1:]) not in done), None):
                prompt, count, total = found
                done.add(_key(count, total))
                self._fold(program, context, PromptedSequence(program, entry, count, total), prompt)
                program.sweep()

    def _fold(self, program: Program, context: PassContext, sequence: PromptedSequence, prompt: fx.Node) -> None:
        sequence.divide()
        for node, why in sequence.refused.items():
            context.skip(node, why)
        if not sequence.attentions:
            if not sequence.refused and sequence.stopped is not None:
                context.skip(prompt, f"no attention is reached before {operator_name(sequence.stopped)}")
            return
        sequence.join()
        new = [node for node in sequence.stored if not is_weight(node)]
        size = sum(node.meta["val"].numel() * node.meta["val"].element_size() for node in new)
        if size > self.limit * program.weights.nbytes:
            why = f"its keys and values would take {size} bytes, more than {self.limit:g} of the program's"
            context.skip(prompt, why)
        elif context.edit():
            joined: Any = prompt.args[0]
            like = next(each for part in filter(is_learned, joined) for each in float_weights(part))
            sequence.connect()
            _store(program, context, sequence, new, like)


def _prompts(entry: Entry) -> Iterator[tuple[fx.Node, int, Any]]:
    """Each `cat([P, ...])` of a constant that some weight holds, with its places: those of P and all."""
    constants = Unbatched(entry)
    for node in list(entry.graph.nodes):
        if packet(node) is not torch.ops.aten.cat:
            continue
        tensors: Any = node.args[0]
        axis = normalized_arguments(node)["dim"] % len(shape_of(node))
        leading = constants.leading(tensors, axis) or []
        if any(is_learned(each) for each in leading):
            yield node, sum(shape_of(each)[axis] for each in leading), shape_of(node)[axis]


def _key(count: int, total: Any) -> tuple[int, sympy.Expr]:
    return count, size_expression(total)


def _store(
    program: Program, context: PassContext, sequence: PromptedSequence, new: list[fx.Node], like: fx.Node
) -> None:
    """Store what the rest reads of the front."""
    constant = set(cone(new))
    known = {**program.weights, **context.wide}
    for node, value in zip(new, execute(region(new, constant, ()), known, (), wide=True), strict=True):
        module = location(node).module
        name = f"{module}.{sequence.stored[node]}" if module else sequence.stored[node]
        stored = value.to(node.meta["val"].dtype).contiguous()
        weight = program.add_weight(name, stored, like=like)
        if stored.is_floating_point():
            context.wide[str(weight.target)] = value
        for user in list(node.users):
            if user not in constant:
                user.replace_input_with(node, weight)
