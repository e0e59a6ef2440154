"""Pairs of quantize and decode that need not be there, and pairs that can move out of the way."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from sparc.contract import Exact
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.operators import find_spec, is_decode, is_quantize
from sparc.pass_base import Pass, PassContext, Stage
from sparc.passes.activation.insert import is_activation_decode
from sparc.passes.activation.regions import is_carrier
from sparc.program import Entry, Program


@dataclass(frozen=True)
class CancelPairs(Pass):
    """quantize(carry(decode([c, p])), [p]) => carry(c), where `carry` only moves or selects elements, or is nothing.

    Exact: 8-bit codes survive decoding and quantizing with the same scale and zero point in float32, and what moves
        values
    moves their codes.
    """

    name: ClassVar[str] = "cancel_pairs"
    stage: ClassVar[Stage] = Stage.ACTIVATION

    @property
    def contract(self) -> Exact:
        """Nothing changes."""
        return Exact()

    def run(self, program: Program, context: PassContext) -> None:
        """Cancel every redundant quantize of every entry."""
        for entry in program.entries.values():
            for node in list(entry.graph.nodes):
                carriers = _redundant(node)
                if carriers is not None and context.edit():
                    _cancel(entry, node, carriers)
        program.sweep()


def _redundant(node: fx.Node) -> list[fx.Node] | None:
    """The carriers between a static quantize and the decode that it undoes, in order; None when it undoes none."""
    if not is_quantize(node):
        return None
    x, params, spec = node.args
    carriers: list[fx.Node] = []
    while isinstance(x, fx.Node) and is_carrier(x) and isinstance(x.meta["val"], Tensor):
        carriers.insert(0, x)
        x = x.args[0]
    if not params or not isinstance(x, fx.Node) or not is_decode(x) or not is_activation_decode(x):
        return None
    grid = find_spec(str(spec))
    exact = isinstance(grid, IntGrid) and grid.zero == "integer" and x.meta["val"].dtype == torch.float32
    same = list(x.args[0][1:]) == list(params) and x.args[1] == spec  # type: ignore[index, arg-type]
    movable = not carriers or all(param.meta["val"].ndim == 0 for param in params)  # type: ignore[union-attr]
    return carriers if exact and same and movable else None


def _cancel(entry: Entry, node: fx.Node, carriers: list[fx.Node]) -> None:
    decoded: Any = carriers[0].args[0] if carriers else node.args[0]
    codes = decoded.args[0][0]
    for carrier in carriers:
        codes = entry.call(carrier.target, codes, *carrier.args[1:], before=node, like=carrier, **carrier.kwargs)
    for part in list(node.users):
        part.replace_all_uses_with(codes)
