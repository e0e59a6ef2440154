"""What torch.compile captured, as ATen operators in sparc's dialect: everything that knows TorchDynamo's conventions.

A fragment is traced with dynamo's own symbolic sizes, so whatever the tracing assumes about a size becomes a guard of
the compiled frame.
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import tracing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

from sparc import codes
from sparc.capture import check_weight, refusal, to_program
from sparc.diag import CaptureError
from sparc.functional import functionalize
from sparc.program import Program
from sparc.region import region
from sparc.signature import Leaf, Signature, Structure

Kind = Literal["weight", "input", "size"]

_GRAD_MODES = ("_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode")
_OWNERS = ("_modules", "_parameters", "_buffers", "__closure__", "cell_contents")
_NORMS = (torch.ops.aten.batch_norm.default, torch.ops.aten.instance_norm.default)


@dataclass(frozen=True)
class Argument:
    """One input of a fragment.

    Args:
        kind: a `weight` belongs to a module, an `input` is any other tensor, a `size` is a symbolic integer.
        name: the user's own name for it, as far as dynamo knows it.
        trainable: whether it is a parameter.
    """

    kind: Kind
    name: str
    trainable: bool = False


@dataclass
class Traced:
    """A fragment as one pure graph of ATen operators.

    Args:
        graph: its placeholders are the fragment's arguments, in order, and then the constants.
        owner: holds the bodies of higher-order operators.
        arguments: the fragment's.
        constants: tensors that the code makes from numbers, by name.
    """

    graph: fx.Graph
    owner: fx.GraphModule
    arguments: list[Argument]
    constants: dict[str, Tensor]

    @property
    def graph_module(self) -> fx.GraphModule:
        """The owner, as an exported program calls it."""
        return self.owner

    @property
    def placeholders(self) -> list[fx.Node]:
        """The nodes of the arguments, in order; constants are left out."""
        return [node for node in self.graph.nodes if node.op == "placeholder"][: len(self.arguments)]


@dataclass
class Captured:
    """What `to_program` reads of an exported program."""

    graph: fx.Graph
    graph_module: fx.GraphModule
    graph_signature: ExportGraphSignature
    state_dict: dict[str, Tensor]
    constants: dict[str, Tensor] = field(default_factory=dict)


# reading a fragment ---------------------------------------------------------------------------------------------------
def needs_gradients(module: fx.GraphModule) -> bool:
    """Whether a result of the fragment would carry gradients."""
    return any(isinstance(value, Tensor) and value.requires_grad for value in map(_example, _results(module)))


def autocast_on(values: Sequence[Any]) -> bool:
    """Whether autocast is on, around the fragment, for a device that it works on."""
    kinds = {value.device.type for value in values if isinstance(value, Tensor)}
    return any(torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) for kind in kinds)


def source_text(node: fx.Node) -> str:
    """Where a fragment's input comes from, as Python: `L['self']._modules['fc']._parameters['weight']`."""
    source = getattr(node, "_dynamo_source", None)
    text = getattr(source, "name", "")
    return str(text() if callable(text) else text)


def user_name(source: str) -> str:
    """The user's name of a tensor from its source: `fc.weight`, without the variable that holds the model.

    >>> user_name("L['self']._modules['fc']._parameters['weight']")
    'fc.weight'
    """
    parts = [a or b for a, b in re.findall(r"\['?([^'\]]+)'?\]|\.(\w+)", source)]
    first = 1 if len(parts) > 1 else 0
    return ".".join(part for part in parts[first:] if part not in _OWNERS)


def arguments_of(module: fx.GraphModule, values: Sequence[Any]) -> list[Argument]:
    """What the fragment's inputs are.

    Args:
        module: the fragment.
        values: one value per placeholder.

    Raises:
        CaptureError: SPARC111 for inputs that are neither dense tensors nor integers.
    """
    found: list[Argument] = []
    taken: set[str] = set()
    for node, value in zip(module.graph.find_nodes(op="placeholder"), values, strict=True):
        name = _free_name(user_name(source_text(node)) or node.name, node.name, taken)
        taken |= {name, re.sub(r"\W", "_", name)}
        if isinstance(value, torch.SymInt):
            found.append(Argument("size", name))
        elif isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized:
            trainable = isinstance(value, nn.Parameter)
            owned = trainable or "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})
            found.append(Argument("weight", name, trainable) if owned else Argument("input", re.sub(r"\W", "_", name)))
        else:
            kind = type(value).__name__
            raise CaptureError(codes.UNSUPPORTED_OPERATOR, f"input {name!r} of the fragment is a {kind}")
    return found


def _free_name(name: str, otherwise: str, taken: set[str]) -> str:
    """The name, unless it is taken or lies above or below one that is."""
    clash = any(f"{a}.".startswith(f"{b}.") for other in taken for a, b in ((name, other), (other, name)))
    return otherwise if clash or otherwise in taken else name


def _example(node: Any) -> Any:
    return node.meta.get("example_value") if isinstance(node, fx.Node) else node


def _results(module: fx.GraphModule) -> tuple[Any, ...]:
    return tuple(module.graph.output_node().args[0])  # type: ignore[arg-type]


# tracing --------------------------------------------------------------------------------------------------------------
def trace(module: fx.GraphModule, values: Sequence[Any]) -> Traced:
    """The fragment as a pure graph; called while dynamo compiles it, in `outside_of_dynamo`.

    Args:
        module: the fragment.
        values: its example inputs.

    Raises:
        CaptureError: SPARC101 when it cannot be traced, SPARC105 when it writes to its inputs, SPARC111 for an operator
            that programs cannot hold.
    """
    arguments = arguments_of(module, values)
    examples = [_example(node) for node in module.graph.find_nodes(op="placeholder")]
    mode = next((value.fake_mode for value in examples if isinstance(value, FakeTensor)), None)
    if mode is None:
        raise CaptureError(codes.INPUTS_MISSING, "the fragment has no tensor inputs")
    _check_modules(module)
    try:
        with warnings.catch_warnings(), mode, enable_python_dispatcher(), preserve_node_meta():
            warnings.simplefilter("ignore")
            stand_ins = [_stand_in(value) for value in examples]
            owner = make_fx(_Reader(module).run, pre_dispatch=True)(*stand_ins)
        traced = Traced(owner.graph, owner, arguments, {})
        _lift_constants(traced, mode)
        functionalize(traced)
    except CaptureError:
        raise
    except Exception as error:  # torch raises whatever an operator raises under tracing
        raise refusal(error, "tracing the fragment") from None
    _check_nodes(traced)
    return traced


@contextmanager
def outside_of_dynamo() -> Iterator[None]:
    """For a while, hide that dynamo is compiling: whoever makes types of tensors would find dynamo's, and no others."""
    with tracing(None), torch.inference_mode(False), torch.no_grad():
        yield


class _Reader(fx.Interpreter):
    """Runs a fragment for tracing, as a program on the CPU without gradients."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = getattr(target, "__name__", "")
        if name in _GRAD_MODES:
            return None
        if "autocast" in name:
            raise CaptureError(codes.UNSUPPORTED_OPERATOR, "autocast is not supported", why="it hides the casts")
        return super().call_function(target, *_on_cpu(args, kwargs))

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in ("cuda", "cpu"):
            return args[0]
        return super().call_method(target, *_on_cpu(args, kwargs))


def _on_cpu(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def moved(value: Any) -> Any:
        named = isinstance(value, str) and re.fullmatch(r"cuda(:\d+)?", value)
        return torch.device("cpu") if isinstance(value, torch.device) or named else value

    return fx.node.map_aggregate((args, kwargs), moved)  # type: ignore[return-value]


def _stand_in(value: Any) -> Any:
    """A type of its own on the CPU, with the example's sizes and strides."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="cpu")


def _check_modules(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        if node.op == "call_module" or (node.op == "get_attr" and not isinstance(_attribute(module, node), Tensor)):
            what = f"the fragment calls {node.target!r}"
            raise CaptureError(codes.UNSUPPORTED_OPERATOR, what, why="it is control flow, or calls back into Python")


def _attribute(owner: nn.Module, node: fx.Node) -> Any:
    path, _, name = str(node.target).rpartition(".")
    return getattr(owner.get_submodule(path), name)


def _lift_constants(traced: Traced, mode: FakeTensorMode) -> None:
    """Turn the tensors that tracing kept as attributes into placeholders behind the arguments.

    What is computed from them alone was traced on real tensors, and is typed anew.
    """
    anchor = next(node for node in traced.graph.nodes if node.op != "placeholder")
    by_name: dict[str, fx.Node] = {}
    for node in list(traced.graph.find_nodes(op="get_attr")):
        value = _attribute(traced.owner, node)
        name = f"constant.{str(node.target).replace('.', '_')}"
        if isinstance(value, Tensor):
            if name not in by_name:
                traced.constants[name] = value.detach().cpu()
                with traced.graph.inserting_before(anchor):
                    by_name[name] = traced.graph.placeholder(node.name)
                by_name[name].meta = {**node.meta, "val": mode.from_tensor(traced.constants[name], static_shapes=True)}
            node.replace_all_uses_with(by_name[name])
            traced.graph.erase_node(node)
    for node in traced.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, FakeTensor) and value.fake_mode is not mode:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda used: used.meta["val"])
            with mode:
                node.meta["val"] = node.target(*args, **kwargs)


def _check_nodes(traced: Traced) -> None:
    """Refuse what computes something else on every call, and numbers that are read from tensors."""
    for node in traced.graph.nodes:
        if node.target in _NORMS and True in node.args[5:6] and isinstance(node.args[3], fx.Node):
            raise CaptureError(codes.UNSUPPORTED_STATE, "a norm updates its statistics", hint="call model.eval()")
        if isinstance(node.meta.get("val"), (torch.SymFloat, torch.SymBool)):
            what = "the fragment computes with a number that varies"
            raise CaptureError(codes.UNSUPPORTED_OPERATOR, what, hint="pass it as a tensor, or keep it constant")


# programs -------------------------------------------------------------------------------------------------------------
def program_of(traced: Traced, results: Sequence[fx.Node], values: Sequence[Any]) -> Program:
    """A Program that computes some values of the fragment from its tensor inputs.

    Args:
        traced: the fragment.
        results: nodes of its graph.
        values: the fragment's inputs; the weights among them are the program's.

    Raises:
        CaptureError: SPARC105, SPARC106, SPARC111.
    """
    nodes = traced.placeholders
    kept = [node for node in traced.graph.find_nodes(op="placeholder") if _is_tensor(node)]
    graph = region(results, set(), kept)
    placeholders = dict(zip(kept, graph.find_nodes(op="placeholder"), strict=True))
    specs, weights, inputs = [], {}, []
    for node, argument, value in zip(nodes, traced.arguments, values, strict=True):
        if argument.kind == "weight":
            weights[argument.name] = value.detach().cpu()
            check_weight(argument.name, weights[argument.name], trainable=argument.trainable)
        elif argument.kind == "input":
            inputs.append(argument.name)
        if argument.kind != "size":
            kind = InputKind.PARAMETER if argument.kind == "weight" else InputKind.USER_INPUT
            specs.append(InputSpec(kind, TensorArgument(placeholders[node].name), argument.name))
    for node, name in zip(kept[len(specs) :], traced.constants, strict=True):
        specs.append(InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(placeholders[node].name), name))
    trainable = {each.name: weights[each.name] for each in traced.arguments if each.trainable}
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in results]
    captured = Captured(graph, traced.owner, ExportGraphSignature(specs, outputs), weights, traced.constants)
    return to_program(captured, _signature(inputs, len(results)), _symbols(nodes), "forward", trainable)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _signature(inputs: Sequence[str], results: int) -> Signature:
    names = tuple(inputs)
    output = Structure("tuple", (), tuple(Structure() for _ in range(results)))
    leaves = tuple(Leaf(name) for name in names)
    return Signature(names, tuple(Structure() for _ in names), leaves, output, (), names)


def _symbols(nodes: Sequence[fx.Node]) -> dict[str, str]:
    sizes = [size for node in nodes if _is_tensor(node) for size in node.meta["val"].shape]
    return {str(size): str(size) for size in sizes if not isinstance(size, int)}


def carry_sizes(traced: Traced, results: Sequence[fx.Node]) -> None:
    """Read the symbolic integers that `results` need off the tensor inputs.

    Raises:
        CaptureError: SPARC111 for an integer that is no input's size.
    """
    needed = {used for used in _behind(results) if used.op == "placeholder" and not _is_tensor(used)}
    anchor = next(node for node in traced.graph.nodes if node.op != "placeholder")
    for node in needed:
        carrier = _carrier(traced, node.meta["val"])
        if carrier is None:
            what = f"integer {traced.arguments[traced.placeholders.index(node)].name!r} varies"
            why = "it is no size of an input, and programs have no inputs but tensors"
            raise CaptureError(codes.UNSUPPORTED_OPERATOR, what, why=why, hint="pass it as a tensor")
        with traced.graph.inserting_before(anchor):
            size = traced.graph.call_function(torch.ops.aten.sym_size.int, carrier)
        size.meta = {"val": node.meta["val"]}
        node.replace_all_uses_with(size)


def _carrier(traced: Traced, value: Any) -> tuple[fx.Node, int] | None:
    for node, argument in zip(traced.placeholders, traced.arguments, strict=True):
        if argument.kind == "input":
            for axis, size in enumerate(node.meta["val"].shape):
                if isinstance(size, torch.SymInt) and size.node.expr == value.node.expr:
                    return node, axis
    return None


def _behind(results: Sequence[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = list(results)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += node.all_input_nodes
    return found
