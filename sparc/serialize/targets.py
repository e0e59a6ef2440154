"""Operators by name, such as `aten.linear.default`: a name is a registered functional operator or nothing."""

import math
import operator
import re
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket, _OpNamespace

from sparc.serialize.schema import malformed, unwritable

_PYTHON: dict[str, Any] = {
    **{
        f"operator.{name}": getattr(operator, name)
        for name in ("getitem", "add", "sub", "mul", "truediv", "floordiv", "mod", "neg", "pow", "abs", "pos", "eq",
                     "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_", "invert")
    },
    **{
        f"torch.{name}": getattr(torch, name)
        for name in ("sym_max", "sym_min", "sym_float", "sym_int", "sym_not", "sym_ite", "sym_sum", "_sym_sqrt")
        if hasattr(torch, name)
    },
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc", "sqrt")},
    **{f"builtins.{function.__name__}": function for function in (max, min, abs, round, int, float, bool)},
}  # fmt: skip
_PYTHON_NAMES = {id(function): name for name, function in reversed(_PYTHON.items())}
_PART = re.compile(r"[A-Za-z0-9_]{1,128}")
_FOREIGN = frozenset({"aten.from_file", "aten.record_stream", "aten.segment_reduce_unsafe"})
_INTERNAL = frozenset(
    {"c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor", "symm_mem", "inductor", "profiler", "prim",
     "rpc", "dist", "cuda", "debugprims", "rngprims", "static_runtime", "fsdp", "streams", "higher_order", "export"}
)  # fmt: skip


def target_to_text(target: Any) -> str:
    """The name of a node's target.

    Raises:
        ArtifactError: SPARC508 for anything but a functional operator or a function of the fixed table.
    """
    if isinstance(target, OpOverload):
        name = f"{target.namespace}.{target._opname}.{target._overloadname}"
        reason = _refused(target)
        if reason is None:
            return name
        raise unwritable(f"operator {name} cannot be stored", reason)
    known = _PYTHON_NAMES.get(id(target))
    if known is None:
        raise unwritable(f"{getattr(target, '__name__', target)} cannot be stored", "it is no operator of torch.ops")
    return known


def target_from_text(name: str) -> Any:
    """The inverse of `target_to_text`; looks into `torch.ops` and the fixed table, and never imports.

    Raises:
        ArtifactError: SPARC503.
    """
    if name in _PYTHON:
        return _PYTHON[name]
    parts = name.split(".")
    if len(parts) != 3 or not all(_PART.fullmatch(part) for part in parts):
        raise malformed(f"{name[:120]!r} names no operator")
    found = _lookup(*parts)
    if found is None:
        raise malformed(f"operator {name!r} is not registered", "the package that defines it is not imported")
    reason = _refused(found)
    if reason is not None:
        raise malformed(f"operator {name!r} is refused", reason)
    return found


def _lookup(namespace: str, name: str, overload: str) -> OpOverload | None:
    space = getattr(torch.ops, namespace, None)
    packet = getattr(space, name, None) if isinstance(space, _OpNamespace) else None
    found = getattr(packet, overload, None) if isinstance(packet, OpOverloadPacket) else None
    return found if isinstance(found, OpOverload) else None


def _refused(target: OpOverload) -> str | None:
    """Why an operator may not be part of a stored program: it could reach outside of its arguments."""
    if target.namespace in _INTERNAL or f"{target.namespace}.{target._opname}" in _FOREIGN:
        return "it reaches outside of its arguments"
    if target._schema.is_mutable:
        return "it writes to its arguments"
    return None
