"""Pointwise operators as Triton expressions, in float32; every value is a name or a number."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from sparc.analysis.values import tensor_type
from sparc.codegen.triton import static

aten = torch.ops.aten

Form = Callable[..., str]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def _add(a: str, b: str, alpha: str = "1") -> str:
    return f"{a} + {b}" if alpha == "1" else f"{a} + {alpha} * {b}"


def _subtract(a: str, b: str, alpha: str = "1") -> str:
    return f"{a} - {b}" if alpha == "1" else f"{a} - {alpha} * {b}"


def _gelu(a: str, approximate: str = "none") -> str:
    if approximate == "tanh":
        return f"{a} * tl.sigmoid(1.5957691216057308 * ({a} + 0.044715 * {a} * {a} * {a}))"
    return f"0.5 * {a} * (1.0 + tl.erf({a} * 0.7071067811865476))"


def _clamp(a: str, low: str = "None", high: str = "None") -> str:
    """Comparisons, which let NaN pass as torch does."""
    upper = a if high == "None" else f"tl.where({a} > {high}, {high}, {a})"
    return upper if low == "None" else f"tl.where({a} < {low}, {low}, {upper})"


def _power(a: str, exponent: str) -> str | None:
    return {
        "2": f"{a} * {a}",
        "2.0": f"{a} * {a}",
        "3": f"{a} * {a} * {a}",
        "0.5": f"tl.sqrt({a})",
        "-0.5": f"1.0 / tl.sqrt({a})",
    }.get(exponent)


def _same(a: str, *_: str) -> str:
    return a


# Half-precision intermediate results are not rounded: the kernel computes the whole expression in float32.
FORMS: dict[Any, Callable[..., str | None]] = {
    aten.add.Tensor: _add,
    aten.add.Scalar: _add,
    aten.sub.Tensor: _subtract,
    aten.sub.Scalar: _subtract,
    aten.mul.Tensor: lambda a, b: f"{a} * {b}",
    aten.mul.Scalar: lambda a, b: f"{a} * {b}",
    aten.div.Tensor: lambda a, b: f"{a} / {b}",
    aten.div.Scalar: lambda a, b: f"{a} / {b}",
    aten.neg.default: lambda a: f"-{a}",
    aten.abs.default: lambda a: f"tl.abs({a})",
    aten.square.default: lambda a: f"{a} * {a}",
    aten.sqrt.default: lambda a: f"tl.sqrt({a})",
    aten.rsqrt.default: lambda a: f"1.0 / tl.sqrt({a})",
    aten.exp.default: lambda a: f"tl.exp({a})",
    aten.erf.default: lambda a: f"tl.erf({a})",
    aten.pow.Tensor_Scalar: _power,
    aten.relu.default: lambda a: _clamp(a, "0.0"),
    aten.relu6.default: lambda a: _clamp(a, "0.0", "6.0"),
    aten.leaky_relu.default: lambda a, slope="0.01": f"tl.where({a} > 0, {a}, {slope} * {a})",
    aten.elu.default: lambda a, alpha="1.0": f"tl.where({a} > 0, {a}, {alpha} * (tl.exp({a}) - 1.0))",
    aten.softplus.default: lambda a: f"tl.where({a} > 20.0, {a}, tl.log(1.0 + tl.exp({a})))",
    aten.sigmoid.default: lambda a: f"tl.sigmoid({a})",
    aten.tanh.default: lambda a: f"2.0 * tl.sigmoid(2.0 * {a}) - 1.0",
    aten.silu.default: lambda a: f"{a} * tl.sigmoid({a})",
    aten.gelu.default: _gelu,
    aten.mish.default: lambda a: f"{a} * (2.0 * tl.sigmoid(2.0 * tl.log(1.0 + tl.exp({a}))) - 1.0)",
    aten.hardswish.default: lambda a: f"{a} * tl.minimum(tl.maximum({a} + 3.0, 0.0), 6.0) / 6.0",
    aten.hardsigmoid.default: lambda a: f"tl.minimum(tl.maximum({a} + 3.0, 0.0), 6.0) / 6.0",
    aten.hardtanh.default: lambda a, low="-1.0", high="1.0": _clamp(a, low, high),
    aten.clamp.default: _clamp,
    aten.maximum.default: lambda a, b: f"tl.maximum({a}, {b}, propagate_nan=tl.PropagateNan.ALL)",
    aten.minimum.default: lambda a, b: f"tl.minimum({a}, {b}, propagate_nan=tl.PropagateNan.ALL)",
    aten.to.dtype: _same,
    aten._to_copy.default: lambda a, **_: a,
    aten.clone.default: lambda a, **_: a,
}


def is_pointwise(node: fx.Node) -> bool:
    """Whether a node computes elements from floating elements or their codes, in a form that is known here."""
    if static.is_step(node):
        return True
    if node.op != "call_function" or node.target not in FORMS:
        return False
    kind = tensor_type(node)
    if kind is None or kind.dtype not in _FLOATS:
        return False
    arguments = [*node.args, *(value for key, value in node.kwargs.items() if key not in ("dtype", "memory_format"))]
    plain = (fx.Node, int, float, str, bool, torch.dtype, type(None))
    if not all(isinstance(each, plain) for each in arguments):
        return False
    if any(isinstance(each, float) and not math.isfinite(each) for each in arguments):
        return False
    return expression(node, {}) is not None


def expression(node: fx.Node, names: dict[fx.Node, str]) -> str | None:
    """The node's value as an expression; None when its arguments are not of a known form.

    Args:
        node: a call.
        names: the names of its inputs' values; those missing are written as `_`.
    """

    def written(value: Any) -> str:
        if isinstance(value, fx.Node):
            return names.get(value, "_")
        if isinstance(value, bool) or value is None or isinstance(value, (str, torch.dtype)):
            return str(value)
        return f"({value})" if isinstance(value, (int, float)) and value < 0 else str(value)

    if static.is_step(node):
        return static.expression(node, written)
    if node.target in (aten.to.dtype, aten._to_copy.default, aten.clone.default):
        return written(node.args[0])
    try:
        return FORMS[node.target](
            *(written(value) for value in node.args), **{key: written(value) for key, value in node.kwargs.items()}
        )
    except TypeError:
        return None


def lines(nodes: Sequence[fx.Node], names: dict[fx.Node, str]) -> list[str]:
    """Code that computes pointwise nodes in order; adds each node's name to `names`."""
    found = []
    for index, node in enumerate(nodes):
        name = f"value_{index}"
        found.append(f"{name} = {expression(node, names)}")
        names[node] = name
    return found
