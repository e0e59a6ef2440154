"""One entry becomes one ONNX graph: nodes are visited in order, each goes to the first translation that takes it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import onnx_ir as ir
import sympy
import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from sparc import codes
from sparc import layout as layouts
from sparc.cache import KEEP
from sparc.codegen.onnx.build import Builder
from sparc.codegen.onnx.sizes import Size, Sizes, expression
from sparc.codegen.onnx.store import Origin, Store, initializer
from sparc.codegen.onnx.types import onnx_type
from sparc.diag import Diagnostics, LoweringError
from sparc.encoding.operators import is_quantize
from sparc.program import Entry, Program, is_weight, location
from sparc.target import KernelUse
from sparc.text import dim_text

if TYPE_CHECKING:
    from sparc.codegen.onnx.target import OnnxTarget

Result = ir.Value | Sequence[ir.Value | None] | None
Translation = Callable[..., Result]
_LAZY = ("sparc.decode.default", "sparc.quantize.default")
MS = "com.microsoft"


class Rule(Protocol):
    """A translation of regions: called on every node before the tables, it answers None where it does not apply."""

    def __call__(self, e: "Emitter", node: fx.Node) -> Result:
        """The node's value."""
        ...


class Emitter:
    """Emits one entry; translations get it as their first argument.

    Args:
        program: the program; not edited.
        entry: the entry to emit.
        target: flavour and opset.
        store: the stored tensors, shared by all entries.
        kernels: filled with what carries each compressed weight.
        diagnostics: where remarks go. `notes` say by site why a weight is not carried in its encoded form.
        table: translations by operator (`aten.add.Tensor`).
        rules: region translations, tried first.
        fallback: the translation of what the table lacks.
        lazy: nodes to emit only when something reads them.
    """

    def __init__(
        self,
        program: Program,
        entry: Entry,
        target: "OnnxTarget",
        store: Store,
        kernels: dict[str, KernelUse],
        diagnostics: Diagnostics,
        table: Mapping[str, Translation],
        rules: Sequence[Rule],
        fallback: Translation,
        lazy: AbstractSet[fx.Node] = frozenset(),
    ) -> None:
        self.program, self.entry, self.target = program, entry, target
        self.store, self.kernels, self.diagnostics = store, kernels, diagnostics
        self.table, self.rules, self.fallback, self.lazy = table, rules, fallback, lazy
        names = [*entry.signature.input_names, *entry.signature.output_names]
        self.builder = Builder(reserved=[*names, *program.weights])
        self.sizes = Sizes(self.builder)
        self.notes: dict[str, str] = {}
        self._values: dict[fx.Node, Any] = {}
        self._initializers: dict[str, ir.Value] = {}
        self._inputs: list[ir.Value] = []

    # the walk ---------------------------------------------------------------------------------------------------------
    def run(self, name: str) -> ir.Graph:
        """The entry's graph.

        Raises:
            LoweringError: SPARC401 with the user's source line when an operator has no translation.
        """
        for node, wish in zip(self.entry.placeholders, self.entry.signature.input_names, strict=True):
            self._input(node, wish)
        for node in self.entry.graph.nodes:
            lazy = str(node.target) in _LAZY or node in self.lazy
            if node.op == "call_function" and not lazy and node not in self._values:
                self._emit(node)
        outputs = self._outputs()
        nodes = self.builder.finish(outputs)
        read = {id(value): value for node in nodes for value in _all_inputs(node) if value.const_value is not None}
        read |= {id(value): value for value in self._inputs if value.const_value is not None}
        return ir.Graph(
            self._inputs,
            outputs,
            nodes=nodes,
            initializers=list(read.values()),
            name=name,
            opset_imports={"": self.target.opset},
        )

    @cached_property
    def quantizes_statically(self) -> bool:
        """Whether the entry quantizes an activation with given parameters."""
        return any(is_quantize(node) and bool(node.args[1]) for node in self.entry.graph.nodes)

    def _input(self, node: fx.Node, name: str) -> None:
        value = ir.Value(name=name)
        self._type(value, node.meta["val"])
        self.sizes.learn(value, node.meta["val"])
        if name == KEEP and self.entry.cache is not None:  # callers who leave it out want the last token's logits
            value.const_value = ir.tensor(np.array([-1]), name=name)
        self._inputs.append(value)
        self._values[node] = value

    def _emit(self, node: fx.Node) -> None:
        fake = node.meta.get("val")
        if isinstance(fake, (torch.SymInt, int)) and not isinstance(fake, bool) and self._is_known(fake):
            self._values[node] = fake
            return
        outer, self.builder.scope = self.builder.scope, str(node.meta.get("module", ""))
        try:
            result = self._translate(node)
        except LoweringError as error:
            if error.diagnostic.where.module or error.diagnostic.where.source:
                raise
            found = error.diagnostic
            raise LoweringError(found.code, found.what, where=location(node), why=found.why, hint=found.hint) from None
        self.builder.scope = outer
        self._keep(node, result, fake)

    def _is_known(self, fake: Any) -> bool:
        expr = expression(fake)
        return all(self.sizes.knows(symbol) for symbol in expr.free_symbols)

    def _translate(self, node: fx.Node) -> Result:
        for rule in self.rules:
            result = rule(self, node)
            if result is not None:
                return result
        name = (
            str(node.target)
            if isinstance(node.target, OpOverload)
            else getattr(node.target, "__name__", str(node.target))
        )
        translation = self.table.get(f"complex {name}" if _is_complex(node) and name != "getitem" else name)
        if translation is not None:
            result = translation(self, node, *node.args, **node.kwargs)
            if result is not None:
                return result
        return self.fallback(self, node)

    def _keep(self, node: fx.Node, result: Any, fake: Any) -> None:
        self._values[node] = result
        if isinstance(result, ir.Value):
            if isinstance(fake, Tensor):
                self._type(result, fake)
                self.sizes.learn(result, fake)
            elif isinstance(fake, torch.SymInt):
                self.sizes.learn_scalar(result, fake.node.expr)
                self._values[node] = fake
        elif isinstance(result, Sequence) and isinstance(fake, (list, tuple)):
            for value, each in zip(result, fake, strict=False):
                if isinstance(value, ir.Value) and isinstance(each, Tensor):
                    self._type(value, each)
                    self.sizes.learn(value, each)

    def _type(self, value: ir.Value, fake: Tensor) -> None:
        if value.type is not None and value.shape is not None:
            return
        value.type = ir.TensorType(onnx_type(fake.dtype))
        pair = [2] if fake.dtype.is_complex else []
        value.shape = ir.Shape([*[_dim(size, self.entry) for size in fake.shape], *pair])

    def _outputs(self) -> list[ir.Value]:
        outputs: list[ir.Value] = []
        results = list(self.entry.output.args[0])  # type: ignore[arg-type]
        for node, name in zip(results, self.entry.signature.output_names, strict=True):
            value = self.value(node)
            if value.producer() is None or value in outputs:
                self.builder.scope = ""
                value = self.op("Identity", value)
                self._type(value, node.meta["val"])
            value.name = name
            outputs.append(value)
        return outputs

    # what translations use --------------------------------------------------------------------------------------------
    def value(self, arg: Any) -> ir.Value:
        """The ONNX value of a graph node (emitted now, if it has not been), a size, or a value itself."""
        if isinstance(arg, ir.Value):
            return arg
        if isinstance(arg, fx.Node):
            found = self.result(arg)
            if isinstance(found, ir.Value):
                return found
            arg = found
        if isinstance(arg, (torch.SymInt, int)):
            return self.sizes.scalar(arg)
        raise LoweringError(codes.NO_TRANSLATION, f"{arg!r} is no tensor")

    def assign(self, node: fx.Node, value: Any) -> None:
        """Give a node of a decomposition the value it stands for."""
        self._values[node] = value

    def result(self, node: fx.Node) -> Any:
        """What a node was translated to: a value, several, or a size."""
        if node not in self._values:
            if is_weight(node):
                self._values[node] = self.weight(str(node.target))
            else:
                self._emit(node)
        return self._values[node]

    def weight(
        self,
        name: str,
        layout: str = layouts.IDENTITY,
        shape: Sequence[int] = (),
        *,
        dtype: ir.DataType | None = None,
        dims: Sequence[int] | None = None,
        part: int | None = None,
    ) -> ir.Value:
        """An initializer over a program weight stored in a layout; `dtype` and `dims` re-read the stored bytes, `part`
        only those of one place on the first axis.
        """
        return self._initializer(initializer(self.store.weight(name, layout, shape), dtype, dims, part))

    def derived(
        self,
        name: str,
        tensor: Tensor,
        layout: str = layouts.IDENTITY,
        shape: Sequence[int] = (),
        *,
        dtype: ir.DataType | None = None,
        dims: Sequence[int] | None = None,
        part: int | None = None,
        of: Origin | None = None,
    ) -> ir.Value:
        """An initializer over a tensor computed while emitting; arguments as for `weight`, `of` for what it stores."""
        return self._initializer(initializer(self.store.derived(name, tensor, layout, shape, of), dtype, dims, part))

    def carry(self, site: str, kernel: KernelUse) -> None:
        """Note what carries a weight; of several operators that hold it in memory, all are named and added up."""
        kernel = replace(kernel, note=kernel.note or self.notes.get(site, ""))
        known = self.kernels.get(site)
        if known is None:
            self.kernels[site] = kernel
        elif kernel.operator not in known.operator.split(" + "):
            operator = f"{known.operator} + {kernel.operator}"
            self.kernels[site] = KernelUse(
                operator, known.resident_bytes + kernel.resident_bytes, known.note or kernel.note
            )

    def _initializer(self, value: ir.Value) -> ir.Value:
        return self._initializers.setdefault(str(value.name), value)

    def op(self, operator: str, *inputs: Any, domain: str = "", outputs: int = 1, **attributes: Any) -> Any:
        """Insert an operator.

        Args:
            operator: its name.
            inputs: nodes, values, None for an omitted input, or lists of sizes (which become int64 vectors).
            domain: its operator set.
            outputs: how many results; one is returned as it is, several as a sequence.
            attributes: its attributes; None is left out.
        """
        made = self.builder.node(operator, [self._input_value(arg) for arg in inputs], attributes, outputs, domain)
        return made[0] if outputs == 1 else made

    def _input_value(self, arg: Any) -> ir.Value | None:
        if arg is None:
            return None
        if isinstance(arg, (list, tuple)):
            return self.ints(arg)
        return self.value(arg)

    def ints(self, items: Iterable[Any]) -> ir.Value:
        """An int64 vector of sizes and integers."""
        return self.sizes.vector([self.size(item) for item in items])

    def size(self, item: Any) -> Size:
        """A size: an integer, or a symbolic one (taken from the node that computes it)."""
        if isinstance(item, fx.Node):
            found = self.result(item)
            if isinstance(found, (int, torch.SymInt)):
                return found
            raise LoweringError(codes.NO_TRANSLATION, f"{item} is no size", where=location(item))
        return item

    def const(self, number: Any, dtype: torch.dtype | ir.DataType) -> ir.Value:
        """A constant (a number, nested lists of them, or a small numpy array)."""
        return self.builder.constant(number, onnx_type(dtype) if isinstance(dtype, torch.dtype) else dtype)

    def constant_array(self, arg: Any) -> np.ndarray | None:
        """The array behind a value or a node, where it is a small constant."""
        value = self.result(arg) if isinstance(arg, fx.Node) else arg
        return self.builder.array(value) if isinstance(value, ir.Value) else None

    def cast(self, arg: Any, dtype: torch.dtype) -> ir.Value:
        """A node, size or number in a dtype."""
        if isinstance(arg, (bool, int, float)):
            return self.const(arg, dtype)
        if isinstance(arg, fx.Node) and isinstance(arg.meta.get("val"), Tensor):
            if arg.meta["val"].dtype == dtype:
                return self.value(arg)
        elif dtype == torch.int64 and not isinstance(arg, ir.Value):
            return self.value(arg)
        return self.op("Cast", arg, to=onnx_type(dtype))

    def reshape(self, x: Any, old: Sequence[Size], new: Sequence[Size]) -> ir.Value:
        """Reshape without computing sizes where that can be: an axis that stays is 0, one other symbolic one is -1.

        Axes line up from the left, or from the right when leading axes of size one are added to the shorter shape.
        """
        before, after = [expression(size) for size in old], [expression(size) for size in new]
        if before == after:
            return self.value(x)
        if 0 in after or 0 in before:
            return self.op("Reshape", x, self.sizes.vector(after), allowzero=1)
        target = _target(before, after)
        if target is not None:
            return self.op("Reshape", x, self.ints(target))
        more = len(after) - len(before)
        target = _target([*[sympy.Integer(1)] * more, *before], [*[sympy.Integer(1)] * -more, *after])
        if target is None:
            return self.op("Reshape", x, self.sizes.vector(after))
        value = self.op("Unsqueeze", x, list(range(more))) if more > 0 else self.value(x)
        value = self.op("Reshape", value, self.ints(target))
        return self.op("Squeeze", value, list(range(-more))) if more < 0 else value


def _target(before: Sequence[sympy.Expr], after: Sequence[sympy.Expr]) -> list[int] | None:
    """A Reshape's target of plain numbers; None when more than one size would have to be computed."""
    target, unknown = [], 0
    for axis, expr in enumerate(after):
        if expr.is_Integer:
            target.append(int(expr))
        elif axis < len(before) and before[axis] == expr:
            target.append(0)
        else:
            target.append(-1)
            unknown += 1
    return target if unknown <= 1 else None


def _is_complex(node: fx.Node) -> bool:
    """Whether complex numbers go in or come out: they are pairs on a last axis, translated by tables of their own."""
    values = [each.meta.get("val") for each in (node, *node.all_input_nodes)]
    return any(isinstance(value, Tensor) and value.dtype.is_complex for value in values)


def _dim(size: Any, entry: Entry) -> int | str:
    return size if isinstance(size, int) else dim_text(size, entry)


def _all_inputs(node: ir.Node) -> list[ir.Value]:
    """What a node reads, its subgraphs included."""
    read = [value for value in node.inputs if value is not None]
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            inner = attribute.as_graph()
            read += [value for each in inner.all_nodes() for value in each.inputs if value is not None]
            read += list(inner.outputs)
    return read
