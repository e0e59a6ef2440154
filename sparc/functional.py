"""Make a captured graph pure: in-place operators become functional ones, wrappers without effect are inlined."""

import operator
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import ExportedProgram

from sparc import codes
from sparc.diag import CaptureError, Location

_VIEWS = {
    "view",
    "_unsafe_view",
    "reshape",
    "t",
    "transpose",
    "permute",
    "slice",
    "select",
    "expand",
    "unsqueeze",
    "squeeze",
    "alias",
    "detach",
    "split",
    "chunk",
    "unbind",
    "narrow",
    "as_strided",
    "flatten",
    "contiguous",
    "to",
    "getitem",
}
_PURE_CALLS = (OpOverload,)


def is_impure(node: fx.Node) -> bool:
    """Whether a node returns nothing, so that it could only matter by a side effect."""
    return isinstance(node.target, OpOverload) and not node.target._schema.returns


def is_mutable(node: fx.Node) -> bool:
    """Whether a node writes to one of its arguments."""
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def functionalize(exported: ExportedProgram) -> ExportedProgram:
    """An equal exported program without in-place operators and higher-order wrappers.

    In-place operators on a fresh value that nobody else reads are replaced directly; only when one is left over does
    torch's own
    functionalization run, which takes long on large models.

    Raises:
        CaptureError: SPARC111 for control flow.
    """
    graph = exported.graph
    for node in list(graph.nodes):
        if is_mutable(node):
            _replace_in_place(node)
    wrapped = any(isinstance(node.target, HigherOrderOperator) for node in graph.nodes)
    if wrapped or any(is_mutable(node) for node in graph.nodes):
        try:
            exported = exported.run_decompositions({})
        except Exception as error:  # torch raises assorted types here
            raise CaptureError(
                codes.CAPTURE_FAILED, "in-place operators could not be removed", why=str(error)[:300]
            ) from None
    for node in exported.graph.nodes:
        if isinstance(node.target, HigherOrderOperator):
            raise CaptureError(
                codes.UNSUPPORTED_OPERATOR, f"operator {node.target} is not supported", where=_where(node)
            )
    return exported


def _replace_in_place(node: fx.Node) -> None:
    """`y = relu_(x)` becomes `y = relu(x)` when x is fresh and read by nobody else."""
    written = node.args[0] if node.args else None
    functional = _functional(node.target)
    if functional is None or not isinstance(written, fx.Node) or written.op != "call_function":
        return
    if len(written.users) != 1 or _may_alias(written):
        return
    node.target = functional


def _may_alias(node: fx.Node) -> bool:
    name = getattr(node.target, "_opname", None) or getattr(node.target, "__name__", "")
    if node.target is operator.getitem:
        return _may_alias(node.args[0]) if isinstance(node.args[0], fx.Node) else True
    return str(name).partition(".")[0] in _VIEWS


def _functional(target: Any) -> OpOverload | None:
    packet = str(target._schema.name).rpartition("::")
    if not packet[2].endswith("_"):
        return None
    namespace = getattr(torch.ops, packet[0])
    found = getattr(namespace, packet[2][:-1], None)
    overload = target._overloadname
    return getattr(found, overload, None) if found is not None else None


def _where(node: fx.Node) -> Location:
    return Location(
        "",
        str(node.meta.get("stack_trace") or "").strip().splitlines()[-1].strip()
        if node.meta.get("stack_trace")
        else "",
    )
