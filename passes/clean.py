"""What every recipe starts and ends with: operators without effect, equal computations, and dead code go. All are
Exact.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from sparc.analysis.values import is_deterministic, same_bits, size_expression
from sparc.contract import Contract, Exact
from sparc.pass_base import Pass, PassContext, Stage
from sparc.passes.noops import replacement
from sparc.program import Entry, Program

_VIEWS = {
    "alias", "detach", "view", "reshape", "_unsafe_view", "expand", "permute", "transpose", "t", "slice", "select",
    "squeeze", "unsqueeze", "unflatten", "flatten", "split", "split_with_sizes", "chunk", "unbind", "getitem", "to",
    "contiguous", "dropout", "lift_fresh",
}  # fmt: skip
_STRIDED_VIEWS = {"view", "_unsafe_view"}
_NEEDS_STRIDES = {"as_strided", "view_as_complex", "view"}


@dataclass(frozen=True)
class _CleanPass(Pass):
    """An Exact pass that is legal anywhere, since it changes no value."""

    stage: ClassVar[Stage] = Stage.CANONICALIZE

    @property
    def contract(self) -> Contract:
        """Bitwise."""
        return Exact()


@dataclass(frozen=True)
class RemoveNoOps(_CleanPass):
    """Remove operators that the types prove to be identities, and write views in one way.

    `slice(x, full range)`, `x * 1`, `to(x, its own dtype)`, `clone`, `contiguous`, `dropout` in eval mode, an `expand`
    or `permute` that changes nothing => `x`; `transpose(transpose(x))`, `reshape(reshape(x))` => one; `view`,
    `_unsafe_view` => `reshape`; `to.*`, `type_as` => `to.dtype`; `multiply` => `mul`, `movedim` => `permute` and other
    second names. A copy that an output reads stays, so that no output
    shares memory with a weight or an input.
    """

    name: ClassVar[str] = "remove_no_ops"

    def run(self, program: Program, context: PassContext) -> None:
        """Views first, since `view` needs strides that removing a copy would change; then in graph order, inputs
        before users.
        """
        for views_only in (True, False):
            for _, node in program.nodes():
                if node.op == "call_function" and (not views_only or operator_key(node) in _STRIDED_VIEWS):
                    self._simplify(program, node, context)
        program.sweep()

    def _simplify(self, program: Program, node: fx.Node, context: PassContext) -> None:
        found = replacement(program, node)
        if (
            found is None
            or (found.copies and (is_output_alias(node) or _feeds_stride_reader(node)))
            or not context.edit()
        ):
            return
        if found.call is not None:
            node.target, node.args, node.kwargs = *found.call, dict(found.kwargs)
            self._simplify(program, node, context)  # two reshapes in one may have no effect at all
            return
        node.replace_all_uses_with(found.value)
        node.graph.erase_node(node)


def operator_key(node: fx.Node) -> str:
    """The operator's name without overload."""
    return str(getattr(node.target, "_opname", None) or getattr(node.target, "__name__", node.target))


def is_output_alias(node: fx.Node) -> bool:
    """Whether an output is this value, or may be a view of it."""
    return _reaches(node, lambda user: user.op == "output")


def _feeds_stride_reader(node: fx.Node) -> bool:
    return _reaches(node, lambda user: user.op == "call_function" and operator_key(user) in _NEEDS_STRIDES)


def _reaches(node: fx.Node, wanted: Callable[[fx.Node], bool]) -> bool:
    stack, seen = [node], {node}
    while stack:
        for user in stack.pop().users:
            if wanted(user):
                return True
            if user.op == "call_function" and operator_key(user) in _VIEWS and user not in seen:
                seen.add(user)
                stack.append(user)
    return False


@dataclass(frozen=True)
class MergeCommon(_CleanPass):
    """Compute equal values once: equal calls of equal arguments, symbolic sizes with equal expressions, weights with
    equal bits.

    Trainable vectors stay apart (two normalisations that happen to start at one are not tied). Two outputs stay two
    tensors.
    """

    name: ClassVar[str] = "merge_common"

    def run(self, program: Program, context: PassContext) -> None:
        """Weights first, then nodes in graph order."""
        self._merge_weights(program, context)
        for entry in program.entries.values():
            self._merge_nodes(program, entry, context)
        program.sweep()

    def _merge_nodes(self, program: Program, entry: Entry, context: PassContext) -> None:
        known: dict[Any, fx.Node] = {}
        for node in list(entry.graph.nodes):
            if node.op != "call_function" or not is_deterministic(node):
                continue
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt):
                key: Any = ("size", size_expression(value))
            else:
                key = (node.target, _key(node.args), _key(dict(node.kwargs)))
            first = known.setdefault(key, node)
            if first is node or (isinstance(value, Tensor) and is_output_alias(node) and is_output_alias(first)):
                continue
            if not context.edit():
                return
            node.replace_all_uses_with(first)
            entry.graph.erase_node(node)

    def _merge_weights(self, program: Program, context: PassContext) -> None:
        buckets: dict[Any, list[str]] = {}
        for name in list(program.weights):
            record = program.weights.record(name)
            if record.grid is not None or (record.trainable and record.tensor.ndim < 2):
                continue
            bucket = buckets.setdefault(_summary(record.tensor), [])
            first = next((each for each in bucket if same_bits(program.weights[each], record.tensor)), None)
            if first is None:
                bucket.append(name)
            elif context.edit():
                merge_weight(program, name, first)


def merge_weight(program: Program, name: str, into: str) -> None:
    """Let every use of one weight read another with the same bits; the other takes over its origins and its name as an
    alias.
    """
    for entry in program.entries.values():
        for node in [node for node in entry.graph.nodes if node.op == "get_attr" and node.target == name]:
            node.replace_all_uses_with(program.weight_node(entry, into))
            entry.graph.erase_node(node)
    gone, kept = program.weights.record(name), program.weights.record(into)
    origins = tuple(dict.fromkeys((*kept.origins, *gone.origins)))
    program.weights.put(into, replace(kept, origins=origins, trainable=kept.trainable or gone.trainable))
    program.weights.remove(name)
    for alias, target in list(program.weights.aliases.items()):
        if target == name:
            program.weights.aliases[alias] = into
    if name in gone.origins:
        program.weights.aliases[name] = into


def _summary(tensor: Tensor) -> Any:
    """Equal for equal tensors, and cheap: type, and some elements."""
    flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().flatten()
    step = max(1, flat.numel() // 64)
    return tensor.dtype, tuple(tensor.shape), repr(flat[::step][:65].tolist())


def _key(value: Any) -> Any:
    """A hashable form of arguments in which 1, 1.0 and True differ."""
    if isinstance(value, (list, tuple)):
        return ("list", *(_key(item) for item in value))
    if isinstance(value, dict):
        return ("dict", *((name, _key(item)) for name, item in sorted(value.items())))
    if isinstance(value, (bool, int, float, complex)):
        return type(value).__name__, repr(value)
    return value


@dataclass(frozen=True)
class RemoveDead(_CleanPass):
    """Remove nodes that no output reads, and weights that no entry reads."""

    name: ClassVar[str] = "remove_dead"

    def run(self, program: Program, context: PassContext) -> None:
        """Sweep."""
        program.sweep()
