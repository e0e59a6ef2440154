"""Make a captured graph pure: in-place operators become functional ones, wrappers without effect are inlined.

Which values share memory is known exactly: the example values that torch.export records share storages as the model's
do. A write to a view becomes a write to its base (`slice` turns into `slice_scatter`), and the views of the base that
are read later are taken again from the new base.
"""

import operator
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode

from sparc import codes
from sparc.diag import CaptureError, Location
from sparc.pattern import normalized_arguments
from sparc.source import source_line

aten = torch.ops.aten

_TYPE_ONLY = {"detach_", "squeeze_", "unsqueeze_", "transpose_", "t_", "swapaxes_", "swapdims_"}
_LISTS = ("split", "split_with_sizes", "chunk", "unbind")
_SAME = ("alias", "detach", "to", "contiguous", "lift_fresh", "type_as", "dropout", "resolve_conj", "resolve_neg")
_RESHAPED = ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as", "reshape_as")
_ALWAYS_VIEWS = ("slice", "select", "transpose", "permute", "unsqueeze", "t", "view")
_WRAPPERS = ("wrap_with_set_grad_enabled", "wrap_with_autocast")


class Graphed(Protocol):
    """A captured graph and the module that holds the bodies of its higher-order operators."""

    @property
    def graph(self) -> fx.Graph:
        """The graph."""
        ...

    @property
    def graph_module(self) -> fx.GraphModule:
        """The module."""
        ...


def is_impure(node: fx.Node) -> bool:
    """Whether a node returns nothing, so that it could only matter by a side effect."""
    return isinstance(node.target, OpOverload) and not node.target._schema.returns


def is_mutable(node: fx.Node) -> bool:
    """Whether a node writes to one of its arguments."""
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def draws(node: fx.Node) -> bool:
    """Whether a node's result depends on random numbers: dropout of nothing, or outside training, does not."""
    if not isinstance(node.target, OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    given = normalized_arguments(node)
    off = any(given.get(name) is False for name in ("train", "training"))
    return not off and given.get("dropout_p", given.get("p")) != 0


def functionalize(exported: Graphed) -> None:
    """Remove in-place operators and higher-order wrappers from the graph of an exported program.

    Raises:
        CaptureError: SPARC105 when a weight or an input is written to, SPARC111 for control flow and for in-place
            operators without a functional twin.
    """
    graph, owner = exported.graph, exported.graph_module
    for node in list(graph.nodes):
        if isinstance(node.target, HigherOrderOperator):
            _inline(owner, node)
    if any(is_mutable(node) for node in graph.nodes):
        _Writes(exported).remove()


def refusal(node: fx.Node, what: str, why: str = "", code: codes.Code = codes.UNSUPPORTED_OPERATOR) -> CaptureError:
    """An error that names the user's line of a captured node."""
    return CaptureError(code, what, where=Location("", source_line(str(node.meta.get("stack_trace") or ""))), why=why)


# higher-order operators ----------------------------------------------------------------------------------------------
def _inline(owner: torch.nn.Module, node: fx.Node) -> None:
    """Put the body of a wrapper that only sets gradients or a disabled autocast in the place of its call."""
    name = str(node.target)
    if name not in _WRAPPERS:
        raise refusal(node, f"operator {name} is not supported", "it is control flow, or calls back into Python")
    position = next(
        index for index, each in enumerate(node.args) if isinstance(each, fx.Node) and each.op == "get_attr"
    )
    if name == "wrap_with_autocast" and node.args[2]:
        raise refusal(node, "autocast is not supported", "the program would hide the casts", codes.UNSUPPORTED_OPERATOR)
    body = owner.get_submodule(str(node.args[position].target))  # type: ignore[union-attr]
    assert isinstance(body, fx.GraphModule)
    feed = iter(node.args[position + 1 :])
    copies: dict[fx.Node, Any] = {}
    results: Any = ()
    for inner in body.graph.nodes:
        if inner.op == "placeholder":
            copies[inner] = next(feed)
        elif inner.op == "output":
            results = fx.node.map_arg(inner.args[0], lambda used: copies[used])
        else:
            with node.graph.inserting_before(node):
                copies[inner] = node.graph.node_copy(inner, lambda used: copies[used])
            if isinstance(copies[inner].target, HigherOrderOperator):
                _inline(body, copies[inner])
    for user in list(node.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(results[user.args[1]])
            node.graph.erase_node(user)
    if node.users:
        node.replace_all_uses_with(results[0] if isinstance(results, (tuple, list)) else results)
    node.graph.erase_node(node)


# in-place operators --------------------------------------------------------------------------------------------------
class _Writes:
    """Removes the writes of one graph, in order."""

    def __init__(self, exported: Graphed) -> None:
        self.graph = exported.graph
        values = [node.meta.get("val") for node in self.graph.nodes]
        mode = torch._guards.detect_fake_mode([value for value in values if isinstance(value, Tensor)])
        assert isinstance(mode, FakeTensorMode)
        self.mode = mode
        self.position = {node: index for index, node in enumerate(self.graph.nodes)}
        self.memory = self._memories()
        for node in self.graph.nodes:
            if node.target is aten.lift_fresh_copy.default:  # torch records the constant's own memory for its copy
                self.memory[node.args[0]] = None
        self.roots: set[fx.Node] = set()  # new values of whole tensors: no views of what they are computed from

    def _memories(self) -> dict[fx.Node, int | None]:
        """What memory every value lies in. Programs that were saved record types only: they are run again."""
        views = [node for node in self.graph.nodes if getattr(node.target, "_opname", "") in _ALWAYS_VIEWS]
        values = {node: node.meta.get("val") for node in self.graph.nodes}
        if all(memory_of(values[node]) == memory_of(values[node.args[0]]) for node in views):  # type: ignore[index]
            return {node: memory_of(value) for node, value in values.items()}
        with self.mode, torch.no_grad():
            for node in self.graph.nodes:
                if node.op == "call_function":
                    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda used: values[used])
                    values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return {node: memory_of(value) for node, value in values.items()}

    def remove(self) -> None:
        """Replace every in-place operator."""
        for node in list(self.graph.nodes):
            if is_mutable(node):
                self._replace(node)

    def _replace(self, node: fx.Node) -> None:
        schema = node.target._schema.arguments  # type: ignore[union-attr]
        written = node.args[0] if node.args else None
        writes = [each for each in schema if each.alias_info is not None and each.alias_info.is_write]
        if not isinstance(written, fx.Node) or len(writes) != 1 or writes[0] is not schema[0]:
            raise refusal(
                node, f"operator {node.target} is not supported", "it writes to other arguments than its first"
            )
        memory = self.memory[written]
        here = self.position[node]
        earlier = [each for each, known in self.memory.items() if known is not None and known == memory]
        family = sorted((each for each in earlier if each is not node), key=lambda each: self.position[each])
        family = [each for each in family if self.position[each] <= here]
        type_only = node.target._opname in _TYPE_ONLY  # type: ignore[union-attr]
        if not type_only:
            self._refuse_state(node, family)
        with self.graph.inserting_before(node):
            new = self._functional(node, written)
            if not type_only and any(self._read_after(each, node) for each in family if each is not written):
                new = self._write_through(node, written, new, family)
            elif not type_only:
                self.roots.add(new)
            self.memory[new] = memory
            self._redirect(node, written, new)
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)
        del self.memory[node]

    def _refuse_state(self, node: fx.Node, family: list[fx.Node]) -> None:
        owner = next((each for each in family if each.op == "placeholder"), None)
        if owner is not None:
            raise refusal(node, f"the model writes to {owner.name!r}", code=codes.UNSUPPORTED_STATE)

    def _functional(self, node: fx.Node, written: fx.Node) -> fx.Node:
        """The new value of what is written, in its own type."""
        name, rest = node.target._opname, node.args[1:]  # type: ignore[union-attr]
        kind: Tensor = written.meta["val"]
        if name == "copy_":
            new = self._call(node, aten.expand_as.default, self._cast(node, rest[0], kind.dtype), written)
        elif name in ("fill_", "zero_"):
            value = rest[0] if rest else 0
            filled = self._call(node, aten.zeros_like.default, written)
            new = filled if not rest else self._filled(node, filled, value, kind)
        elif name == "detach_":
            new = self._call(node, aten.alias.default, written)
        else:
            new = self._cast(node, self._call(node, _twin(node), written, *rest, **node.kwargs), kind.dtype)
        return new

    def _filled(self, node: fx.Node, like: fx.Node, value: Any, kind: Tensor) -> fx.Node:
        if isinstance(value, fx.Node) and isinstance(value.meta.get("val"), Tensor):
            return self._call(node, aten.expand_as.default, self._cast(node, value, kind.dtype), like)
        return self._call(node, aten.full_like.default, like, value)

    def _cast(self, node: fx.Node, value: Any, dtype: torch.dtype) -> fx.Node:
        return value if value.meta["val"].dtype == dtype else self._call(node, aten.to.dtype, value, dtype)  # type: ignore[no-any-return]

    def _call(self, like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        new = self.graph.call_function(target, args, kwargs)
        new.meta = {key: value for key, value in like.meta.items() if key in ("stack_trace", "nn_module_stack")}
        values, options = fx.node.map_arg((args, kwargs), lambda used: used.meta["val"])
        with self.mode, torch.no_grad():
            new.meta["val"] = target(*values, **options)
        self.position[new] = self.position[like]
        self.memory[new] = None
        return new

    # views ------------------------------------------------------------------------------------------------------------
    def _read_after(self, node: fx.Node, write: fx.Node) -> bool:
        return any(self.position[user] > self.position[write] for user in node.users)

    def _redirect(self, write: fx.Node, old: fx.Node, new: fx.Node) -> None:
        for user in list(old.users):
            if self.position[user] > self.position[write]:
                user.replace_input_with(old, new)

    def _parent(self, node: fx.Node) -> fx.Node | None:
        """What a node is a view of."""
        source = node.args[0] if node.op == "call_function" and node.args else None
        if node in self.roots or not isinstance(source, fx.Node):
            return None
        known = self.memory[source]
        return source if known is not None and known == self.memory[node] else None

    def _write_through(self, write: fx.Node, written: fx.Node, new: fx.Node, family: list[fx.Node]) -> fx.Node:
        """Write a view's new value into its base, and take all views from it again; returns the written one."""
        memory = self.memory[written]
        view, value = written, new
        while (parent := self._parent(view)) is not None:
            value = self._inverse(write, view, parent, value)
            view = parent
        self.roots.add(value)
        replaced = {view: value}
        for each in family:
            source = self._parent(each)
            if source in replaced:
                replaced[each] = self._call(write, each.target, replaced[source], *each.args[1:], **each.kwargs)
        for old, again in replaced.items():
            self.memory[again] = memory
            self._redirect(write, old, again)
        return replaced[written]

    def _inverse(self, write: fx.Node, view: fx.Node, parent: fx.Node, value: fx.Node) -> fx.Node:
        """The parent with the view's elements replaced."""
        name = getattr(view.target, "_opname", None) or getattr(view.target, "__name__", "")
        rest = view.args[1:]
        if name == "slice":
            return self._call(write, aten.slice_scatter.default, parent, value, *rest)
        if name in ("select", "diagonal"):
            scatter = aten.select_scatter.default if name == "select" else aten.diagonal_scatter.default
            return self._call(write, scatter, parent, value, *rest)
        if name in ("transpose", "t"):
            return self._call(write, view.target, value, *rest)
        if name == "permute":
            rank = len(rest[0])  # type: ignore[arg-type]
            order = [int(axis) % rank for axis in rest[0]]  # type: ignore[arg-type, union-attr]
            return self._call(write, aten.permute.default, value, [order.index(axis) for axis in range(rank)])
        if name in _SAME:
            return value
        if name in _RESHAPED:
            return self._call(write, aten.reshape.default, value, self._sizes(write, parent))
        if view.target is operator.getitem:
            return self._piece(write, view, parent, value)
        if name in _LISTS:
            return value.args[0]  # type: ignore[return-value]
        raise refusal(
            write, f"a write through {name} is not supported", "its memory overlaps, or cannot be scattered back"
        )

    def _piece(self, write: fx.Node, view: fx.Node, parent: fx.Node, value: fx.Node) -> fx.Node:
        """A piece of a split or unbind, written back; `parent` is the list of pieces, and so is its new value."""
        source: Any = parent.args[0]
        axis, index = int(normalized_arguments(parent)["dim"]), int(view.args[1])  # type: ignore[arg-type]
        if "unbind" in str(parent.target):
            whole = self._call(write, aten.select_scatter.default, source, value, axis, index)
        else:
            sizes = [piece.shape[axis] for piece in parent.meta["val"]]
            if not all(isinstance(size, int) for size in sizes):
                raise refusal(write, "a write to a piece of a split of varying sizes is not supported")
            start = sum(sizes[:index])
            whole = self._call(write, aten.slice_scatter.default, source, value, axis, start, start + sizes[index])
        return self._call(write, parent.target, whole, *parent.args[1:], **parent.kwargs)

    def _sizes(self, write: fx.Node, node: fx.Node) -> list[Any]:
        shape = node.meta["val"].shape
        return [
            size if isinstance(size, int) else self._call(write, aten.sym_size.int, node, axis)
            for axis, size in enumerate(shape)
        ]


def memory_of(value: Any) -> int | None:
    """Equal for values that share memory."""
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def _twin(node: fx.Node) -> OpOverload:
    """The functional operator of an in-place one: `add_` and `add`, `__ior__` and `__or__`."""
    target: Any = node.target
    name = target._opname
    plain = name.replace("__i", "__", 1) if name.startswith("__i") else name.removesuffix("_")
    packet = getattr(getattr(torch.ops, target.namespace), plain, None)
    overload = getattr(packet, target._overloadname, None)
    if plain == name or overload is None or torch.Tag.nondeterministic_seeded in target.tags:
        raise refusal(node, f"operator {target} is not supported", "it has no functional twin, or draws random numbers")
    return overload  # type: ignore[no-any-return]
