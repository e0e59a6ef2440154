"""Rewriting: `@rewrite(pattern, contract=...)` turns a function from a Match to its replacement into a Pass.

    @rewrite(lambda op, x, a, b: op.linear(op.linear(x, a), b), contract=Bounded(1e-4))
    def fold_low_rank(m):
        \"\"\"linear(linear(x, A), B) => linear(x, B @ A), when the merged matrix is not larger.\"\"\"
        a, b = m.weight("a"), m.weight("b")
        if a is None or b is None:
            return m.skip("A or B is computed, not a weight")
        if b.shape[0] * a.shape[1] > a.numel() + b.numel():
            return m.skip("the merged matrix is larger")
        return m.op.linear(m.x, m.constant(b @ a, like="b"))
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from sparc.contract import Contract
from sparc.encoding.operators import is_decode
from sparc.pass_base import Pass, PassContext, Rewrite, Stage
from sparc.pattern import Bound, Pattern, match, trace
from sparc.program import Entry, Program, is_weight, location


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
            return self._state._insert(overload, args, kwargs)

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

    def __init__(self, program: Program, entry: Entry, pattern: Pattern, bound: Bound) -> None:
        self.program = program
        self.entry = entry
        self.roots = [bound.nodes[result] if result in bound.nodes else _either_root(result, bound) for result in pattern.results]
        self.nodes = list(dict.fromkeys(bound.nodes.values()))
        self._values = {**{name: None for name, v in pattern.variables.items() if v.optional}, **bound.values}
        self.created: list[fx.Node] = []
        self.wide: dict[str, Tensor] = {}
        self.likes: dict[str, str] = {}

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

    def constant(self, tensor: Tensor, like: str) -> fx.Node:
        """A new weight, kept in float64 until it is checked and stored in the dtype of `like`.

        Args:
            tensor: the value.
            like: the variable whose weight it replaces: it takes over its dtype, its origins and, once that is unused, its name.
        """
        source = self._values[like]
        name = str(source.target)
        node = self.program.add_weight(name, tensor.to(self.program.weights[name].dtype), like=source)
        self.wide[str(node.target)] = tensor
        self.likes[str(node.target)] = name
        self.created.append(node)
        return node

    def skip(self, why: str) -> Skip:
        """Leave the match alone."""
        return Skip(why)

    def _insert(self, target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> fx.Node:
        node = self.entry.call(target, *args, before=self.roots[0], like=self.roots[0], **kwargs)
        self.created.append(node)
        return node


def _either_root(result: Any, bound: Bound) -> fx.Node:
    return next(bound.nodes[option] for option in result.options if option in bound.nodes)


Function = Callable[[Match], "fx.Node | tuple[fx.Node, ...] | Skip"]


@dataclass(frozen=True)
class RewritePass(Pass):
    """A pass made from a pattern and a function; made by `rewrite`."""

    name: ClassVar[str] = "rewrite"
    stage: ClassVar[Stage] = Stage.FOLD

    @property
    def contract(self) -> Contract:
        """What `rewrite` was given."""
        return self._promise  # type: ignore[attr-defined, no-any-return]

    def run(self, program: Program, context: PassContext) -> None:
        """Apply the rewrite wherever it matches, until it matches nowhere."""
        apply(program, context, type(self)._pattern, type(self)._function, type(self)._single_use)  # type: ignore[attr-defined]


def rewrite(pattern: Callable[..., Any], *, contract: Contract, stage: Stage = Stage.FOLD, single_use: bool = True) -> Callable[[Function], RewritePass]:
    """Make a pass from a function.

    Args:
        pattern: a lambda of `op` and variables; see `sparc.pattern`.
        contract: what the rewrite promises.
        stage: where in a recipe it is legal.
        single_use: require that nothing outside the match reads its inner values (except decoded weights); otherwise they may stay.

    Returns:
        A decorator from `Match -> replacement | Skip` to a Pass of the function's name. The function's docstring is its equation.
    """

    def decorate(function: Function) -> RewritePass:
        namespace = {
            "name": function.__name__,
            "stage": stage,
            "__doc__": function.__doc__,
            "__module__": function.__module__,
            "_promise": contract,
            "_pattern": trace(pattern),
            "_function": staticmethod(function),
            "_single_use": single_use,
        }
        made = dataclass(frozen=True)(type(function.__name__, (RewritePass,), namespace))
        return made()

    return decorate


def apply(program: Program, context: PassContext, pattern: Pattern, function: Function, single_use: bool = True) -> None:
    """Rewrite every match in every entry, in graph order; each edit is recorded so that the driver can check it."""
    for name, entry in program.entries.items():
        for node in list(entry.graph.nodes):
            if node.op != "call_function" or not node.users or _erased(node):
                continue
            bound = match(pattern, node)
            if bound is None:
                continue
            found = Match(program, entry, pattern, bound)
            reason = _outside_use(found) if single_use else None
            if reason:
                context.skip(node, reason)
                continue
            if not context.edit():
                return
            result = function(found)
            if isinstance(result, Skip):
                context.edits -= 1
                _discard(program, found)
                context.skip(node, result.why)
                continue
            _replace(program, name, context, found, result if isinstance(result, tuple) else (result,))
    program.sweep()


def _erased(node: fx.Node) -> bool:
    return bool(getattr(node, "_erased", False))


def _outside_use(found: Match) -> str | None:
    inside = set(found.nodes)
    for node in found.nodes:
        if node in found.roots or is_decode(node):
            continue
        outside = [user for user in node.users if user not in inside]
        if outside:
            return f"an inner value is also read by {outside[0].name}"
    return None


def _discard(program: Program, found: Match) -> None:
    for node in reversed(found.created):
        if not node.users:
            node.graph.erase_node(node)
    for name in found.wide:
        program.weights.remove(name)


def _replace(program: Program, entry: str, context: PassContext, found: Match, results: tuple[fx.Node, ...]) -> None:
    created = set(found.created)
    before_inner, after_inner = set(found.nodes), created
    boundary = dict.fromkeys([*_inputs(found.roots, before_inner), *_inputs(results, after_inner)])
    before = region(found.roots, before_inner, boundary)
    after = region(results, after_inner, boundary)
    used = {str(node.target) for graph in (before, after) for node in graph.nodes if node.op == "get_attr"}
    weights = {name: program.weights[name] for name in used}
    names = tuple(node.name for node in boundary)
    context.rewrites.append(Rewrite(location(found.roots[0]), before, after, names, dict(found.wide), weights, entry))
    for root, result in zip(found.roots, results, strict=True):
        root.replace_all_uses_with(result)
    for root in found.roots:
        _erase_dead(root)
    for new, old in found.likes.items():
        _take_over_name(program, new, old)


def _erase_dead(node: fx.Node) -> None:
    if node.op != "call_function" or node.users or _erased(node):
        return
    inputs = node.all_input_nodes
    node.graph.erase_node(node)
    for used in inputs:
        _erase_dead(used)


def _take_over_name(program: Program, new: str, old: str) -> None:
    """A replacement keeps the user's name of what it replaced, once nothing else reads that."""
    nodes = [node for entry in program.entries.values() for node in entry.graph.nodes if node.op == "get_attr" and node.target == old]
    if any(node.users for node in nodes) or old not in program.weights:
        return
    for node in nodes:
        node.graph.erase_node(node)
    program.weights.remove(old)
    program.rename_weight(new, old)


def _inputs(results: Iterable[fx.Node], inner: set[fx.Node]) -> list[fx.Node]:
    """The nodes outside `inner` that the computation of `results` reads; weights are no inputs."""
    found: dict[fx.Node, None] = {}
    seen: set[fx.Node] = set()
    stack = list(results)
    while stack:
        node = stack.pop()
        if node in seen or node.op == "get_attr":
            continue
        seen.add(node)
        if node in inner:
            stack.extend(node.all_input_nodes)
        else:
            found.setdefault(node)
    return list(found)


def region(results: Sequence[fx.Node], inner: set[fx.Node], boundary: Iterable[fx.Node]) -> fx.Graph:
    """A graph of its own that computes `results` from `boundary` through the `inner` nodes and weights."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in boundary:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)

    def copy(node: fx.Node) -> fx.Node:
        if node not in copies:
            for used in node.all_input_nodes:
                copy(used)
            copies[node] = graph.node_copy(node, lambda used: copies[used])
            copies[node].meta = dict(node.meta)
        return copies[node]

    graph.output([copy(result) for result in results])
    return graph
