"""The boundary to torch.export: a model and example inputs in, a Program out, or a refusal with the user's own line."""

import io
import logging
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, ExportGraphSignature, InputKind, OutputKind, TensorArgument
from torch.utils import _pytree as pytree

from sparc import codes
from sparc.checkpoint.base import Checkpoint
from sparc.diag import CaptureError, Diagnostics, Location
from sparc.dimensions import dimensions, fixed, named_forward, refine, tile
from sparc.functional import Graphed, draws, functionalize, is_impure
from sparc.program import Entry, Program, Weight, WeightStore, location
from sparc.signature import Leaf, Signature, Structure, bind_examples, describe_inputs
from sparc.source import short_path, source_line

Dynamic = Mapping[str, Mapping[int, Any]]


class Exported(Graphed, Protocol):
    """What a program is made from: `torch.export.ExportedProgram`, or what looks like one."""

    @property
    def graph_signature(self) -> ExportGraphSignature:
        """What the placeholders and results are."""
        ...

    @property
    def state_dict(self) -> Mapping[str, Tensor]:
        """Parameters and buffers by name."""
        ...

    @property
    def constants(self) -> Mapping[str, Any]:
        """Other tensors by name."""
        ...


_NO_EFFECT = ("_assert", "sym_constrain_range", "_check")


def capture(
    model: nn.Module | Checkpoint,
    example_inputs: Any,
    *,
    dynamic: Dynamic | None = None,
    entry: str = "forward",
    diagnostics: Diagnostics | None = None,
) -> Program:
    """Capture a model in eval mode as a Program with one entry.

    Args:
        model: any module that torch.export can trace; its training flag and a checkpoint's grids are kept.
        example_inputs: a tuple (positional) or a mapping (keyword); values that are not tensors are frozen.
        dynamic: dimensions that vary, by input and axis: `{"input_ids": {0: "batch", 1: "seq"}}`. Equal names are
            equal sizes. Nested inputs are named with dots: `past.0.key`.
        entry: the name of the entry.
        diagnostics: collects remarks, such as a narrowed range.

    Raises:
        CaptureError: SPARC101 to SPARC111, with the user's own source line where there is one.
    """
    diagnostics = diagnostics if diagnostics is not None else Diagnostics()
    if isinstance(model, Checkpoint):
        plain = capture(model.model, example_inputs, dynamic=dynamic, entry=entry, diagnostics=diagnostics)
        return model.attach(plain, diagnostics)
    if not isinstance(model, nn.Module):
        raise CaptureError(codes.INPUTS_MISSING, "model must be a torch.nn.Module", why=f"got {type(model).__name__}")
    named, positional = bind_examples(model.forward, example_inputs)
    structures, leaves = describe_inputs(named)
    _check_weights(model)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        output = _call_eagerly(model, named)
        _check_output(output)
        exported, symbol_names = _export(model, named, leaves, dynamic or {}, diagnostics)
    finally:
        for module in training:
            module.training = True
    output_structure = Structure.of_spec(pytree.tree_structure(output))
    signature = Signature(tuple(named), structures, leaves, output_structure, (), positional)
    return to_program(exported, signature, symbol_names, entry, dict(model.named_parameters(remove_duplicate=False)))


def capture_entries(
    model: nn.Module | Checkpoint, entries: Mapping[str, Mapping[str, Any]], diagnostics: Diagnostics | None = None
) -> Program:
    """Capture one model several times (prefill and decode, say) as one Program over one weight store.

    Args:
        model: the module, or a checkpoint.
        entries: for each entry's name, `{"example_inputs": ..., "dynamic": ...}`.
        diagnostics: collects remarks.
    """
    programs = [capture(model, **options, entry=name, diagnostics=diagnostics) for name, options in entries.items()]
    return merge(programs)


def merge(programs: list[Program]) -> Program:
    """One Program with the entries of all, weights of equal name and value shared.

    Raises:
        CaptureError: SPARC105 when two programs hold different values under one name.
    """
    store = WeightStore()
    for program in programs:
        store.aliases.update(program.weights.aliases)
        for name in program.weights:
            record = program.weights.record(name)
            if name in store and store[name] is not record.tensor and not torch.equal(store[name], record.tensor):
                raise CaptureError(codes.UNSUPPORTED_STATE, f"two entries hold different values of {name!r}")
            if name not in store:
                store.put(name, record)
    return Program(store, {name: entry for program in programs for name, entry in program.entries.items()})


# before the export --------------------------------------------------------------------------------------------------
def _check_weights(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu":
            raise CaptureError(
                codes.UNSUPPORTED_OPERATOR, f"weight {name!r} is on device {parameter.device}", hint="call model.cpu()"
            )
        check_weight(name, parameter, trainable=True)
    for name, buffer in model.named_buffers():
        check_weight(name, buffer, trainable=False)


def check_weight(name: str, tensor: Tensor, *, trainable: bool) -> None:
    """Parameters are finite, and buffers hold no NaN.

    Raises:
        CaptureError: SPARC106.
    """
    wrong = ~tensor.isfinite() if trainable else tensor.isnan()
    if bool(wrong.any()):
        kind, found = ("weight", "NaN or Inf") if trainable else ("buffer", "NaN")
        where = Location(name.rpartition(".")[0])
        raise CaptureError(codes.BAD_WEIGHT, f"{kind} {name!r} contains {found}", where=where)


def _call_eagerly(model: nn.Module, named: Mapping[str, Any]) -> Any:
    try:
        with torch.no_grad():
            return model(**named)
    except Exception as error:  # any error of the user's own code becomes one diagnostic
        raise CaptureError(
            codes.MODEL_CALL_FAILED,
            f"the model raised {type(error).__name__} on its example inputs",
            where=_user_frame(error),
            why=_first_lines(error),
        ) from None


def _check_output(output: Any) -> None:
    for leaf in pytree.tree_leaves(output):
        if not isinstance(leaf, (Tensor, int, float, str, type(None))):
            raise CaptureError(
                codes.OUTPUT_STRUCTURE,
                f"the model returns a {type(leaf).__name__}",
                why="torch does not know how to take it apart into tensors",
                hint="return tensors in standard containers, or turn the output off (use_cache=False, for example)",
            )


# the export ---------------------------------------------------------------------------------------------------------
def _export(
    model: nn.Module, named: Mapping[str, Any], leaves: tuple[Leaf, ...], dynamic: Dynamic, diagnostics: Diagnostics
) -> tuple[ExportedProgram, dict[str, str]]:
    flat, spec = pytree.tree_flatten(dict(named))
    by_leaf = dimensions(leaves, flat, dynamic)
    tiled = tile(leaves, flat, by_leaf, diagnostics)
    sizes = {dimension.__name__: value.shape[axis] for leaf, value in zip(leaves, tiled, strict=True)
             for axis, dimension in by_leaf.get(leaf.name, {}).items()}  # fmt: skip
    shapes = pytree.tree_unflatten(
        [dict(by_leaf.get(leaf.name, {})) if leaf.is_tensor else None for leaf in leaves], spec
    )
    examples = pytree.tree_unflatten(tiled, spec)
    with named_forward(model, named):
        exported = _export_refining(model, examples, shapes, sizes, diagnostics)
    names: dict[str, str] = {}
    values = {node.name: node.meta.get("val") for node in exported.graph.nodes if node.op == "placeholder"}
    tensors = [s.arg for s in exported.graph_signature.input_specs if s.kind == InputKind.USER_INPUT]
    for leaf, argument in zip(leaves, tensors, strict=True):
        for axis, dimension in by_leaf.get(leaf.name, {}).items():
            size = values[argument.name].shape[axis]
            if isinstance(size, int):
                raise fixed(leaf.name, axis, dimension.__name__, f"the model fixes it to {size}")
            names.setdefault(str(size), dimension.__name__)
    return exported, names


def _export_refining(
    model: nn.Module, examples: dict[str, Any], shapes: Any, sizes: Mapping[str, int], diagnostics: Diagnostics
) -> ExportedProgram:
    """Export; where torch suggests narrower ranges for a dimension, accept them and say so."""
    for _ in range(4):
        try:
            with _quiet(), torch.no_grad():
                return torch.export.export(model, (), examples, dynamic_shapes=shapes, strict=False)
        except torch._dynamo.exc.UserError as error:
            narrowed = refine(str(error), shapes, sizes, diagnostics)
            if narrowed is None:
                raise refusal(error, "torch.export") from None
            shapes = narrowed
        except Exception as error:  # torch.export raises whatever the model's code raises under tracing
            raise refusal(error, "torch.export") from None
    raise CaptureError(
        codes.DYNAMIC_DIMENSION, "the dynamic dimensions could not be settled", why="torch kept suggesting other ranges"
    )


def refusal(error: BaseException, what: str) -> CaptureError:
    """SPARC101 for what torch raised in `what`, with the user's line."""
    kind = type(error).__name__
    return CaptureError(
        codes.CAPTURE_FAILED,
        "what the model computes depends on the values of a tensor"
        if kind == "GuardOnDataDependentSymNode"
        else f"{what} stopped with {kind}",
        where=_user_frame(error),
        why=_first_lines(error),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's logging, warnings and prints of half a graph off the terminal; what matters is in the exception."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _user_frame(error: BaseException) -> Location:
    own = str(Path(__file__).parent)
    frames = traceback.extract_tb(error.__traceback__)
    outside = [
        frame for frame in frames if "/torch/" not in frame.filename and not frame.filename.startswith((own, "<"))
    ]
    if not outside:
        return Location()
    frame = outside[-1]
    line = f": {frame.line}" if frame.line else ""
    return Location("", f"{short_path(frame.filename)}:{frame.lineno} in {frame.name}{line}")


def _first_lines(error: BaseException, limit: int = 3) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:limit])[:400]


# after the export ---------------------------------------------------------------------------------------------------
def to_program(
    exported: Exported, signature: Signature, names: dict[str, str], entry: str, parameters: Mapping[str, Tensor]
) -> Program:
    """A Program from an exported program.

    Args:
        exported: what torch.export gave.
        signature: how it is called, still without output leaves.
        names: the user's names of its symbols.
        entry: the entry's name.
        parameters: the user's trainable tensors, tied ones under each of their names.
    """
    functionalize(exported)
    weights, by_placeholder = _weights(exported, parameters)
    user_inputs = [s.arg for s in exported.graph_signature.input_specs if s.kind == InputKind.USER_INPUT]
    leaf_of = {a.name: leaf for a, leaf in zip(user_inputs, signature.input_leaves, strict=True)}
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    first: dict[str, fx.Node] = {}
    for node in exported.graph.nodes:
        if node.op == "placeholder" and node.name in leaf_of:
            if leaf_of[node.name].is_tensor:
                copies[node] = graph.placeholder(leaf_of[node.name].name.replace(".", "_"))
                copies[node].meta = {"val": node.meta["val"]}
        elif node.op == "placeholder" and node.name in by_placeholder:
            name = by_placeholder[node.name]
            if name not in first:
                first[name] = graph.create_node("get_attr", name, name=name.replace(".", "_"))
                first[name].meta = {"val": node.meta["val"]}
            copies[node] = first[name]
        elif node.op == "call_function":
            if is_impure(node) and any(word in str(node.target) for word in _NO_EFFECT):
                continue
            copies[node] = graph.node_copy(node, lambda used: copies[used])
            copies[node].meta = _clean_meta(node)
        elif node.op == "output":
            results, output_leaves = _outputs(exported, node.args[0], signature.output)
            graph.output([copies[result] for result in results])
    fake_mode = torch._guards.detect_fake_mode(
        [node.meta["val"] for node in graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    )
    called = replace(signature, output_leaves=output_leaves)
    program = Program(weights, {entry: Entry(graph, called, fake_mode, names)})  # type: ignore[arg-type]
    program.sweep()
    _refuse_random(program)
    return program


def _refuse_random(program: Program) -> None:
    for _, node in program.nodes():
        if draws(node):
            raise CaptureError(
                codes.UNSUPPORTED_OPERATOR,
                f"the model draws random numbers with {node.target}",
                where=location(node),
                why="no two runs agree, so nothing that is done to the model could be checked",
                hint="make what is drawn an input of forward()",
            )


def _weights(exported: Exported, parameters: Mapping[str, Tensor]) -> tuple[WeightStore, dict[str, str]]:
    """The weights under the user's names, tied ones once; and which placeholder stands for which."""
    store = WeightStore()
    by_placeholder: dict[str, str] = {}
    by_storage: dict[Any, str] = {}
    kinds = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
    for spec in exported.graph_signature.input_specs:
        if spec.kind not in kinds:
            continue
        name = str(spec.target)
        tensor = exported.state_dict[name] if name in exported.state_dict else exported.constants[name]
        tensor = tensor.detach()
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()) if tensor.numel() else name
        canonical = by_storage.setdefault(key, name)
        if canonical == name:
            store.put(name, Weight(tensor, None, (name,), name in parameters))
        by_placeholder[spec.arg.name] = canonical
    for name, parameter in parameters.items():
        key = (
            (parameter.data_ptr(), parameter.dtype, tuple(parameter.shape), parameter.stride())
            if parameter.numel()
            else name
        )
        canonical = by_storage.get(key, name)
        if canonical != name:
            store.aliases[name] = canonical
    return store, by_placeholder


def _outputs(exported: Exported, values: Any, structure: Structure) -> tuple[list[fx.Node], tuple[Leaf, ...]]:
    """The nodes of the tensor outputs, and every leaf. Specs are read by position: names go stale when nodes change."""
    results, leaves = [], []
    specs = exported.graph_signature.output_specs
    user_outputs = [pair for pair in zip(specs, values, strict=True) if pair[0].kind == OutputKind.USER_OUTPUT]
    mutated = [spec for spec in specs if spec.kind != OutputKind.USER_OUTPUT]
    if mutated:
        raise CaptureError(codes.UNSUPPORTED_STATE, f"the model writes to {mutated[0].target or mutated[0].arg.name!r}")
    paths = structure.paths()
    if len(paths) != len(user_outputs):
        raise CaptureError(
            codes.OUTPUT_STRUCTURE, "the captured outputs do not have the structure of the model's outputs"
        )
    for path, (spec, value) in zip(paths, user_outputs, strict=True):
        name = path or "output"
        name = f"output_{name}" if name[0].isdigit() else name
        if isinstance(spec.arg, TensorArgument):
            results.append(value)
            leaves.append(Leaf(name))
        elif isinstance(spec.arg, ConstantArgument):
            leaves.append(Leaf(name, False, spec.arg.value))
        else:
            raise CaptureError(
                codes.OUTPUT_STRUCTURE, f"output {name!r} is {type(spec.arg).__name__}, not a tensor or a constant"
            )
    return results, tuple(leaves)


def _clean_meta(node: fx.Node) -> dict[str, Any]:
    meta: dict[str, Any] = {"val": node.meta.get("val")}
    stack = node.meta.get("nn_module_stack") or {}
    if stack:
        path, kind = next(reversed(stack.values()))
        module = re.sub(r"^L\['\w+'\]\.?", "", str(path)).removesuffix("@1")
        meta["module"] = "" if module.startswith("_empty_nn_module_stack") else module
        meta["type"] = (kind if isinstance(kind, str) else kind.__qualname__).rpartition(".")[2]
    source = source_line(str(node.meta.get("stack_trace") or ""))
    if source:
        meta["source"] = source
    return meta
