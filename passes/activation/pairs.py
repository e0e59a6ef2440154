"""Pairs of quantize and decode that need not be there, and pairs that can move out of the way."""

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from sparc.contract import Exact
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.operators import find_spec, is_decode, is_quantize
from sparc.pass_base import Pass, PassContext, Stage
from sparc.passes.activation.insert import is_activation_decode
from sparc.passes.activation.regions import is_carrier
from sparc.program import Entry, Program, is_weight


@dataclass(frozen=True)
class CancelPairs(Pass):
    """quantize(decode([c, p]), [p]) => c, and carrier(decode([c, p])) => decode([carrier(c), p]).

    Both are exact: codes of 8 bits survive decoding and quantizing with the same scale and zero point in float32, and a
    carrier only moves or selects elements, in an order that the codes have as well.
    """

    name: ClassVar[str] = "cancel_pairs"
    stage: ClassVar[Stage] = Stage.ACTIVATION

    @property
    def contract(self) -> Exact:
        """Nothing changes."""
        return Exact()

    def run(self, program: Program, context: PassContext) -> None:
        """Move every static decode down as far as it goes, and cancel it where it meets its own quantize."""
        for entry in program.entries.values():
            for node in list(entry.graph.nodes):
                if is_decode(node) and _carriers(node) and context.edit():
                    sink_decode(entry, node)
            for node in list(entry.graph.nodes):
                if is_quantize(node) and _is_redundant(node) and context.edit():
                    for part in list(node.users):
                        part.replace_all_uses_with(node.args[0].args[0][0])


def sink_decode(entry: Entry, decoded: fx.Node) -> None:
    """Move a static decode below the carriers that read it: `carrier(decode(c)) => decode(carrier(c))`."""
    codes, *params = decoded.args[0]  # type: ignore[misc, str-unpack]
    for carrier in _carriers(decoded):
        moved = entry.call(carrier.target, codes, *carrier.args[1:], before=carrier, like=carrier, **carrier.kwargs)
        results = [(carrier, moved)]
        if isinstance(carrier.meta["val"], (list, tuple)):
            results = [(part, entry.call(operator.getitem, moved, part.args[1], before=part)) for part in carrier.users]
        for old, new in results:
            below = entry.call(decoded.target, [new, *params], *decoded.args[1:], before=old, like=old)
            old.replace_all_uses_with(below)
            sink_decode(entry, below)


def _carriers(decoded: fx.Node) -> list[fx.Node]:
    """The carriers that read a static decode of an activation, each once and as what it carries."""
    if not decoded.users or not is_activation_decode(decoded) or not _is_static(decoded):
        return []
    users = [user for user in decoded.users if is_carrier(user) and user.users]
    return [user for user in users if user.args[0] is decoded and decoded not in fx_nodes(user.args[1:], user.kwargs)]


def fx_nodes(*values: Any) -> list[fx.Node]:
    """Every node inside nested arguments."""
    found: list[fx.Node] = []
    fx.node.map_arg(values, found.append)
    return found


def _is_static(decoded: fx.Node) -> bool:
    params = decoded.args[0][1:]  # type: ignore[index]
    return all(is_weight(param) and param.meta["val"].ndim == 0 for param in params)  # type: ignore[union-attr]


def _is_redundant(node: fx.Node) -> bool:
    """Whether a static quantize only undoes a decode with the same parameters."""
    x, params, spec = node.args
    if not params or not is_decode(x) or not isinstance(x, fx.Node) or not is_activation_decode(x):
        return False
    grid = find_spec(str(spec))
    exact = isinstance(grid, IntGrid) and grid.zero == "integer" and x.meta["val"].dtype == torch.float32
    same = list(x.args[0][1:]) == list(params) and x.args[1] == spec  # type: ignore[index, arg-type]
    return exact and same
