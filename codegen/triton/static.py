"""Activations on 8-bit grids with one scale: how they are found in graphs, and `sparc::quantize` and `sparc::decode` as
expressions.

A scale and a zero point are tensors of one element, which kernels read: sites that differ in nothing else share code.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, fx

from sparc.analysis.values import tensor_type
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.operators import find_spec, is_decode, is_quantize
from sparc.program import is_weight

ROUNDER = "12582912.0"  # 1.5 * 2^23: adding and subtracting it rounds a float32 to the nearest integer, half to even
MIDDLE = 128  # what unsigned codes are shifted by, into int8


@dataclass(frozen=True)
class Coded:
    """An activation as its codes.

    Args:
        codes: uint8 or int8, in the activation's shape.
        scale: of one element.
        zero: the zero point of unsigned codes, uint8 of one element; None for signed ones.
    """

    codes: fx.Node
    scale: fx.Node
    zero: fx.Node | None

    @property
    def parameters(self) -> tuple[fx.Node, ...]:
        """The scale, and the zero point if there is one."""
        return (self.scale,) if self.zero is None else (self.scale, self.zero)

    @property
    def dtype(self) -> str:
        """The codes' type, as torch names it."""
        return "int8" if self.zero is None else "uint8"


def match_coded(node: Any) -> Coded | None:
    """The codes of an activation that `sparc::decode` reads in 8 bits with one scale; None for anything else."""
    if not is_decode(node) or node.args[2:4] != ("matrix", None) or not _is_grid(node.args[1]):
        return None
    codes, scale, *zero = node.args[0]
    if is_weight(codes) or not all(_is_single(each) for each in (scale, *zero)):
        return None
    return Coded(codes, scale, zero[0] if zero else None)


def is_step(node: fx.Node) -> bool:
    """Whether a node quantizes to a grid that is given, takes the codes, or decodes them."""
    if is_quantize(node):
        given = cast(list[fx.Node], node.args[1])
        return bool(given) and _is_grid(node.args[2]) and all(_is_single(each) for each in given)
    if node.target is operator.getitem:
        return isinstance(node.args[0], fx.Node) and is_quantize(node.args[0]) and is_step(node.args[0])
    return match_coded(node) is not None


def step_type(node: fx.Node) -> Tensor | None:
    """The type of a node that holds one tensor, or quantizes to one."""
    return tensor_type(node) if not is_quantize(node) else node.meta["val"][0]


def expression(node: fx.Node, written: Callable[[Any], str]) -> str:
    """The value of a step, in float32.

    A value in half precision is rounded before it is quantized: the program's own is such a number, and 255 steps are
    fine beside the distances of half-precision numbers.

    Args:
        node: for which `is_step` holds.
        written: a node's value as text.
    """
    if node.target is operator.getitem:
        return written(node.args[0])
    if is_quantize(node):
        scale, *zero = (written(each) for each in cast(list[fx.Node], node.args[1]))
        spec = cast(IntGrid, find_spec(str(node.args[2])))
        source = cast(fx.Node, node.args[0])
        dtype = str(source.meta["val"].dtype).removeprefix("torch.")
        value = written(source) + ("" if dtype == "float32" else f".to(tl.{dtype}).to(tl.float32)")
        rounded = f"tl.div_rn({value}, {scale}) + {ROUNDER} - {ROUNDER}{''.join(f' + {each}' for each in zero)}"
        return f"tl.minimum(tl.maximum({rounded}, {float(spec.low)}), {float(spec.high)})"
    codes, scale, *zero = (written(each) for each in cast(list[fx.Node], node.args[0]))
    return f"({codes}{''.join(f' - {each}' for each in zero)}) * {scale}"


def _is_grid(name: Any) -> bool:
    """Whether a spec is an 8-bit grid of one scale whose zero point, if it has one, is an integer."""
    spec = find_spec(str(name))
    return isinstance(spec, IntGrid) and spec.group == "tensor" and spec.bits == 8 and spec.zero == "integer"


def _is_single(node: Any) -> bool:
    kind = tensor_type(node)
    return kind is not None and all(isinstance(size, int) and size == 1 for size in kind.shape)
