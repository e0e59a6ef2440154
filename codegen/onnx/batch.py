"""A batch that ONNX Runtime's attention refuses: several new tokens of several sequences behind cached ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx
import torch
from torch import Tensor

from sparc.cache import MASK, TOKENS

Run = Callable[[Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class RowByRow:
    """How to run the sequences of a batch one after the other.

    Args:
        tokens: the place of the input of new tokens, `[batch, new, ...]`.
        mask: the place of the input over all tokens, `[batch, past + new]`.
        inputs, outputs: whether each has the batch on its first axis.
    """

    tokens: int
    mask: int
    inputs: tuple[bool, ...]
    outputs: tuple[bool, ...]

    def needed(self, inputs: Sequence[Tensor]) -> bool:
        """Whether a call is one that `GroupQueryAttention` refuses."""
        batch, new = inputs[self.tokens].shape[:2]
        return batch > 1 and 1 < new < inputs[self.mask].shape[1]

    def __call__(self, run: Run, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs of `run`, called for one sequence at a time."""
        batch = inputs[self.tokens].shape[0]
        calls = []
        for row in range(batch):
            given = zip(inputs, self.inputs, strict=True)
            calls.append(run([each[row : row + 1] if batched else each for each, batched in given]))
        rows = zip(zip(*calls, strict=True), self.outputs, strict=True)
        return [torch.cat(each) if batched else each[0] for each, batched in rows]


def row_by_row(model: onnx.ModelProto) -> RowByRow | None:
    """How to run a model's batches in parts; None where its operators take any batch."""
    names = [value.name for value in model.graph.input]
    if not any(
        node.op_type == "GroupQueryAttention" and len(node.input) > 3 and node.input[3] for node in model.graph.node
    ):
        return None
    if TOKENS not in names or MASK not in names:
        return None
    batch = _first_axis(model.graph.input[names.index(TOKENS)])
    inputs = tuple(_first_axis(value) == batch for value in model.graph.input)
    outputs = tuple(_first_axis(value) == batch for value in model.graph.output)
    return RowByRow(names.index(TOKENS), names.index(MASK), inputs, outputs)


def _first_axis(value: onnx.ValueInfoProto) -> str:
    dims = value.type.tensor_type.shape.dim
    return str(dims[0].dim_param) if dims else ""
