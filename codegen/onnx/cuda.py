"""Which nodes of a model ONNX Runtime's CUDA provider would leave to the CPU, and why."""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import onnx

from sparc.codegen.onnx.check import without_weights

_SMALL = 100  # elements up to which a constant counts as a part of size computations
_ON_CPU: Mapping[str, Sequence[int]] = {
    "Reshape": (1,), "Expand": (1,), "Slice": (1, 2, 3, 4), "Squeeze": (1,), "Unsqueeze": (1,), "Range": (0, 1, 2),
    "Tile": (1,), "TopK": (1,), "Pad": (1, 2, 3), "ConstantOfShape": (0,), "Resize": (1, 2, 3), "Trilu": (1,),
    "OneHot": (1,), "Split": (1,), "CumSum": (1,), "ReduceSum": (1,), "ReduceMean": (1,), "ReduceMax": (1,),
    "ReduceMin": (1,), "ReduceProd": (1,), "ReduceL2": (1,), "ReduceL1": (1,), "ReduceLogSumExp": (1,), "If": (0,),
    "Loop": (0, 1),
}  # fmt: skip
"""Inputs that CUDA kernels read from the CPU's memory."""
_GIVES_CPU = ("Shape", "Size")
"""Operators whose CUDA kernels give results in the CPU's memory."""
_NEVER_FOLDED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")


@dataclass(frozen=True)
class Uncovered:
    """A node that runs on the CPU.

    Args:
        node: its name.
        operator: its operator.
        why: no kernel, no kernel for its types, or size computation.
    """

    node: str
    operator: str
    why: str


@functools.cache
def kernel_table() -> Mapping[str, Mapping[str, Any]]:
    """CUDA kernels by domain and operator, from ONNX Runtime's own list.

    For each operator: `inputs` and `outputs`, the type parameter (or type) of each, the last one repeated where an
    operator takes more; and `kernels`, triples of first opset, last opset (None: open) and the types of each parameter.
    """
    text = resources.files("sparc.codegen.onnx").joinpath("cuda_kernels.json").read_text(encoding="utf-8")
    table: dict[str, Mapping[str, Any]] = json.loads(text)["operators"]
    return table


def uncovered(model: onnx.ModelProto) -> list[Uncovered]:
    """The nodes that a CUDA session leaves to the CPU, in order; constant expressions are folded and do not count."""
    typed = onnx.shape_inference.infer_shapes(without_weights(model))
    types = _types(typed)
    opsets = {each.domain: each.version for each in model.opset_import}
    weights = {tensor.name for tensor in model.graph.initializer}
    small = {tensor.name for tensor in model.graph.initializer if _count(tensor) <= _SMALL}
    small |= {value.name for value in model.graph.input}
    constant, sizes = set(weights), set[str]()
    found = []
    for node in model.graph.node:
        inputs = [name for name in node.input if name]
        if inputs and all(name in constant for name in inputs) and node.op_type not in _NEVER_FOLDED:
            constant.update(node.output)
            small.update(node.output)
            continue
        why = _missing_kernel(node, types, opsets)
        if why is None and _computes_sizes(node, sizes, small, types):
            why = "it computes sizes, which ONNX Runtime keeps on the CPU"
        if why is not None or node.op_type in _GIVES_CPU:
            sizes.update(node.output)
        if why is not None:
            found.append(Uncovered(node.name, node.op_type, why))
    return found


def _count(tensor: onnx.TensorProto) -> int:
    count = 1
    for size in tensor.dims:
        count *= size
    return count


def _types(model: onnx.ModelProto) -> dict[str, str]:
    """Element types by value name, as ONNX Runtime spells them."""
    graph = model.graph
    found = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        found[value.name] = value.type.tensor_type.elem_type
    return {name: onnx.TensorProto.DataType.Name(code).lower() for name, code in found.items() if code}


def _missing_kernel(node: onnx.NodeProto, types: Mapping[str, str], opsets: Mapping[str, int]) -> str | None:
    known = kernel_table().get(node.domain, {}).get(node.op_type)
    if known is None:
        return "the CUDA provider has no kernel for it"
    since = 1 if node.domain else onnx.defs.get_schema(node.op_type, opsets[""], "").since_version
    kernels = [
        types_of for first, last, types_of in known["kernels"] if first <= since and (last is None or since <= last)
    ]
    if not kernels:
        return f"the CUDA provider has no kernel for its version {since}"
    for allowed in kernels:
        wrong = _wrong_types(node, known, allowed, types)
        if wrong is None:
            return None
    return f"the CUDA provider has no kernel for {wrong}"


def _wrong_types(
    node: onnx.NodeProto, known: Mapping[str, Any], allowed: Mapping[str, Sequence[str]], types: Mapping[str, str]
) -> str | None:
    for names, parameters in ((node.input, known["inputs"]), (node.output, known["outputs"])):
        for index, name in enumerate(names):
            if not name or name not in types or not parameters:
                continue
            parameter = parameters[min(index, len(parameters) - 1)]
            accepted = allowed.get(parameter)
            if accepted is not None and types[name] not in accepted:
                return types[name]
    return None


def _computes_sizes(node: onnx.NodeProto, sizes: set[str], small: set[str], types: Mapping[str, str]) -> bool:
    """Whether ONNX Runtime places a node on the CPU because all it reads is there already."""
    inputs = [name for name in node.input if name]
    if not any(name in sizes for name in inputs) or any(types.get(name) in ("float16", "bfloat16") for name in inputs):
        return False
    for index, name in enumerate(node.input):
        if not name or name in small:
            continue
        if name not in sizes or index in _ON_CPU.get(node.op_type, ()):
            return False
    return True
