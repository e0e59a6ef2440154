"""The stable printer: two equal programs print the same text, whatever their history."""

from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from sparc.program import Entry, Program

_DTYPES = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "bool",
}  # fmt: skip


def program_text(program: Program) -> str:
    """Every entry and every weight it uses, one node a line, numbered in order."""
    return "\n\n".join(entry_text(program, name) for name in program.entries) + "\n"


def entry_text(program: Program, name: str) -> str:
    """One entry as text."""
    entry = program.entries[name]
    labels = node_labels(entry)
    inputs = ", ".join(f"{labels[node]}: {type_text(node.meta['val'], entry)}" for node in entry.placeholders)
    lines = [f"{name}({inputs}):"]
    module = ""
    for node in entry.graph.nodes:
        if node.op == "call_function":
            if node.meta.get("module", "") != module:
                module = node.meta.get("module", "")
                lines.append(f"  # {module or '(top)'}")
            lines.append("  " + node_text(node, entry, labels))
    lines.append(f"  return {', '.join(_value(value, labels) for value in entry.output.args[0])}")  # type: ignore[union-attr]
    if entry.cache is not None:
        over = f", over a source in {len(entry.cache.source)}" if entry.cache.source else ""
        lines.append(f"  cache of {len(entry.cache.slots)} tensors, at most {entry.cache.length} places{over}")
    used = dict.fromkeys(str(node.target) for node in entry.graph.nodes if node.op == "get_attr")
    for weight in used:
        record = program.weights.record(weight)
        grid = f" on {record.grid.spec}" if record.grid is not None else ""
        lines.append(f"  @{weight}: {type_text(record.tensor, entry)}{grid}")
    return "\n".join(lines)


def node_labels(entry: Entry) -> dict[fx.Node, str]:
    """How each node is called in the text: inputs by name, weights by @name, values by number."""
    labels: dict[fx.Node, str] = {}
    names = iter(entry.signature.input_names)
    count = 0
    for node in entry.graph.nodes:
        if node.op == "placeholder":
            labels[node] = next(names)
        elif node.op == "get_attr":
            labels[node] = f"@{node.target}"
        elif node.op == "call_function":
            labels[node] = f"%{count}"
            count += 1
    return labels


def node_text(node: fx.Node, entry: Entry, labels: dict[fx.Node, str] | None = None) -> str:
    """One node: `%3 = linear(%2, @fc.weight, @fc.bias): f32[batch, 8]`."""
    labels = labels or node_labels(entry)
    parts = [_value(arg, labels) for arg in node.args]
    parts += [f"{key}={_value(value, labels)}" for key, value in node.kwargs.items()]
    return (
        f"{labels[node]} = {operator_name(node.target)}({', '.join(parts)}): {type_text(node.meta.get('val'), entry)}"
    )


def operator_name(target: Any) -> str:
    """`linear`, `add.Scalar`, `sparc.decode`, `operator.mul`: the operator without what everybody knows."""
    if isinstance(target, OpOverload):
        namespace = "" if target.namespace == "aten" else target.namespace + "."
        overload = "" if target._overloadname == "default" else "." + target._overloadname
        return f"{namespace}{target._opname}{overload}"
    return str(getattr(target, "__name__", target))


def type_text(value: Any, entry: Entry) -> str:
    """`f32[batch, 384]` for a tensor, the tuple of types for several results, `int` for a symbolic size."""
    if isinstance(value, Tensor):
        dims = ", ".join(dim_text(size, entry) for size in value.shape)
        return f"{_DTYPES.get(value.dtype, str(value.dtype).removeprefix('torch.'))}[{dims}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(type_text(item, entry) for item in value)})"
    if isinstance(value, torch.SymInt):
        return dim_text(value, entry)
    return type(value).__name__


def dim_text(size: Any, entry: Entry) -> str:
    """A size: its number, or its expression in the user's names of dynamic dimensions."""
    if isinstance(size, int):
        return str(size)
    expression = size.node.expr
    renamed = {symbol: entry.symbols.get(str(symbol), str(symbol)) for symbol in expression.free_symbols}
    text = expression.subs({symbol: type(symbol)(name, integer=True) for symbol, name in renamed.items()})
    return str(text)


def _value(value: Any, labels: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return labels.get(value, value.name)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_value(item, labels) for item in value)}]"
    if isinstance(value, torch.dtype):
        return _DTYPES.get(value, str(value))
    return repr(value)
