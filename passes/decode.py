"""Decoding: an encoded weight becomes a dense one again, so that something can be merged into it."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from sparc.contract import Contract, Exact
from sparc.encoding.operators import is_decode
from sparc.pass_base import Pass, PassContext, Stage
from sparc.program import Program, is_weight


@dataclass(frozen=True)
class Decode(Pass):
    """decode(parts) => the dense weight, with the name it had before it was encoded.

    The program becomes larger. It is what folds need where a weight is encoded already: decode, merge (an adapter, a
    batch norm), and round again; rounding reports what that costs.
    """

    name: ClassVar[str] = "decode"
    stage: ClassVar[Stage] = Stage.CANONICALIZE

    @property
    def contract(self) -> Contract:
        """Bitwise."""
        return Exact()

    def run(self, program: Program, context: PassContext) -> None:
        """Every decode of stored parts; a weight that several entries read is stored once."""
        made: dict[tuple[object, ...], str] = {}
        for entry, node in program.nodes():
            if not is_decode(node) or not all(is_weight(part) for part in node.args[0]):  # type: ignore[union-attr]
                continue
            parts = [str(part.target) for part in node.args[0]]  # type: ignore[union-attr]
            if not context.edit():
                return
            key = (*parts, str(node.args[1:]))
            if key not in made:
                with torch.no_grad():
                    value = node.target([program.weights[part] for part in parts], *node.args[1:])  # type: ignore[operator]
                origins = program.weights.record(parts[0]).origins
                name = origins[0] if origins else parts[0].removesuffix("_codes")
                made[key] = str(program.add_weight(name, value, like=node.args[0][0]).target)  # type: ignore[index, arg-type]
            node.replace_all_uses_with(program.weight_node(entry, made[key]))
        program.sweep()
