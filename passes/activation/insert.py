"""The three spellings of a quantized activation.

    dynamic:  c, s(, z) = quantize(x, [], spec);  x' = decode([c, s(, z)], spec)
    static:   c, = quantize(x, [s(, z)], spec);   x' = decode([c, s(, z)], spec)
    split:    c, s(, z) = quantize(x, [], spec);  x1 = decode([c, s(, z)], spec);  r = x - x1;  t = s / 254
              d, = quantize(r, [t], symmetric);  x' = x1 + decode([d, t], symmetric)

Static scales and zero points are weights of the program, of shape []. The split form is a 16-bit activation on two
8-bit
products: `|r| <= s / 2`, which is 127 steps of `t`. By groups of columns, both halves are dynamic and symmetric.
"""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from sparc.encoding.int_grid import IntGrid
from sparc.encoding.operators import is_decode, is_quantize, spec_name
from sparc.program import Entry, Program

aten = torch.ops.aten

PER_TENSOR = IntGrid(8, "tensor", symmetric=False)
PER_TOKEN = IntGrid(8, "channel", symmetric=True)
REMAINDER = IntGrid(8, "tensor", symmetric=True)
REMAINDER_STEPS = 254


def insert_dynamic(entry: Entry, x: fx.Node, spec: IntGrid, before: fx.Node) -> fx.Node:
    """Insert `decode(quantize(x))` with a scale taken from x itself, before a node; returns the decode."""
    parts = _quantize(entry, x, [], spec, before)
    return _decode(entry, parts, spec, before, x)


def insert_static(
    entry: Entry, x: fx.Node, params: Sequence[fx.Node], spec: IntGrid, before: fx.Node, like: fx.Node | None = None
) -> fx.Node:
    """Insert `decode(quantize(x))` with given scale (and zero point) nodes, before a node; returns the decode."""
    codes = _quantize(entry, x, params, spec, before, like)
    return _decode(entry, [*codes, *params], spec, before, x, like)


def insert_split(
    entry: Entry, x: fx.Node, before: fx.Node, *, symmetric: bool = False, group: int | None = None
) -> fx.Node:
    """Insert the split form of x before a node; returns the sum.

    Args:
        entry: the graph, which is edited.
        x: a floating value.
        before: the node.
        symmetric: give the coarse codes the zero point of the fine ones, so that a target can stack both into one
            product; a range that lies on one side of zero then loses up to one of the 16 bits.
        group: how many columns share a scale, of both halves; all by default.
    """
    if group is not None:
        spec = IntGrid(8, group, symmetric=True)
        first = insert_dynamic(entry, x, spec, before)
        second = insert_dynamic(entry, entry.call(aten.sub.Tensor, x, first, before=before), spec, before)
        return entry.call(aten.add.Tensor, first, second, before=before)
    coarse = insert_dynamic(entry, x, REMAINDER if symmetric else PER_TENSOR, before)
    scale = coarse.args[0][1]  # type: ignore[index]
    remainder = entry.call(aten.sub.Tensor, x, coarse, before=before)
    fine_scale = entry.call(aten.div.Tensor, scale, float(REMAINDER_STEPS), before=before)
    fine = insert_static(entry, remainder, [fine_scale], REMAINDER, before)
    return entry.call(aten.add.Tensor, coarse, fine, before=before)


def add_params(program: Program, name: str, scale: float, zero: int | None, like: fx.Node) -> list[fx.Node]:
    """Weights for a static grid, of shape []: `NAME_scale` and, unless `zero` is None, `NAME_zero`."""
    params = [program.add_weight(f"{name}_scale", torch.tensor(scale, dtype=torch.float32), like)]
    if zero is not None:
        params.append(program.add_weight(f"{name}_zero", torch.tensor(zero, dtype=torch.uint8), like))
    return params


def is_quantized(x: object) -> bool:
    """Whether a value is a decoded activation already, or the sum of a split one."""
    if is_decode(x):
        assert isinstance(x, fx.Node)
        return is_activation_decode(x)
    if isinstance(x, fx.Node) and x.target is aten.add.Tensor:
        return all(is_decode(part) and is_activation_decode(part) for part in x.args)  # type: ignore[arg-type]
    return False


def is_activation_decode(node: fx.Node) -> bool:
    """Whether a decode node's codes are computed by `quantize` rather than stored."""
    codes = node.args[0][0]  # type: ignore[index]
    return isinstance(codes, fx.Node) and codes.op != "get_attr"


def quantized_value(decode: fx.Node) -> fx.Node | None:
    """The value whose codes a decode node decodes; None when `quantize` is not right before it."""
    codes = decode.args[0][0]  # type: ignore[index]
    if isinstance(codes, fx.Node) and codes.target is operator.getitem and is_quantize(codes.args[0]):
        return codes.args[0].args[0]  # type: ignore[union-attr, return-value]
    return None


def _quantize(
    entry: Entry, x: fx.Node, params: Sequence[fx.Node], spec: IntGrid, before: fx.Node, like: fx.Node | None = None
) -> list[fx.Node]:
    quantize = torch.ops.sparc.quantize.default
    made = entry.call(quantize, x, list(params), spec_name(spec), before=before, like=like)
    count = 1 if params else len(spec.part_names)
    return [entry.call(operator.getitem, made, index, before=before, like=like) for index in range(count)]


def _decode(
    entry: Entry, parts: Sequence[fx.Node], spec: IntGrid, before: fx.Node, x: fx.Node, like: fx.Node | None = None
) -> fx.Node:
    value = x.meta["val"]
    assert isinstance(value, Tensor)
    literals = (spec_name(spec), "matrix", None, value.dtype)
    return entry.call(torch.ops.sparc.decode.default, list(parts), *literals, before=before, like=like)
