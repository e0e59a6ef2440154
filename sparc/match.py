"""One match of a pattern, as the author of a rewrite sees it: variables, weights, new constants and new operators."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from sparc.analysis.values import same_bits, scalar_value
from sparc.pattern import Found
from sparc.program import Entry, Program, is_weight


@dataclass(frozen=True)
class Skip:
    """A match that was left alone, and why."""

    why: str


class Inserter:
    """`m.op`: every attribute is an ATen operator whose call inserts a node before the match."""

    def __init__(self, state: "Match", namespace: Any = None) -> None:
        self._state = state
        self._namespace = namespace if namespace is not None else torch.ops.aten

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name == "sparc":
            return Inserter(self._state, torch.ops.sparc)  # type: ignore[return-value]
        target = operator.getitem if name == "getitem" else getattr(self._namespace, name)

        def insert(*args: Any, **kwargs: Any) -> fx.Node:
            overload = resolve_overload(target, args, kwargs)
            return self._state.call(overload, *args, **kwargs)

        return insert


def resolve_overload(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The overload of a packet that accepts these arguments; the target itself when it is no packet."""
    if not hasattr(target, "overloads"):
        return target
    for name in sorted(target.overloads(), key=lambda each: (each != "default", "Tensor" not in each, each)):
        overload = getattr(target, name)
        if "out" not in name and _accepts(overload, args, kwargs):
            return overload
    raise TypeError(f"no overload of {target} takes these arguments")


def _accepts(overload: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    schema = overload._schema.arguments
    if len(args) > len(schema):
        return False
    given = {argument.name: value for argument, value in zip(schema, args, strict=False)} | kwargs
    names = {argument.name for argument in schema}
    if not set(given) <= names:
        return False
    return all(_fits(str(a.type), given[a.name]) if a.name in given else a.has_default_value() for a in schema)


def _fits(kind: str, value: Any) -> bool:
    optional = kind.startswith("Optional[")
    kind = kind.removeprefix("Optional[").removesuffix("]") if optional else kind
    if value is None:
        return optional
    if isinstance(value, fx.Node) and isinstance(value.meta.get("val"), Tensor):
        return kind == "Tensor"
    if isinstance(value, (list, tuple)):
        return kind.startswith("List")
    if isinstance(value, str):
        return kind == "str"
    return kind != "Tensor" and not kind.startswith("List") and kind != "str"


class Match:
    """One match of a pattern. Variables are attributes: `m.x` is what `x` bound."""

    def __init__(
        self, program: Program, entry: Entry, found: Found, before: fx.Node, made: dict[str, list[str]]
    ) -> None:
        """Args: the program and entry, what matched, the node to insert before, and weights made so far in this run by
        what they replace.
        """
        self.program = program
        self.entry = entry
        self.roots = found.roots
        self.nodes = found.nodes
        self.created: list[fx.Node] = []
        self.wide: dict[str, Tensor] = {}
        self.likes: dict[str, str] = {}
        self._values = found.values
        self._before = before
        self._made = made

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_values"][name]
        except KeyError:
            raise AttributeError(f"the pattern has no variable {name!r}") from None

    @property
    def op(self) -> Inserter:
        """Inserts operators before the match."""
        return Inserter(self)

    def weight(self, name: str) -> Tensor | None:
        """The weight that a variable bound, in float64; None when it is computed, or absent."""
        node = self._values[name]
        if not is_weight(node):
            return None
        stored = str(node.target)
        tensor = self.wide.get(stored, self.program.weights[stored])
        return tensor.double() if tensor.is_floating_point() else tensor

    def value(self, name: str) -> Any:
        """The type of what a variable bound: a FakeTensor for a node, the value itself otherwise."""
        bound = self._values[name]
        return bound.meta["val"] if isinstance(bound, fx.Node) else bound

    def constant(self, tensor: Tensor, like: str, name: str | None = None, of: Sequence[fx.Node] = ()) -> fx.Node:
        """A new weight, kept in float64 until it is checked and stored in the dtype of `like`.

        Args:
            tensor: the value; one that already has the dtype of `like` is taken as it is.
            like: the variable whose weight it replaces: it takes over its dtype, its origins and, once that is unused,
                its name.
            name: instead of that name, a name beside it: `bias` for a new bias beside `conv.weight`.
            of: other weights that it is made of, whose origins it has as well.
        """
        source = self._values[like]
        old = str(source.target)
        wished = old if name is None else old.rpartition(".")[0] + "." * ("." in old) + name
        stored = tensor.to(self.program.weights[old].dtype)
        made = self._made.setdefault(wished, [])
        weights = self.program.weights
        known = next((each for each in made if each in weights and same_bits(weights[each], stored)), None)
        if known is not None:  # another entry reads the same weight and was rewritten in the same way
            node = self.program.weight_node(self.entry, known)
        else:
            node = self.program.add_weight(wished, stored, like=source)
            made.append(str(node.target))
            self._join_origins(str(node.target), of)
        if stored.dtype != tensor.dtype:
            self.wide[str(node.target)] = tensor
        if name is None:
            self.likes[str(node.target)] = old
        self.created.append(node)
        return node

    def _join_origins(self, name: str, of: Sequence[fx.Node]) -> None:
        weights = self.program.weights
        record = weights.record(name)
        origins = (each for node in of for each in weights.record(str(node.target)).origins)
        weights.put(name, replace(record, origins=tuple(dict.fromkeys((*record.origins, *origins)))))

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a call of an operator overload, such as the one that was matched, before the match."""
        node = self.entry.call(target, *args, before=self._before, like=self.roots[0], **kwargs)
        self.created.append(node)
        return node

    def number(self, value: Any) -> float | None:
        """The number that a value stands for: a literal, a constant of one element, or a tensor filled with one
        number; else None.
        """
        found = scalar_value(self.program, value)
        return None if found is None else float(found)

    def skip(self, why: str) -> Skip:
        """Leave the match alone."""
        return Skip(why)
