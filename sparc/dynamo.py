"""What torch.compile captured, as ATen operators in sparc's dialect: everything that knows TorchDynamo's conventions.

A fragment is traced with dynamo's own symbolic sizes, so whatever the tracing assumes about a size becomes a guard of
the compiled frame.
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import tracing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sparc import codes
from sparc.capture import refusal
from sparc.diag import CaptureError
from sparc.functional import functionalize, is_mutable
from sparc.program import location
from sparc.traced import Argument, Traced

_GRAD_MODES = ("_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode")
_OWNERS = ("_modules", "_parameters", "_buffers", "__closure__", "cell_contents")
_NORMS = (torch.ops.aten.batch_norm.default, torch.ops.aten.instance_norm.default)


# reading a fragment ---------------------------------------------------------------------------------------------------
def needs_gradients(module: fx.GraphModule) -> bool:
    """Whether a result of the fragment would carry gradients."""
    switched_on = any(_name(node) == "_set_grad_enabled" and node.args[0] for node in module.graph.nodes)
    values = map(_example, module.graph.output_node().args[0])  # type: ignore[arg-type]
    carried = any(isinstance(value, Tensor) and value.requires_grad for value in values)
    return carried and (torch.is_grad_enabled() or switched_on)


def devices(module: fx.GraphModule) -> set[str]:
    """The kinds of devices that the fragment's values are on."""
    values = [value for node in module.graph.nodes for value in pytree.tree_leaves(_example(node))]
    return {value.device.type for value in values if isinstance(value, Tensor)}


def autocast_on(kinds: Iterable[str]) -> bool:
    """Whether autocast is on, around the fragment, for one of these kinds of devices."""
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
        elif isinstance(value, Tensor) and _is_dense(value):
            trainable = isinstance(value, nn.Parameter)
            owned = trainable or "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})
            found.append(Argument("weight", name, trainable) if owned else Argument("input", re.sub(r"\W", "_", name)))
        else:
            kind = type(value).__name__
            raise CaptureError(codes.UNSUPPORTED_OPERATOR, f"input {name!r} of the fragment is a {kind}")
    return found


def _is_dense(value: Tensor) -> bool:
    return value.layout == torch.strided and not value.is_quantized and not is_traceable_wrapper_subclass(value)


def _free_name(name: str, otherwise: str, taken: set[str]) -> str:
    """The name, unless it is taken or lies above or below one that is."""
    clash = any(f"{a}.".startswith(f"{b}.") for other in taken for a, b in ((name, other), (other, name)))
    return otherwise if clash or otherwise in taken else name


def _example(node: Any) -> Any:
    return node.meta.get("example_value") if isinstance(node, fx.Node) else node


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


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
            stand_ins = _stand_ins(examples)
            owner = make_fx(_Reader(module).run, pre_dispatch=True)(*stand_ins)
        traced = Traced(owner.graph, owner, arguments, {})
        _lift_constants(traced, mode)
        writes = any(map(is_mutable, traced.graph.nodes))
        functionalize(traced)
        if writes:
            _retype(traced.graph, mode)
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

    def run_node(self, n: fx.Node) -> Any:
        name = _name(n)
        if name in _GRAD_MODES:
            return None
        if "autocast" in name:
            raise CaptureError(codes.UNSUPPORTED_OPERATOR, "autocast is not supported", why="it hides the casts")
        if n.op == "call_method" and name == "item":
            return _number(_example(n))
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super().call_function(target, *_on_cpu(args, kwargs))

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target == "cuda":
            return args[0]
        return super().call_method(target, *_on_cpu(args, kwargs))


def _number(value: Any) -> float | int:
    """A number that dynamo passes as a tensor, made a constant, which dynamo guards."""
    if not _is_known(value):
        what = "the fragment reads a number from a tensor"
        raise CaptureError(codes.UNSUPPORTED_OPERATOR, what, hint="keep it a tensor")
    return int(value) if isinstance(value, torch.SymInt) else float(value)


def _is_known(value: Any) -> bool:
    """Whether a symbolic number is an input's or computed from inputs' sizes, and not read from a tensor."""
    return isinstance(value, (torch.SymInt, torch.SymFloat)) and bool(value.node.has_hint())


def _on_cpu(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def moved(value: Any) -> Any:
        named = isinstance(value, str) and re.fullmatch(r"cuda(:\d+)?", value)
        return torch.device("cpu") if isinstance(value, torch.device) or named else value

    return fx.node.map_aggregate((args, kwargs), moved)  # type: ignore[return-value]


def _stand_ins(examples: Sequence[Any]) -> list[Any]:
    """For tensors, types of their own on the CPU with the same sizes and strides. Integers that are no tensor's size
    become constants, which dynamo guards.
    """
    shapes: list[Any] = [value.shape for value in examples if isinstance(value, Tensor)]
    sizes = {size.node.expr for shape in shapes for size in shape if isinstance(size, torch.SymInt)}
    found: list[Any] = []
    for value in examples:
        if isinstance(value, Tensor):
            found.append(torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="cpu"))
        else:
            found.append(value if value.node.expr in sizes else int(value))
    return found


def _check_modules(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        if node.op == "call_module" or (node.op == "get_attr" and not isinstance(_attribute(module, node), Tensor)):
            what = f"the fragment calls {node.target!r}"
            raise CaptureError(codes.UNSUPPORTED_OPERATOR, what, why="it is control flow, or calls back into Python")


def _attribute(owner: nn.Module, node: fx.Node) -> Any:
    path, _, name = str(node.target).rpartition(".")
    return getattr(owner.get_submodule(path), name)


def _lift_constants(traced: Traced, mode: FakeTensorMode) -> None:
    """Turn the tensors that tracing kept as attributes into placeholders behind the arguments."""
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


def _retype(graph: fx.Graph, mode: FakeTensorMode) -> None:
    """Compute every type anew, and with it what memory the values lie in."""
    with mode, enable_python_dispatcher():
        for node in graph.nodes:
            if node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda used: used.meta["val"])
                node.meta["val"] = node.target(*args, **kwargs)


def _check_nodes(traced: Traced) -> None:
    """Refuse what computes something else on every call, and sizes that are read from tensors."""
    for node in traced.graph.nodes:
        if node.target in _NORMS and True in node.args[5:6] and isinstance(node.args[3], fx.Node):
            raise CaptureError(codes.UNSUPPORTED_STATE, "a norm updates its statistics", hint="call model.eval()")
        if any(map(_is_unknown, pytree.tree_leaves(node.meta.get("val")))):
            where, what = location(node), "the fragment has a size that is read from a tensor"
            raise CaptureError(codes.UNSUPPORTED_OPERATOR, what, where=where)


def _is_unknown(value: Any) -> bool:
    sizes = value.shape if isinstance(value, Tensor) else (value,)
    return any(isinstance(size, (torch.SymInt, torch.SymFloat)) and not _is_known(size) for size in sizes)
