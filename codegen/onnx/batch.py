"""Batches that ONNX Runtime's attention refuses, whose sequences are run one after the other.

`GroupQueryAttention` takes several new tokens of several sequences only where nothing is cached, and rotates them
only where they have the same places.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx
import torch
from torch import Tensor

from sparc.cache import MASK, POSITIONS, TOKENS

Run = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
_OPERATOR = "GroupQueryAttention"


@dataclass(frozen=True)
class RowByRow:
    """How to run the sequences of a batch one after the other.

    Args:
        rotates: whether the operator rotates queries and keys itself.
        batched: the inputs and outputs that have the batch on their first axis.
    """

    rotates: bool
    batched: frozenset[str]

    def needed(self, given: Mapping[str, Tensor]) -> bool:
        """Whether a call, by the names of its inputs, is one that the operator refuses."""
        batch, new = given[TOKENS].shape[:2]
        if batch == 1 or new == 1:
            return False
        places = given.get(POSITIONS)
        shared = places is not None and bool((places == places[:1]).all())
        return bool(new < given[MASK].shape[1]) or (self.rotates and not shared)

    def row(self, given: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
        """The inputs of one sequence."""
        return {name: each[row : row + 1] if name in self.batched else each for name, each in given.items()}

    def join(self, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The outputs of all sequences."""
        first = parts[0]
        return {
            name: torch.cat([part[name] for part in parts]) if name in self.batched else first[name] for name in first
        }


def row_by_row(model: onnx.ModelProto) -> RowByRow | None:
    """How to run a model's batches in parts; None where its operators take any batch."""
    inputs = {value.name: _first_axis(value) for value in model.graph.input}
    fused = [node for node in model.graph.node if node.op_type == _OPERATOR and set(node.input) & set(inputs)]
    if not fused or TOKENS not in inputs or MASK not in inputs:
        return None
    axes = {**inputs, **{value.name: _first_axis(value) for value in model.graph.output}}
    rotates = any(attribute.name == "do_rotary" for node in fused for attribute in node.attribute)
    return RowByRow(rotates, frozenset(name for name, axis in axes.items() if axis == inputs[TOKENS]))


def _first_axis(value: onnx.ValueInfoProto) -> str:
    dims = value.type.tensor_type.shape.dim
    return str(dims[0].dim_param) if dims else ""
