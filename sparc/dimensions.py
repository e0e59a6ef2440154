"""Dynamic dimensions at the boundary to torch.export: what the user named, and the ranges that the model's own code
allows.
"""

import ast
import inspect
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from sparc import codes
from sparc.diag import CaptureError, Diagnostics
from sparc.signature import Leaf

Dynamic = Mapping[str, Mapping[int, Any]]

_DIM = type(Dim("any"))
_SEARCHED = 4096
_SIZE = r"L\[.+?\.size\(\)\[\d+\]"
_GUARD = re.compile(
    rf"Not all values of (\w+) = ({_SIZE}) in the specified range.*? satisfy the generated guard (.+?)\.?\s*$", re.M
)
_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv, ast.Mod:
    operator.mod, ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt:
    operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip


def dimensions(leaves: tuple[Leaf, ...], flat: list[Any], dynamic: Dynamic) -> dict[str, dict[int, Any]]:
    """The user's dimensions by input leaf and axis, names turned into `Dim`s that equal names share.

    Raises:
        CaptureError: SPARC104 for a name that is no input, an axis that does not exist, a dimension that is no
            identifier.
    """
    known = {leaf.name: value for leaf, value in zip(leaves, flat, strict=True) if leaf.is_tensor}
    shared: dict[str, Any] = {}
    by_leaf: dict[str, dict[int, Any]] = {}
    for name, axes in dynamic.items():
        if name not in known:
            hint = f"the inputs are {', '.join(known)}"
            raise CaptureError(codes.DYNAMIC_DIMENSION, f"dynamic= names {name!r}, which is no input", hint=hint)
        for axis, dimension in axes.items():
            rank = known[name].ndim
            if not -rank <= axis < rank:
                what = f"input {name!r} has no dimension {axis}"
                raise CaptureError(codes.DYNAMIC_DIMENSION, what, why=f"its rank is {rank}")
            if isinstance(dimension, str):
                if not dimension.isidentifier():
                    what, hint = f"{dimension!r} is no identifier", "use a name such as batch"
                    raise CaptureError(codes.DYNAMIC_DIMENSION, what, hint=hint)
                dimension = shared.setdefault(dimension, Dim(dimension))
            by_leaf.setdefault(name, {})[axis % rank] = dimension
    return by_leaf


def tile(
    leaves: tuple[Leaf, ...], flat: list[Any], by_leaf: dict[str, dict[int, Any]], diagnostics: Diagnostics
) -> list[Any]:
    """Examples fit for tracing: contiguous, since torch.export takes a stride for a constant that a dynamic size must
    differ from, and doubled along every dynamic dimension of size 1, since it takes that size for a constant too.
    """
    tiled = []
    for leaf, value in zip(leaves, flat, strict=True):
        for axis, dimension in by_leaf.get(leaf.name, {}).items():
            if value.shape[axis] == 1:
                value = torch.cat([value, value], dim=axis)
                what = f"input {leaf.name!r} was doubled along {dimension.__name__!r} for tracing"
                diagnostics.remark(codes.EXAMPLE_TILED, what)
        tiled.append(value.contiguous() if isinstance(value, Tensor) else value)
    return tiled


def refine(message: str, shapes: Any, sizes: Mapping[str, int], diagnostics: Diagnostics) -> Any | None:
    """Narrower dynamic shapes after torch.export refused; None when it refused for another reason.

    torch either suggests ranges, printed as `seq = Dim('seq', max=512)`, or names a guard that not all sizes satisfy,
    such as `L['ids'].size()[1] != 64`; then the range is cut to the sizes around the example's that satisfy it.

    Args:
        message: torch's.
        shapes: the dynamic shapes that were refused.
        sizes: the example's size of each dimension.
        diagnostics: gets a remark for each narrowed range.

    Raises:
        CaptureError: SPARC104 when the model fixes a dimension.
    """
    fixes = message.partition("Suggested fixes:")[2]
    if not fixes:
        return _refine_by_guards(message, shapes, sizes, diagnostics)
    constant = re.search(r"^\s*(\w+) = (\d+)\s*$", fixes, re.MULTILINE)
    if constant:
        what, why = f"dimension {constant[1]!r} cannot vary", f"the model fixes it to {constant[2]}"
        raise CaptureError(codes.DYNAMIC_DIMENSION, what, why=why)
    ranges: dict[str, Any] = {}
    for name, options in re.findall(r"^\s*(\w+) = Dim\('\w+'(.*)\)\s*$", fixes, re.MULTILINE):
        bounds = {key: int(value) for key, value in re.findall(r"(min|max)=(\d+)", options)}
        ranges[name] = _narrowed(name, bounds, diagnostics)
    if not ranges:
        why = " ".join(fixes.split())[:300]
        raise CaptureError(codes.DYNAMIC_DIMENSION, "a dynamic dimension cannot vary freely", why=why)
    return _with_ranges(shapes, ranges)


def fixed(leaf: str, axis: int, name: str, why: str) -> CaptureError:
    """The refusal of a dimension that the model does not let vary."""
    return CaptureError(codes.DYNAMIC_DIMENSION, f"dimension {name!r} (axis {axis} of {leaf!r}) cannot vary", why=why)


def _narrowed(name: str, bounds: Mapping[str, int], diagnostics: Diagnostics) -> Any:
    words = {"min": "at least", "max": "at most"}
    text = " and ".join(f"{words[key]} {value}" for key, value in bounds.items())
    diagnostics.remark(codes.RANGE_NARROWED, f"dimension {name!r} must be {text}")
    return Dim(name, **bounds)


def _with_ranges(shapes: Any, ranges: Mapping[str, Any]) -> Any:
    asked = _named(shapes)
    if all(name in asked and _range(asked[name]) == _range(dimension) for name, dimension in ranges.items()):
        names = ", ".join(map(repr, ranges))
        why = f"torch.export cannot prove the model's conditions on {names} even in the range where they hold"
        raise CaptureError(codes.DYNAMIC_DIMENSION, "the dynamic dimensions could not be settled", why=why)
    return pytree.tree_map_only(_DIM, lambda dimension: ranges.get(dimension.__name__, dimension), shapes)


def _refine_by_guards(message: str, shapes: Any, sizes: Mapping[str, int], diagnostics: Diagnostics) -> Any | None:
    found = _named(shapes)
    ranges: dict[str, Any] = {}
    for name, size, guard in _GUARD.findall(message):
        holds = _guard(guard.replace(size, name), name)
        if holds is None or name not in found or not holds(sizes[name]):
            return None
        before = ranges.get(name, found[name])
        low, high = sizes[name], sizes[name]
        floor, ceiling = max(2, int(before.min)), min(_SEARCHED, _upper(before))
        while low > floor and holds(low - 1):
            low -= 1
        while high < ceiling and holds(high + 1):
            high += 1
        bounds = {"min": low} if low > 2 or int(before.min) >= 2 or not holds(1) else {}
        bounds |= {"max": high} if high < ceiling or _upper(before) <= _SEARCHED else {}
        ranges[name] = Dim(name, **bounds)
    for name, dimension in ranges.items():
        bounds = {"min": int(dimension.min)} if dimension.min >= 2 else {}
        bounds |= {"max": int(dimension.max)} if _upper(dimension) <= _SEARCHED else {}
        if (low := bounds.get("min", 2)) == bounds.get("max"):
            what, why = f"dimension {name!r} cannot vary", f"the model fixes it to {low}"
            raise CaptureError(codes.DYNAMIC_DIMENSION, what, why=why)
        _narrowed(name, bounds, diagnostics)
    return _with_ranges(shapes, ranges) if ranges else None


def _named(shapes: Any) -> dict[str, Any]:
    return {each.__name__: each for each in pytree.tree_leaves(shapes) if isinstance(each, _DIM)}


def _range(dimension: Any) -> tuple[int, int]:
    return int(dimension.min), _upper(dimension)


def _upper(dimension: Any) -> int:
    try:
        return int(dimension.max)
    except (AttributeError, OverflowError, TypeError, ValueError):  # torch's own infinity
        return 2**62


def _guard(text: str, name: str) -> Callable[[int], bool] | None:
    """A guard on one dimension as a function; None when it has parts other than integers and comparisons of them."""
    try:
        tree = ast.parse(text, mode="eval").body
        _evaluate(tree, {name: 2})
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None
    return lambda size: bool(_evaluate(tree, {name: size}))


def _evaluate(node: ast.expr, names: Mapping[str, int]) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_evaluate(node.left, names), _evaluate(node.right, names))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_evaluate(node.operand, names))
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _OPERATORS:
        return _OPERATORS[type(node.ops[0])](_evaluate(node.left, names), _evaluate(node.comparators[0], names))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.lower() in ("max", "min"):
        return (max if node.func.id.lower() == "max" else min)(_evaluate(each, names) for each in node.args)
    raise ValueError(f"not a guard: {ast.dump(node)}")


@contextmanager
def named_forward(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """For a while, let forward() declare exactly these inputs by name.

    torch.export describes what `**kwargs` takes in two ways that do not fit each other, so nothing may be left to
    `**kwargs`.
    """
    own = inspect.signature(model.forward).parameters
    names = list(names)
    if all(name in own for name in names):
        yield
        return
    original = model.forward

    def forward(**inputs: Any) -> Any:
        return original(**inputs)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
    replaced = model.__dict__.get("forward")
    model.forward = forward
    try:
        yield
    finally:
        if replaced is None:
            del model.forward
        else:
            model.forward = replaced
