"""Half precision, written into the program."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from sparc import codes
from sparc.analysis.values import tensor_type
from sparc.contract import Approximate, Contract
from sparc.diag import PassError
from sparc.encoding.operators import is_decode
from sparc.pass_base import Pass, PassContext, Stage
from sparc.program import Entry, Program, is_weight

aten = torch.ops.aten

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_HEAVY = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "conv", "scaled_dot_product_attention", "einsum")


@dataclass(frozen=True)
class Cast(Pass):
    """Products in half precision: linear, matmul, convolutions and attention read and give half-precision tensors.

    Their weights are stored in half precision and their inputs are cast. Everything else stays in float32: inputs,
    outputs, residual sums, normalisations and their statistics, softmax outside of attention, activations. The casts
    are nodes of the program, so a lowering emits exactly them. A weight that something else reads too, or that is
    encoded, keeps its dtype.

    Args:
        dtype: `float16` or `bfloat16`.
        floor: signal-to-noise ratio in decibels below which a site is restored; None measures only.
    """

    dtype: str = "float16"
    floor: float | None = 20.0
    name: ClassVar[str] = "cast"
    stage: ClassVar[Stage] = Stage.CAST

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            PassError: SPARC209 for another dtype.
        """
        super().__post_init__()
        if self.dtype not in DTYPES:
            raise PassError(codes.BAD_OPTION, f"dtype={self.dtype!r} is not one of {', '.join(DTYPES)}")

    @property
    def contract(self) -> Contract:
        """Rounding to half precision changes numbers."""
        return Approximate("snr_db", self.floor)

    def run(self, program: Program, context: PassContext) -> None:
        """Cast around every product of float32 tensors."""
        half = DTYPES[self.dtype]
        for entry, node in program.nodes():
            if not _is_product(node) or any(_is_half(each) for each in node.all_input_nodes):
                continue
            inputs = [each for each in dict.fromkeys(node.all_input_nodes) if _is_float(each)]
            if not inputs or not _is_float(node):
                continue
            large = next((each for each in inputs if _overflows(program, each, half)), None)
            if large is not None:
                context.skip(node, f"the weight {large.target!r} has values beyond the range of {self.dtype}")
            elif context.edit():
                _cast(program, entry, node, inputs, half)


def _is_product(node: fx.Node) -> bool:
    name = str(getattr(node.target, "_opname", "")) if node.op == "call_function" else ""
    return name in _HEAVY or name.startswith("conv")


def _is_float(node: fx.Node) -> bool:
    kind = tensor_type(node)
    return kind is not None and kind.dtype == torch.float32


def _is_half(node: fx.Node) -> bool:
    kind = tensor_type(node)
    return kind is not None and kind.dtype in DTYPES.values()


def _overflows(program: Program, node: fx.Node, half: torch.dtype) -> bool:
    weight = program.weight(node)
    return weight is not None and bool((weight.abs() > torch.finfo(half).max).any())


def _cast(program: Program, entry: Entry, node: fx.Node, inputs: list[fx.Node], half: torch.dtype) -> None:
    halves = {each: _half_of(program, entry, node, each, half) for each in inputs}
    node.args = fx.node.map_arg(node.args, lambda used: halves.get(used, used))  # type: ignore[assignment]
    node.kwargs = fx.node.map_arg(dict(node.kwargs), lambda used: halves.get(used, used))  # type: ignore[assignment]
    entry.infer(node)
    readers = list(node.users)
    back = entry.call(aten.to.dtype, node, torch.float32, before=node.next, like=node)
    for reader in readers:
        reader.replace_input_with(node, back)


def _half_of(program: Program, entry: Entry, user: fx.Node, node: fx.Node, half: torch.dtype) -> fx.Node:
    """The half-precision version of an input: a weight of its own kind, or a cast."""
    record = program.weights.record(str(node.target)) if is_weight(node) else None
    readers: set[Any] = {each for _, other in program.nodes() if other.op == "get_attr" and other.target == node.target
                         for each in other.users}  # fmt: skip
    if record is not None and record.grid is None and all(_is_product(each) for each in readers):
        known = next((each for each in program.weights if each == f"{node.target}_half"), None)
        tensor: Tensor = program.weights[str(node.target)].to(half)
        return program.weight_node(entry, known) if known else program.add_weight(f"{node.target}_half", tensor, node)
    for other in node.users:
        if other.target is aten.to.dtype and other.args[1] is half and not is_decode(other):
            return other
    with entry.graph.inserting_after(node):
        cast = entry.graph.call_function(aten.to.dtype, (node, half))
    cast.meta.update({key: user.meta[key] for key in ("module", "source", "type", "block") if key in user.meta})
    entry.infer(cast)
    return cast
