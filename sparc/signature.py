"""How a model is called: the names, order and structure of its inputs and outputs."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sparc import codes
from sparc.diag import ArtifactError, CaptureError

Frozen = bool | int | float | str | None


@dataclass(frozen=True)
class Structure:
    """A nested container, described so that it can be written to JSON and rebuilt without importing anything.

    `kind` is `leaf`, `tuple`, `list`, `dict` or `class`; `keys` name the children of a `dict` or `class`;
    `type_name` is the name
    under which torch's pytree registered a class. A class that is not registered in this process is rebuilt as a
    mapping.
    """

    kind: str = "leaf"
    keys: tuple[str, ...] = ()
    children: tuple["Structure", ...] = ()
    type_name: str = ""
    spec: pytree.TreeSpec | None = field(default=None, compare=False, repr=False)

    @property
    def size(self) -> int:
        """The number of leaves."""
        return 1 if self.kind == "leaf" else sum(child.size for child in self.children)

    def paths(self, prefix: str = "") -> list[str]:
        """A dotted name for each leaf, in order; an unnamed leaf at the top is called `prefix`."""
        if self.kind == "leaf":
            return [prefix]
        names = self.keys or tuple(str(index) for index in range(len(self.children)))
        return [
            path
            for name, child in zip(names, self.children, strict=True)
            for path in child.paths(f"{prefix}.{name}" if prefix else name)
        ]

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        """The nested value with `leaves` at its leaves."""
        if self.spec is not None:
            return pytree.tree_unflatten(list(leaves), self.spec)
        if self.kind == "leaf":
            return leaves[0]
        values, start = [], 0
        for child in self.children:
            values.append(child.unflatten(leaves[start : start + child.size]))
            start += child.size
        if self.kind in ("dict", "class"):
            return dict(zip(self.keys, values, strict=True))
        return tuple(values) if self.kind == "tuple" else values

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        if self.kind == "leaf":
            return {"kind": "leaf"}
        described: dict[str, Any] = {"kind": self.kind, "children": [child.to_dict() for child in self.children]}
        if self.keys:
            described["keys"] = list(self.keys)
        if self.type_name:
            described["type"] = self.type_name
        return described

    @staticmethod
    def from_dict(described: Mapping[str, Any]) -> "Structure":
        """The inverse of `to_dict`."""
        children = tuple(Structure.from_dict(child) for child in described.get("children", ()))
        keys = tuple(described.get("keys", ()))
        return Structure(described["kind"], keys, children, described.get("type", ""))

    @staticmethod
    def of_spec(spec: pytree.TreeSpec) -> "Structure":
        """Describe a pytree; classes are kept with their registered name and their field names."""
        return _describe(spec, top=True)


def _describe(spec: pytree.TreeSpec, *, top: bool = False) -> Structure:
    keep = spec if top else None
    if spec.is_leaf():
        return Structure(spec=keep)
    children = tuple(_describe(child) for child in spec.children())
    if spec.type in (tuple, list):
        return Structure(spec.type.__name__, (), children, spec=keep)
    keys = _field_names(spec, len(children))
    if spec.type is dict:
        return Structure("dict", keys, children, spec=keep)
    registered = pytree.SUPPORTED_SERIALIZED_TYPES.get(spec.type)
    name = registered.serialized_type_name if registered is not None else spec.type.__qualname__
    return Structure("class", keys, children, str(name), spec=keep)


def _field_names(spec: pytree.TreeSpec, count: int) -> tuple[str, ...]:
    context = spec.context
    if isinstance(context, type) and hasattr(context, "_fields"):
        return tuple(context._fields)
    if isinstance(context, (list, tuple)) and len(context) == count and all(isinstance(key, str) for key in context):
        return tuple(context)
    for part in context if isinstance(context, (list, tuple)) else ():
        if isinstance(part, (list, tuple)) and len(part) == count and all(isinstance(key, str) for key in part):
            return tuple(part)
    if isinstance(context, (list, tuple)) and len(context) == count:
        return tuple(str(key) for key in context)
    return tuple(str(index) for index in range(count))


@dataclass(frozen=True)
class Leaf:
    """One leaf of the inputs or outputs: a tensor with a name, or a frozen value."""

    name: str
    is_tensor: bool = True
    frozen: Frozen = None


@dataclass(frozen=True)
class Signature:
    """How an entry is called.

    Args:
        parameters: the names of forward()'s parameters that have values, in order.
        inputs: one structure per parameter.
        input_leaves: every leaf of the inputs, in order; tensors become placeholders, the others are frozen.
        output: the structure of the result.
        output_leaves: every leaf of the result.
        positional: forward()'s parameters in positional order (a superset of `parameters`).
    """

    parameters: tuple[str, ...]
    inputs: tuple[Structure, ...]
    input_leaves: tuple[Leaf, ...]
    output: Structure
    output_leaves: tuple[Leaf, ...]
    positional: tuple[str, ...] = ()

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors of a call, one per placeholder.

        Raises:
            ArtifactError: SPARC506 when a name, a structure, a type or a frozen value does not fit.
        """
        positional = self.positional or self.parameters
        if len(args) > len(positional):
            raise _mismatch(f"{len(args)} positional inputs given, {len(positional)} expected")
        given = dict(zip(positional, args, strict=False))
        for name in given.keys() & kwargs.keys():
            raise _mismatch(f"input {name!r} given twice")
        given.update(kwargs)
        extra = [name for name, value in given.items() if name not in self.parameters and value is not None]
        if extra:
            raise _mismatch(f"unknown input {extra[0]!r}", f"the inputs are {', '.join(self.parameters)}")
        leaves: list[Any] = []
        for name, structure in zip(self.parameters, self.inputs, strict=True):
            if name not in given:
                raise _mismatch(f"input {name!r} is missing", f"the inputs are {', '.join(self.parameters)}")
            flat, spec = pytree.tree_flatten(given[name])
            found = Structure.of_spec(spec)
            if found.paths() != structure.paths():
                raise _mismatch(f"input {name!r} has another structure than its example")
            leaves += flat
        return self._tensors(leaves)

    def _tensors(self, leaves: Sequence[Any]) -> list[Tensor]:
        tensors = []
        for leaf, value in zip(self.input_leaves, leaves, strict=True):
            if leaf.is_tensor:
                if not isinstance(value, Tensor):
                    raise _mismatch(f"input {leaf.name!r} must be a tensor, not {type(value).__name__}")
                tensors.append(value)
            elif value != leaf.frozen or isinstance(value, bool) != isinstance(leaf.frozen, bool):
                raise _mismatch(f"input {leaf.name!r} was frozen at {leaf.frozen!r}, now it is {value!r}")
        return tensors

    def unflatten(self, tensors: Sequence[Any]) -> Any:
        """The model's own output structure around the graph's flat outputs."""
        feed = iter(tensors)
        return self.output.unflatten([next(feed) if leaf.is_tensor else leaf.frozen for leaf in self.output_leaves])

    @property
    def input_names(self) -> list[str]:
        """The names of the tensor inputs, one per placeholder."""
        return [leaf.name for leaf in self.input_leaves if leaf.is_tensor]

    @property
    def output_names(self) -> list[str]:
        """The names of the tensor outputs, in the order of the graph's outputs."""
        return [leaf.name for leaf in self.output_leaves if leaf.is_tensor]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "parameters": list(self.parameters),
            "positional": list(self.positional),
            "inputs": [structure.to_dict() for structure in self.inputs],
            "input_leaves": [_leaf_to_dict(leaf) for leaf in self.input_leaves],
            "output": self.output.to_dict(),
            "output_leaves": [_leaf_to_dict(leaf) for leaf in self.output_leaves],
        }

    @staticmethod
    def from_dict(described: Mapping[str, Any]) -> "Signature":
        """The inverse of `to_dict`."""
        return Signature(
            tuple(described["parameters"]),
            tuple(Structure.from_dict(each) for each in described["inputs"]),
            tuple(Leaf(**each) for each in described["input_leaves"]),
            Structure.from_dict(described["output"]),
            tuple(Leaf(**each) for each in described["output_leaves"]),
            tuple(described["positional"]),
        )


def _leaf_to_dict(leaf: Leaf) -> dict[str, Any]:
    return {"name": leaf.name} if leaf.is_tensor else {"name": leaf.name, "is_tensor": False, "frozen": leaf.frozen}


def _mismatch(what: str, hint: str = "") -> ArtifactError:
    return ArtifactError(codes.CALL_MISMATCH, what, hint=hint)


def bind_examples(forward: Callable[..., Any], examples: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Example inputs by parameter name, in forward()'s order, and forward()'s positional parameter names.

    Args:
        forward: the model's forward.
        examples: a tuple or list (positional), a mapping (keyword), or one tensor.

    Raises:
        CaptureError: SPARC102 when they do not fit forward()'s signature.
    """
    if isinstance(examples, Tensor):
        examples = (examples,)
    if not isinstance(examples, (tuple, list, Mapping)) or not examples:
        raise CaptureError(
            codes.INPUTS_MISSING,
            "example_inputs must be a non-empty tuple or mapping",
            why=f"got {type(examples).__name__}",
        )
    signature = inspect.signature(forward)
    positional = tuple(
        p.name for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    )
    try:
        bound = signature.bind(**examples) if isinstance(examples, Mapping) else signature.bind(*examples)
    except TypeError as error:
        raise CaptureError(
            codes.INPUTS_MISSING,
            "example_inputs do not fit forward()",
            why=str(error),
            hint=f"forward() declares {', '.join(signature.parameters)}",
        ) from None
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind == inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        elif kind == inspect.Parameter.VAR_POSITIONAL:
            raise CaptureError(
                codes.INPUTS_MISSING,
                f"forward() takes *{name}",
                why="inputs need names",
                hint="wrap the model in a module whose forward() names its inputs",
            )
        else:
            named[name] = value
    return named, positional


def describe_inputs(named: Mapping[str, Any]) -> tuple[tuple[Structure, ...], tuple[Leaf, ...]]:
    """The structure of every named input and its flat leaves.

    Raises:
        CaptureError: SPARC102 for a leaf that is neither a tensor nor a plain value, or a tensor that is sparse or
            quantized.
    """
    structures, leaves = [], []
    for name, value in named.items():
        flat, spec = pytree.tree_flatten(value)
        structure = Structure.of_spec(spec)
        structures.append(structure)
        for path, item in zip(structure.paths(name), flat, strict=True):
            leaves.append(_leaf(path, item))
    return tuple(structures), tuple(leaves)


def _leaf(path: str, item: Any) -> Leaf:
    if isinstance(item, Tensor):
        if item.layout != torch.strided or item.is_quantized:
            raise CaptureError(
                codes.INPUTS_MISSING, f"input {path!r} is not an ordinary dense tensor", why=str(item.layout)
            )
        return Leaf(path)
    if item is None or isinstance(item, (bool, int, float, str)):
        return Leaf(path, False, item)
    raise CaptureError(
        codes.INPUTS_MISSING, f"input {path!r} is neither a tensor nor a plain value", why=type(item).__name__
    )
