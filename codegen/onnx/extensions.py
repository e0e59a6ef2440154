"""Lowerings that extensions register: tried before every rule of sparc's own, and checked for parity like them.

A key is (`onnx`, name) for every flavour or (`onnx:cuda`, name) for one, which is tried first. The name is an
operator's (`mylib.twist.default`, or `mylib.twist` for every overload) or an encoding's class name.

- An operator's lowering is called as `lowering(e, node)`.
- An encoding's is called as `lowering(e, node, weight)`, `weight` being an `Encoded`: first on each operator that reads
  the decoded weight, then, where it answered None, on the decode itself, whose value is the dense weight in its own
  shape and dtype. It says by `e.carry` what the runtime keeps in memory; else the report counts the dense weight.

Both answer an `onnx_ir.Value` (or one for each of the node's results), or None to leave the node to sparc.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
from torch import fx
from torch._ops import OpOverload

from sparc import codes
from sparc.codegen.encoded import Encoded, match_encoded
from sparc.codegen.onnx.emit import Emitter, Result, Rule
from sparc.diag import LoweringError, SparcError
from sparc.encoding.operators import is_decode
from sparc.program import location
from sparc.target import KernelUse, Lowering

Lowerings = Mapping[tuple[str, str], Lowering]


def extension_rule(lowerings: Lowerings, flavour: str) -> Rule:
    """The rule that tries registered lowerings.

    Args:
        lowerings: by (target, operator or encoding); other targets' are ignored.
        flavour: `portable`, `cpu` or `cuda`.
    """
    targets = (f"onnx:{flavour}", "onnx")
    mine = {key: lowering for key, lowering in lowerings.items() if key[0] in targets}

    def rule(e: Emitter, node: fx.Node) -> Result:
        for name in _operator_names(node) if mine else ():
            for key in ((target, name) for target in targets):
                result = _call(mine[key], key, e, node) if key in mine else None
                if result is not None:
                    return result
        for weight in _weights(e, node) if mine else ():
            for key in ((target, type(weight.spec).__name__) for target in targets):
                result = _call(mine[key], key, e, node, weight) if key in mine else None
                if result is not None:
                    _account(e, node, weight)
                    return result
        return None

    return rule


def _operator_names(node: fx.Node) -> tuple[str, ...]:
    name = str(node.target)
    return (name, name.rpartition(".")[0]) if isinstance(node.target, OpOverload) else (name,)


def _weights(e: Emitter, node: fx.Node) -> Iterator[Encoded]:
    """The encoded weight that a node decodes, or those it reads."""
    for each in (node,) if is_decode(node) else node.all_input_nodes:
        weight = match_encoded(e.program, each)
        if weight is not None:
            yield weight


def _call(lowering: Lowering, key: tuple[str, str], *args: Any) -> Result:
    name = f"{getattr(lowering, '__module__', '')}.{getattr(lowering, '__qualname__', repr(lowering))}".lstrip(".")
    what = f"the lowering of {key[1]} for {key[0]} that an extension registers failed"
    try:
        result: Result = lowering(*args)
    except Exception as error:  # a stranger's code may raise anything
        said = error.diagnostic.what if isinstance(error, SparcError) else f"{type(error).__name__}: {error}"
        raise LoweringError(codes.LOWERING_FAILED, what, where=location(args[1]), why=f"{name}: {said}") from error
    values = list(result) if isinstance(result, Sequence) else [result]
    if not values or not all(value is None or isinstance(value, ir.Value) for value in values):
        why = f"{name} returned a {type(result).__name__}, which is neither None nor onnx_ir.Value"
        raise LoweringError(codes.LOWERING_FAILED, what, where=location(args[1]), why=why)
    return result


def _account(e: Emitter, node: fx.Node, weight: Encoded) -> None:
    """What a lowering does not state is counted as a dense weight."""
    if weight.site not in e.kernels:
        size = math.prod(weight.shape) * weight.dtype.itemsize
        e.carry(weight.site, KernelUse(str(node.target).split(".")[1], size, "by an extension's lowering"))
