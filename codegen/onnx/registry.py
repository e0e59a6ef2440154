"""What our table lacks: torch.onnx's own translations, called one node at a time, else torch's decompositions."""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import onnxscript
import torch
from onnxscript import evaluator
from torch import Tensor, fx
from torch.onnx._internal.exporter import _building, _dispatching, _registration, _tensors

from sparc import codes
from sparc.codegen.onnx.decompose import decomposition, emit_decomposed
from sparc.codegen.onnx.emit import Emitter, Result
from sparc.codegen.onnx.types import onnx_type
from sparc.diag import LoweringError
from sparc.program import location

_OPSET = 18  # what the registry's translations are written in


@functools.cache
def _registry() -> _registration.ONNXRegistry:
    with _quiet():
        return _registration.ONNXRegistry.from_torchlib(_OPSET)


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def fallback(e: Emitter, node: fx.Node) -> Result:
    """A node's translation from torch.onnx's registry, else the translation of its decomposition.

    Raises:
        LoweringError: SPARC401 when there is neither.
    """
    function = _find(node)
    why = "no translation is registered"
    if function is not None:
        try:
            return _Trace(e, node).run(function)
        except LoweringError:
            raise
        except Exception as error:  # translations of the registry raise whatever they like
            why = f"torch.onnx's translation failed: {_innermost(error)}"
    graph = decomposition(e, node)
    if graph is not None:
        return emit_decomposed(e, node, graph)
    raise LoweringError(
        codes.NO_TRANSLATION, f"operator {node.target} has no translation to ONNX", where=location(node), why=why
    )


def _find(node: fx.Node) -> Callable[..., Any] | None:
    if not _registry().get_decomps(node.target):  # type: ignore[arg-type]
        return None
    return _dispatching.dispatch(node, _registry())[0]


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"


class _Trace:
    """One call of a registry translation, on stand-ins for our values."""

    def __init__(self, e: Emitter, node: fx.Node) -> None:
        self._e, self._node = e, node
        self._opset = onnxscript.values.Opset("", _OPSET)
        self._real: dict[ir.Value, ir.Value] = {}

    def run(self, function: Callable[..., Any]) -> Result:
        args = [self._argument(arg) for arg in self._node.args]
        kwargs = {name: self._argument(arg) for name, arg in self._node.kwargs.items()}
        if "dtype" in kwargs and kwargs["dtype"] is None:
            kwargs["dtype"] = -1
        recorder = _building.OpRecorder(self._opset, {})  # type: ignore[abstract]
        with _quiet(), evaluator.default_as(recorder):
            result = function(*args, **kwargs)
        nodes = _inlined(recorder, list(self._real), result)
        for made in nodes:
            self._adopt(made)
        if isinstance(result, Sequence):
            return [self._real.get(value, value) for value in result]
        return self._real.get(result, result)

    def _argument(self, arg: Any) -> Any:
        if isinstance(arg, (list, tuple)):
            return [self._argument(item) for item in arg]
        if isinstance(arg, torch.dtype):
            return int(onnx_type(arg))
        if isinstance(arg, (torch.device, torch.layout, torch.memory_format)):
            return str(arg)
        if not isinstance(arg, fx.Node):
            return arg
        found = self._e.result(arg)
        if isinstance(found, (list, tuple)):
            return [self._stand_in(value, fake) for value, fake in zip(found, arg.meta["val"], strict=True)]
        if isinstance(found, int):
            return found
        return self._stand_in(self._e.value(arg), arg.meta["val"])

    def _stand_in(self, value: ir.Value, fake: Any) -> ir.Value:
        made = _tensors.SymbolicTensor(self._opset, name=value.name)
        if isinstance(fake, Tensor):
            made.type = ir.TensorType(onnx_type(fake.dtype))
            pair = [2] if fake.dtype.is_complex else []
            made.shape = ir.Shape([*[size if isinstance(size, int) else None for size in fake.shape], *pair])
        else:
            made.type, made.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([])
        self._real[made] = value
        return made

    def _adopt(self, node: ir.Node) -> None:
        """Move a traced node into our graph: constants become our constants, operators go to our opset."""
        if node.op_type == "Constant" and node.domain == "":
            tensor = _constant(node)
            self._real[node.outputs[0]] = self._e.builder.constant(tensor.numpy(), tensor.dtype)
            return
        for index, value in enumerate(node.inputs):
            if value in self._real:
                node.replace_input_with(index, self._real[value])
        node.version = None
        upgrade = _UPGRADES.get(node.op_type) if node.domain == "" else None
        if upgrade is not None:
            upgrade(self._e, node)
        self._e.builder.append(node)


def _constant(node: ir.Node) -> ir.TensorProtocol:
    attribute = next(iter(node.attributes.values()))
    if attribute.name == "value":
        return attribute.as_tensor()
    dtype = {"value_int": ir.DataType.INT64, "value_ints": ir.DataType.INT64}.get(attribute.name, ir.DataType.FLOAT)
    return ir.tensor(attribute.value, dtype=dtype)


def _inlined(recorder: _building.OpRecorder, inputs: Sequence[ir.Value], result: Any) -> list[ir.Node]:
    """The traced nodes, calls of model-local functions replaced by their bodies."""
    if not recorder.functions:
        return list(recorder.nodes)
    functions = {}
    for identifier, function in recorder.functions.items():
        made = (
            function
            if isinstance(function, ir.Function)
            else ir.serde.deserialize_function(function.to_function_proto())
        )
        functions[identifier] = made
    outputs = list(result) if isinstance(result, Sequence) else [result]
    graph = ir.Graph(inputs, outputs, nodes=recorder.nodes, opset_imports={"": _OPSET})
    model = ir.Model(graph, ir_version=10, functions=list(functions.values()))
    ir.passes.common.InlinePass()(model)
    nodes = list(graph)
    graph.remove(nodes)
    return nodes


def _upgrade_grid_sample(e: Emitter, node: ir.Node) -> None:
    """Opset 20 renamed the interpolation modes."""
    if e.target.opset >= 20 and "mode" in node.attributes:
        mode = node.attributes["mode"].as_string()
        node.attributes["mode"] = ir.AttrString("mode", {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode))


def _upgrade_fourier(e: Emitter, node: ir.Node) -> None:
    """Opset 20 made the axis an input."""
    if e.target.opset >= 20 and "axis" in node.attributes:
        axis = e.const(node.attributes.pop("axis").as_int(), torch.int64)
        node.resize_inputs(3)
        node.replace_input_with(2, axis)


_UPGRADES: dict[str, Callable[[Emitter, ir.Node], None]] = {"GridSample": _upgrade_grid_sample, "DFT": _upgrade_fourier}
