"""A product with an encoded weight: `x @ w.T + bias`, however the program spells it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from sparc.codegen.encoded import Activation, Encoded, match_activation, match_encoded
from sparc.codegen.onnx.emit import Emitter, Result
from sparc.codegen.onnx.sites.codes import IntMatrix, int_matrix
from sparc.target import KernelUse

_MATMULS = ("aten.mm.default", "aten.matmul.default", "aten.bmm.default")


@dataclass(frozen=True)
class Product:
    """A matrix product with an encoded right operand.

    Args:
        node: the operator.
        x: the left operand.
        weight: the right one, as a matrix `[batch..., out, reduce]`.
        matrix: its integers, if there are any.
        bias: added to the result; None for nothing.
        copies: how many products like this one its weight is divided into.
    """

    node: fx.Node
    x: Activation
    weight: Encoded
    matrix: IntMatrix | None
    bias: Any = None
    copies: int = 1

    @property
    def is_matrix(self) -> bool:
        """Whether the right operand is a single matrix."""
        stacked = self.matrix is not None and self.matrix.index is not None
        return stacked or len(self.weight.matrix_shape) == 2

    def carried(self, e: Emitter, kernel: KernelUse) -> None:
        """Note what carries the weight."""
        e.carry(self.weight.site, replace(kernel, resident_bytes=kernel.resident_bytes * self.copies))


ProductLowering = Callable[[Emitter, Product], Result]


def match_product(e: Emitter, node: fx.Node) -> Product | None:
    """The product that a node is; None when its weight is not encoded."""
    name = str(node.target)
    if name == "aten.linear.default":
        x, w, bias = (*node.args, None)[:3]
        view = "matrix"
    elif name in _MATMULS:
        x, w, bias = node.args[0], node.args[1], None
        view = "transposed"
    elif name == "aten.addmm.default" and not node.kwargs:
        bias, x, w = node.args
        view = "transposed"
    else:
        return None
    weight = match_encoded(e.program, w)
    if weight is None or str(weight.view) != view:
        return None
    return Product(node, match_activation(x), weight, int_matrix(e, weight), bias)


def requantized(node: fx.Node) -> bool:
    """Whether a result is quantized, and read in no other way."""
    return bool(node.users) and all(str(user.target) == "sparc.quantize.default" for user in node.users)


def takes_integers(e: Emitter, site: Product) -> bool:
    """Whether an integer product carries a site: 8-bit weights, a scale per row at most, and an x of 8-bit codes."""
    w = site.matrix
    if e.target.flavour == "cuda" or w is None or w.grid.bits != 8 or not w.per_channel or w.grid.zero != "integer":
        return False
    if site.weight.dtype not in (torch.float32, torch.float16, torch.bfloat16) or len(site.weight.matrix_shape) != 2:
        return False
    if (
        site.x.kind == "static"
    ):  # of a matrix and a bias ONNX Runtime makes a float product with a matrix decoded each time
        return e.target.flavour == "cpu" and not requantized(site.node)
    return site.x.kind in ("tensor", "token", "split")
