"""The emission plan of one entry: which nodes one operator replaces, and which become part of another."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import fx

from sparc.program import Entry, Program

if TYPE_CHECKING:
    from sparc.codegen.onnx.emit import Emitter, Result
    from sparc.codegen.onnx.fuse.rotary import Rotary
    from sparc.codegen.onnx.target import OnnxTarget

Emit = Callable[["Emitter"], "Result"]


class Plan:
    """Fused translations by node; as a rule of the emitter it answers None for every other node.

    `lazy` are the nodes that a fused operator takes in: they are emitted only if something else reads them.
    `rotations` are the rotary embeddings by their results.
    """

    def __init__(self, program: Program, entry: Entry, target: "OnnxTarget") -> None:
        """Args: the program, one of its entries, and the flavour and opset that decide what may be used."""
        self.program, self.entry, self.target = program, entry, target
        self.inputs = dict(zip(entry.signature.input_names, entry.placeholders, strict=True))
        self.lazy: set[fx.Node] = set()
        self.rotations: dict[fx.Node, Rotary] = {}
        self._emit: dict[fx.Node, Emit] = {}
        self._rows: dict[tuple[fx.Node, int], Emit] = {}

    def __call__(self, e: "Emitter", node: fx.Node) -> "Result":
        """The node's fused translation."""
        emit = self._emit.get(node)
        return None if emit is None else emit(e)

    def put(self, node: fx.Node, emit: Emit) -> None:
        """Translate a node by `emit`."""
        self._emit[node] = emit

    def put_rows(self, node: fx.Node, axis: int, emit: Emit) -> None:
        """Note that `emit` gives a 4-D node, whose heads lie on `axis`, as rows `[batch, length, heads * size]`."""
        self._rows[node, axis] = emit

    def rows(self, node: fx.Node, axis: int) -> Emit | None:
        """What `put_rows` noted."""
        return self._rows.get((node, axis))

    def absorb(self, *nodes: fx.Node) -> None:
        """Emit nodes only on demand."""
        self.lazy.update(nodes)


def plan_fusions(program: Program, entry: Entry, target: "OnnxTarget") -> Plan:
    """The plan of an entry.

    Args:
        program: not edited.
        entry: the entry to plan.
        target: standard attention and rotary embeddings need opset 23.
    """
    from sparc.codegen.onnx.fuse.attention import plan_attention
    from sparc.codegen.onnx.fuse.experts import plan_experts
    from sparc.codegen.onnx.fuse.residual import plan_residual
    from sparc.codegen.onnx.fuse.rotary import plan_rotary

    plan = Plan(program, entry, target)
    for node in entry.graph.nodes:
        if node.op == "call_function":
            plan_rotary(plan, node)
            plan_attention(plan, node)
            plan_residual(plan, node)
            plan_experts(plan, node)
    return plan
