"""Facts about single values: their types compared without guards, and the constants behind them."""

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from sparc.program import Program, is_weight

aten = torch.ops.aten

_FILLS = {aten.full.default: 1, aten.full_like.default: 1, aten.new_full.default: 2, aten.scalar_tensor.default: 0}
_ZEROS = {aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default}
_ONES = {aten.ones.default, aten.ones_like.default, aten.new_ones.default}
_DROPOUTS = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def size_expression(size: Any) -> sympy.Expr:
    """A size as a sympy expression in the program's symbols; reading it adds no guard."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


def size_hint(size: Any) -> int:
    """The size in the example that the program was captured with."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for every value of the symbols."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    first, second = size_expression(a), size_expression(b)
    return bool(first == second) or bool(sympy.expand(first - second) == 0)


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are equal for every value of the symbols."""
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))


def same_type(a: Any, b: Any) -> bool:
    """Whether two types (what `meta["val"]` holds) have equal dtype and shape for every value of the symbols."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    return a.dtype == b.dtype and same_shape(a.shape, b.shape)


def tensor_type(node: Any) -> Tensor | None:
    """The type of a node that holds one tensor, else None."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """The shape of a node that holds one tensor."""
    return tuple(node.meta["val"].shape)


def is_static(node: fx.Node) -> bool:
    """Whether a node is a tensor of fixed sizes."""
    kind = tensor_type(node)
    return kind is not None and all(isinstance(size, int) for size in kind.shape)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, and laid out alike, so that no product takes another path.

    NaN equals itself, -0.0 does not equal 0.0.
    """
    if a.dtype != b.dtype or a.shape != b.shape or a.stride() != b.stride():
        return False
    if a.is_floating_point() and a.element_size() in _BITS:
        kind = _BITS[a.element_size()]
        return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))
    return torch.equal(a, b)


def scalar_value(program: Program, value: Any) -> float | int | bool | None:
    """The number that `value` stands for: a literal, a constant of one element, or a tensor filled with one number;
    else None.
    """
    if isinstance(value, (bool, int, float)):
        return value
    if is_weight(value):
        tensor = program.weights[str(value.target)]
        return tensor.item() if tensor.numel() == 1 else None  # type: ignore[return-value]
    if not isinstance(value, fx.Node) or value.op != "call_function" or tensor_type(value) is None:
        return None
    found = _filling(program, value)
    kind = value.meta["val"].dtype
    whole = found is not None and not kind.is_floating_point and not kind.is_complex
    return torch.tensor(found).to(kind).item() if whole else found  # type: ignore[return-value]


def _filling(program: Program, value: fx.Node) -> float | int | bool | None:
    """The number that a call fills its result with, before it is converted to the result's dtype."""
    if value.target in _FILLS and len(value.args) > _FILLS[value.target]:
        filled = value.args[_FILLS[value.target]]
        return filled if isinstance(filled, (bool, int, float)) else None
    if value.target in _ZEROS:
        return 0
    if value.target in _ONES:
        return 1
    if value.target in (aten.expand.default, aten.unsqueeze.default, aten.reshape.default, aten.to.dtype):
        return scalar_value(program, value.args[0])
    return None


def is_deterministic(node: fx.Node) -> bool:
    """Whether a call gives the same result every time and writes to nothing."""
    target = node.target
    if not isinstance(target, OpOverload):
        return True
    if target._schema.is_mutable or not target._schema.returns or target._opname.startswith(("empty", "new_empty")):
        return False
    if torch.Tag.nondeterministic_seeded not in target.tags:
        return True
    if target in _DROPOUTS:
        return node.args[2:3] == (False,)
    return (
        target is aten.scaled_dot_product_attention.default
        and not (node.args[4:5] or (node.kwargs.get("dropout_p", 0.0),))[0]
    )


def wrapped_axis(axis: Any, rank: int) -> int | None:
    """An axis counted from the front; None when it is no number."""
    return axis % rank if isinstance(axis, int) and rank else None
