"""The builder: ONNX nodes and small constants, each distinct computation once, under deterministic names."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

_RANDOM = (
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "Bernoulli",
    "Multinomial",
    "Dropout",
)


class Builder:
    """Collects the nodes of one graph.

    A node that equals an earlier one (operator, inputs, attributes) is that node: translations need not share by hand.
    `scope` is the module path that names new values: `encoder.layer.0/MatMul`.
    """

    def __init__(self, reserved: Iterable[str] = ()) -> None:
        """Args: names that values must not take."""
        self.scope = ""
        self.nodes: list[ir.Node] = []
        self._taken: dict[str, int] = dict.fromkeys(reserved, 0)
        self._seen: dict[Any, Sequence[ir.Value]] = {}
        self._constants: dict[Any, ir.Value] = {}
        self._arrays: dict[ir.Value, np.ndarray] = {}

    def name(self, wish: str) -> str:
        """The wished name, with a number when it is taken."""
        if wish not in self._taken:
            self._taken[wish] = 0
            return wish
        while True:
            self._taken[wish] += 1
            name = f"{wish}_{self._taken[wish]}"
            if name not in self._taken:
                self._taken[name] = 0
                return name

    def node(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, Any],
        outputs: int = 1,
        domain: str = "",
    ) -> Sequence[ir.Value]:
        """The outputs of a node: a new one, or an equal earlier one's."""
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        attributes = {name: value for name, value in attributes.items() if value is not None}
        plain = tuple(sorted((name, _hashable(value)) for name, value in attributes.items()))
        key = (domain, operator, tuple(map(id, inputs)), plain, outputs)
        if key in self._seen and operator not in _RANDOM:
            return self._seen[key]
        made = ir.node(operator, inputs, attributes, domain=domain, num_outputs=outputs)
        self.append(made)
        self._seen[key] = made.outputs
        return made.outputs

    def branch(self, make: Callable[[], ir.Value | None]) -> ir.Graph | None:
        """What `make` computes, if it does, as a graph of its own, which may read every value of this one.

        Nothing outside shares its nodes; what it makes must not be a size, which would be remembered.
        """
        nodes, seen = self.nodes, self._seen
        self.nodes, self._seen = [], dict(seen)
        try:
            result = make()
            return None if result is None else ir.Graph([], [result], nodes=self.nodes, name=self.name("branch"))
        finally:
            self.nodes, self._seen = nodes, seen

    def append(self, node: ir.Node) -> None:
        """Add a node made elsewhere, naming it and its outputs."""
        node.name = self.name(f"{self.scope}/{node.op_type}" if self.scope else node.op_type)
        for index, value in enumerate(node.outputs):
            value.name = node.name if index == 0 else self.name(f"{node.name}:{index}")
        self.nodes.append(node)

    def constant(self, value: Any, dtype: ir.DataType) -> ir.Value:
        """A small constant kept inside the model file; equal ones are one."""
        array = _array(value, dtype)
        key = (dtype, array.shape, array.tobytes())
        if key not in self._constants:
            name = self.name(_constant_name(array, dtype))
            tensor = ir.Tensor(array, dtype=dtype, name=name)
            made = ir.Value(name=name, const_value=tensor, type=ir.TensorType(dtype), shape=ir.Shape(array.shape))
            self._constants[key] = made
            self._arrays[made] = array
        return self._constants[key]

    def array(self, value: ir.Value | None) -> np.ndarray | None:
        """The constant's array, if the value is a small constant."""
        return self._arrays.get(value) if value is not None else None

    def finish(self, outputs: Sequence[ir.Value]) -> list[ir.Node]:
        """The nodes that the outputs need, in order."""
        needed = set(outputs)
        kept = []
        for node in reversed(self.nodes):
            if any(value in needed for value in node.outputs):
                kept.append(node)
                needed.update(value for value in node.inputs if value is not None)
                for attribute in node.attributes.values():
                    if attribute.type == ir.AttributeType.GRAPH:
                        needed.update(_captured(attribute.as_graph()))
        return kept[::-1]


def _captured(graph: ir.Graph) -> set[ir.Value]:
    """Every value that a subgraph reads; its own ones do no harm."""
    used = set(graph.outputs)
    for node in graph.all_nodes():
        used.update(value for value in node.inputs if value is not None)
    return used


def _array(value: Any, dtype: ir.DataType) -> np.ndarray:
    numpy_type = dtype.numpy()
    return np.array(value, dtype=numpy_type, order="C")


def _hashable(value: Any) -> Any:
    if isinstance(value, ir.TensorProtocol):
        return (value.dtype, tuple(value.shape), value.tobytes())
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _constant_name(array: np.ndarray, dtype: ir.DataType) -> str:
    """`i64[0,-1,12,32]`, `f32(0.5)`: what the constant says, where that is short."""
    short = {"FLOAT": "f32", "INT64": "i64", "INT32": "i32", "DOUBLE": "f64", "FLOAT16": "f16", "BFLOAT16": "bf16"}
    prefix = short.get(dtype.name, dtype.name.lower())
    if array.size > 8:
        return f"{prefix}{list(array.shape)}".replace(" ", "")
    wide = array.astype(np.float32) if array.dtype == ml_dtypes.bfloat16 else array
    text = ",".join(f"{number:.6g}" if number.dtype.kind == "f" else str(number) for number in wide.reshape(-1))
    return f"{prefix}({text})" if array.ndim == 0 else f"{prefix}[{text}]"
