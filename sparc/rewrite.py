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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx

from sparc.analysis.values import same_type, size_hint
from sparc.contract import Contract
from sparc.encoding.operators import is_decode
from sparc.match import Match, Skip
from sparc.pass_base import Pass, PassContext, Rewrite, Stage
from sparc.pattern import Found, Pattern, match, trace
from sparc.program import Program, location, weight_nodes
from sparc.region import region, region_inputs

__all__ = ["Find", "Function", "Match", "RewritePass", "Skip", "apply", "rewrite"]

_SWEEPS = 8

Function = Callable[[Match], "fx.Node | tuple[fx.Node, ...] | Skip | None"]


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
        kind: Any = type(self)
        apply(program, context, kind._find, kind._function, single_use=kind._single_use, rule=self.name)


Find = Callable[[Program, fx.Node], "Found | Skip | None"]


def rewrite(
    pattern: Callable[..., Any] | None = None,
    *,
    contract: Contract,
    stage: Stage = Stage.FOLD,
    single_use: bool = True,
    find: Find | None = None,
) -> Callable[[Function], RewritePass]:
    """Make a pass from a function.

    Args:
        pattern: a lambda of `op` and variables; see `sparc.pattern`.
        contract: what the rewrite promises.
        stage: where in a recipe it is legal.
        single_use: require that nothing outside the match reads its inner values (except decoded weights); otherwise
            they may stay.
        find: instead of a pattern, for what calls cannot describe: a function of a program and a node that returns
            what it found there, a `Skip` with the reason why something that looks like it is none, or None.

    Returns:
        A decorator from `Match -> replacement | Skip | None` to a Pass of the function's name. A `Skip` says why
        something that looks like the pattern was left alone; None says that it is something else, which needs no
        remark. The function's docstring is its equation.
    """
    if (pattern is None) == (find is None):
        raise TypeError("rewrite() takes a pattern or find=, one of them")
    finder = find if find is not None else _finder(trace(pattern))  # type: ignore[arg-type]

    def decorate(function: Function) -> RewritePass:
        namespace = {
            "name": function.__name__,
            "stage": stage,
            "__doc__": function.__doc__,
            "__module__": function.__module__,
            "_promise": contract,
            "_find": staticmethod(finder),
            "_function": staticmethod(function),
            "_single_use": single_use,
        }
        kind: type[RewritePass] = type(function.__name__, (RewritePass,), namespace)
        return dataclass(frozen=True)(kind)()

    return decorate


def _finder(pattern: Pattern) -> Find:
    taken = [name for name in pattern.variables if hasattr(Match, name)]
    if taken:
        raise TypeError(f"a pattern's variable cannot be called {taken[0]!r}: Match has an attribute of that name")
    return lambda program, node: match(pattern, node)


def apply(
    program: Program,
    context: PassContext,
    find: Find,
    function: Function,
    *,
    single_use: bool = True,
    rule: str = "",
) -> None:
    """Rewrite every match in every entry, in graph order, until nothing changes; each edit is recorded for the driver
    to check.
    """
    made: dict[str, list[str]] = {}
    for _ in range(_SWEEPS):
        before = context.edits
        for name in program.entries:
            _apply_once(program, name, context, find, function, single_use, rule, made)
        program.sweep()
        if context.edits == before:
            return


def _apply_once(
    program: Program,
    entry: str,
    context: PassContext,
    find: Find,
    function: Function,
    single_use: bool,
    rule: str,
    made: dict[str, list[str]],
) -> None:
    chosen = program.entries[entry]
    for node in list(chosen.graph.nodes):
        if node.op != "call_function" or not node.users or _erased(node):
            continue
        found = find(program, node)
        if found is None:
            continue
        reason = found.why if isinstance(found, Skip) else _outside_use(found) if single_use else None
        place = None if isinstance(found, Skip) else _insertion_point(found)
        if reason is None and place is None:
            reason = "a result is read before all inputs are computed"
        if isinstance(found, Skip) or place is None or reason is not None:
            context.skip(node, str(reason))
            continue
        if not context.edit():
            return
        current = Match(program, chosen, found, place, made)
        result = _settle(current, function(current))
        if isinstance(result, tuple):
            _replace(program, entry, context, current, result, rule)
            continue
        context.edits -= 1
        _discard(program, current)
        if result is not None:
            context.skip(node, result.why)


def _settle(current: Match, result: Any) -> tuple[fx.Node, ...] | Skip | None:
    """What a rewrite's function returned, as results that have the right types."""
    if result is None or isinstance(result, Skip):
        return result
    results: tuple[fx.Node, ...] = result if isinstance(result, tuple) else (result,)
    why = _type_reason(current.roots, results)
    return results if why is None else Skip(why)


def _insertion_point(found: Found) -> fx.Node | None:
    """The node to insert before; None when an outside use of a result comes before an input is known.

    Nodes compare by their places in the graph.
    """
    if len(found.roots) == 1:
        return found.roots[0]
    first = min(found.roots)
    after = max((first, *region_inputs(found.roots, set(found.nodes))))
    outside = (user for root in found.roots for user in root.users if user not in found.nodes)
    if any(user <= after for user in outside):
        return None
    return first if after is first else after.next


def _type_reason(roots: Sequence[fx.Node], results: Sequence[fx.Node]) -> str | None:
    """None when every result has the type of what it replaces, for all sizes.

    Raises:
        TypeError: when the types differ already on the example's sizes.
    """
    for root, result in zip(roots, results, strict=True):
        old, new = root.meta["val"], result.meta["val"]
        if not isinstance(old, Tensor) or same_type(old, new):
            continue
        text = " not ".join(f"{kind.dtype} {[str(size) for size in kind.shape]}" for kind in (new, old))
        hints = [[size_hint(size) for size in kind.shape] for kind in (old, new)]
        if old.dtype != new.dtype or hints[0] != hints[1]:
            raise TypeError(f"the replacement of {root.name} has type {text}")
        return f"the replacement cannot be shown to have the same shape: {text}"
    return None


def _erased(node: fx.Node) -> bool:
    return bool(getattr(node, "_erased", False))


def _outside_use(found: Found) -> str | None:
    inside = set(found.nodes)
    for node in found.nodes:
        if node in found.roots or is_decode(node):
            continue
        outside = [user for user in node.users if user not in inside]
        if outside:
            return f"an inner value is also read by {outside[0].name}"
    return None


def _discard(program: Program, current: Match) -> None:
    for node in reversed(current.created):
        if not node.users and not _erased(node):
            node.graph.erase_node(node)
    if current.created:
        program.sweep()


def _replace(
    program: Program,
    entry: str,
    context: PassContext,
    current: Match,
    results: tuple[fx.Node, ...],
    rule: str,
) -> None:
    created = set(current.created)
    before_inner, after_inner = set(current.nodes), created
    boundary = dict.fromkeys([*region_inputs(current.roots, before_inner), *region_inputs(results, after_inner)])
    before = region(current.roots, before_inner, boundary)
    after = region(results, after_inner, boundary)
    used = {str(node.target) for graph in (before, after) for node in graph.nodes if node.op == "get_attr"}
    weights = {name: program.weights[name] for name in used}
    names = tuple(node.name for node in boundary)
    where = location(current.roots[0])
    context.rewrites.append(Rewrite(where, before, after, names, dict(current.wide), weights, entry, rule))
    for root, result in zip(current.roots, results, strict=True):
        root.replace_all_uses_with(result)
    for root in current.roots:
        _erase_dead(root)
    for new, old in current.likes.items():
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
    nodes = [node for entry in program.entries.values() for node in weight_nodes(entry.graph, old)]
    if any(node.users for node in nodes) or old not in program.weights:
        return
    for node in nodes:
        node.graph.erase_node(node)
    program.weights.remove(old)
    program.rename_weight(new, old)
