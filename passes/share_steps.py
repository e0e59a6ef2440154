"""Fewer, larger steps through a block that a model applies several times with the same weights.

A residual block applied N times, `h <- h + f(h)`, is N explicit Euler steps of length 1 along `dh/dt = f(h)`. K steps
of length N / K cover the same time (the view of parameter-shared models as differential equations, arXiv 2310.12818).
The factor of a branch is folded into its last layer, so a larger step costs nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from sparc import codes
from sparc.analysis.repeats import Repeats, Repetition, find_repeats
from sparc.contract import Approximate
from sparc.diag import PassError
from sparc.encoding.operators import is_decode
from sparc.pass_base import Pass, PassContext, Stage
from sparc.pattern import normalized_arguments
from sparc.program import Program, is_weight
from sparc.text import operator_name

aten = torch.ops.aten

_NORMS = {aten.layer_norm.default, aten.rms_norm.default}
_LAYERS = {aten.linear.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, *_NORMS}


@dataclass(frozen=True)
class ShareSteps(Pass):
    """h <- h + f(h), N times => h <- h + (N / K) f(h), K times, for every branch f of a block with shared weights.

    Norms between the branches stay as they are: with `h <- norm(h + f(h))` a larger step is `norm(h + (N / K) f(h))`,
    which turns the direction of `h` further without changing its length.

    Args:
        steps: how many steps to keep, K; a block that is applied no more often is left alone. Without it, nothing is
            done.

    Raises:
        PassError: SPARC209 when `steps` is not positive.
    """

    name: ClassVar[str] = "share_steps"
    stage: ClassVar[Stage] = Stage.CUT
    scope: ClassVar[str] = "program"

    steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is not None and self.steps < 1:
            raise PassError(codes.BAD_OPTION, f"share_steps cannot keep {self.steps} steps", hint="steps=1 or more")

    @property
    def contract(self) -> Approximate:
        """The change is measured where a factor was folded in."""
        return Approximate()

    def run(self, program: Program, context: PassContext) -> None:
        """Enlarge the steps of every shared block."""
        for entry in program.entries.values() if self.steps is not None else ():
            for repeats in reversed(find_repeats(entry.graph)):  # the nodes of what comes before stay
                if not repeats.shared:
                    context.skip(repeats.repetitions[0].result, "its repetitions have weights of their own")
                for shared in reversed(repeats.shared):
                    self._enlarge(program, context, shared)

    def _enlarge(self, program: Program, context: PassContext, shared: Repeats) -> None:
        count = len(shared)
        if self.steps is None or self.steps >= count:
            return
        layers: list[fx.Node] = []
        try:
            for repetition in shared.repetitions[: self.steps]:
                layers += branch_ends(repetition)
            if shared.escape is not None:
                raise NoSteps(f"{shared.escape.name} is also read outside, so the number of steps cannot change")
        except NoSteps as reason:
            context.skip(shared.repetitions[0].result, str(reason))
            return
        if context.edit():
            shared.repetitions[-1].result.replace_all_uses_with(shared.repetitions[self.steps - 1].result)
            program.sweep()
            _scale(program, layers, count / self.steps)


class NoSteps(Exception):
    """Why a block is no chain of residual steps."""


def branch_ends(block: Repetition, *, norms: bool = True) -> list[fx.Node]:
    """The last layer of every residual branch of a block.

    Between the carried value and the result there may be additions of branches that start from the value they are
    added to, and, if `norms` says so, norms.

    Raises:
        NoSteps: when there is anything else, or a branch ends with something that no factor can be folded into.
    """
    ends: list[fx.Node] = []
    node = block.result
    while node is not block.carried:
        if norms and node.target in _NORMS:
            node = node.args[0]  # type: ignore[assignment]
            continue
        terms = list(_terms(node, block))
        stream = next((t for t in terms if all(_depends(other, t) for other in terms if other is not t)), None)
        if len(terms) < 2 or stream is None:
            raise NoSteps(f"its {operator_name(node.target)} is no residual step")
        branches = [term for term in terms if term is not stream]
        for branch in branches:
            _check_scalable(branch)
        ends += branches
        node = stream
    if not ends:
        raise NoSteps("it has no residual branch")
    return ends


def _terms(node: fx.Node, block: Repetition) -> Iterator[fx.Node]:
    """What a tree of additions adds up."""
    operands = [used for used in node.args if isinstance(used, fx.Node)]
    if node.target is not aten.add.Tensor or node.kwargs or len(operands) != 2 or node not in block.nodes:
        yield node
        return
    for term in operands:
        if len(term.users) == 1:
            yield from _terms(term, block)
        else:
            yield term


def _depends(node: fx.Node, on: fx.Node) -> bool:
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current is on:
            return True
        if current not in seen:
            seen.add(current)
            stack += current.all_input_nodes
    return False


def _check_scalable(layer: fx.Node) -> None:
    if layer.target not in _LAYERS:
        raise NoSteps(f"a branch ends with {operator_name(layer.target)}, into which no factor can be folded")
    if len(layer.users) > 1:
        raise NoSteps("the end of a branch is also read elsewhere")
    arguments = normalized_arguments(layer)
    weight, bias = arguments["weight"], arguments.get("bias")
    if is_decode(weight):
        raise NoSteps("the last weight of a branch is encoded already")
    if not is_weight(weight) or not (bias is None or is_weight(bias)):
        raise NoSteps("the last weight of a branch is computed")


def _scale(program: Program, layers: list[fx.Node], factor: float) -> None:
    """Multiply the weights and biases of layers; a weight that others read as well gets a copy for these."""
    readers = set(layers)
    for weight in dict.fromkeys(used for layer in layers for used in layer.all_input_nodes if is_weight(used)):
        name = str(weight.target)
        scaled = program.weights[name].double().mul(factor).to(program.weights[name].dtype)
        users = {
            user for _, node in program.nodes() if node.op == "get_attr" and node.target == name for user in node.users
        }
        if users <= readers:
            program.set_weight(name, scaled)
            continue
        copy = program.add_weight(f"{name}_step", scaled, like=weight)
        for layer in layers:
            layer.replace_input_with(weight, copy)
