"""The epilogue of a site: what its kernel reads beside the product, and the code of the pointwise nodes after it."""

from collections.abc import Sequence
from typing import Any

from torch import fx

from sparc.analysis.values import tensor_type
from sparc.codegen.triton import pointwise, static
from sparc.codegen.triton.problem import Epilogue, EpilogueInput
from sparc.codegen.triton.region import Tail, operand_kind


def find_epilogue(anchors: Sequence[fx.Node], tail: Tail) -> tuple[Epilogue, tuple[fx.Node, ...]]:
    """The epilogue's code, and the nodes it reads."""
    reader = _Reader(anchors[0])
    for index, anchor in enumerate(anchors):
        name = reader.names[anchor] = f"product{f'_{index}' if index else ''}"
        bias = _bias(anchor)
        if bias is not None:
            reader.lines.append(f"{name} = {name} + {reader.read(bias, 'feature')}")
    for node in tail.operands:
        reader.find(node)
    lines = [*reader.lines, *pointwise.lines(tail.nodes, reader.names)]
    epilogue = Epilogue(tuple(reader.inputs), tuple(lines), reader.names[tail.result], _dtype(tail.result))
    return epilogue, tuple(reader.operands)


class _Reader:
    """What an epilogue reads so far, the names of values, and the lines that make them of what is read."""

    def __init__(self, anchor: fx.Node) -> None:
        self.anchor = anchor
        self.names: dict[fx.Node, str] = {}
        self.inputs: list[EpilogueInput] = []
        self.operands: list[fx.Node] = []
        self.lines: list[str] = []

    def read(self, node: fx.Node, kind: Any) -> str:
        """The name of a value that is read."""
        name = f"operand_{len(self.inputs)}"
        self.inputs.append(EpilogueInput(name, _dtype(node), kind))
        self.operands.append(node)
        return f"{name}_value"

    def find(self, node: fx.Node) -> None:
        """Name a value from outside; an activation whose codes are in memory is decoded when they are read."""
        if node in self.names:
            return
        coded = static.match_coded(node)
        if coded is None:
            self.names[node] = self.read(node, operand_kind(node, self.anchor))
            return
        for part in (coded.codes, *coded.parameters):
            self.find(part)
        self.names[node] = f"decoded_{len(self.inputs)}"
        self.lines.append(f"{self.names[node]} = {static.expression(node, self.names.__getitem__)}")


def _bias(anchor: fx.Node) -> fx.Node | None:
    value = anchor.args[2] if len(anchor.args) > 2 else anchor.kwargs.get("bias")
    return value if isinstance(value, fx.Node) else None


def _dtype(node: fx.Node) -> str:
    kind = tensor_type(node)
    assert kind is not None
    return str(kind.dtype).removeprefix("torch.")
