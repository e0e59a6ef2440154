"""Runs of rows, each times its own matrix of a stack: one product for each matrix, of as many rows as it gets.

A run without rows costs a call of an operator, and reads nothing of its matrix: ONNX Runtime's products return at once,
and what would dequantize a matrix first is a branch of its own.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from sparc.codegen.encoded import Activation, Encoded, match_encoded
from sparc.codegen.onnx.emit import Emitter, Result
from sparc.codegen.onnx.sites.codes import IntMatrix, int_matrix
from sparc.codegen.onnx.sites.expand import dequantized_product
from sparc.codegen.onnx.sites.product import Product, ProductLowering
from sparc.codegen.onnx.types import onnx_type
from sparc.pattern import normalized_arguments
from sparc.program import is_weight


def multiply_runs(e: Emitter, node: fx.Node, lowerings: Sequence[ProductLowering]) -> ir.Value:
    """`grouped_linear(x, weight, ends)`; an encoded weight stays so where a lowering carries each of its matrices."""
    x, weight, ends = node.args
    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    runs = _runs(e, x, ends, weight.meta["val"].shape[0])
    encoded = match_encoded(e.program, weight)
    products = None
    if encoded is not None and str(encoded.view) == "matrix":
        products = _encoded_products(e, node, encoded, runs, lowerings)
    if products is None:
        products = _dense_products(e, weight, runs)
    return _joined(e, node, products, runs[-1])


def multiply_stored_runs(e: Emitter, node: fx.Node) -> Result:
    """The same as torch and transformers spell it, before it is raised: with matrices `[runs, in, out]`."""
    x, matrices, ends, *rest = normalized_arguments(node).values()
    if x.meta["val"].ndim != 2 or matrices.meta["val"].ndim != 3 or ends is None or any(rest):
        return None
    runs = _runs(e, x, ends, matrices.meta["val"].shape[0])
    return _joined(e, node, _multiplied(e, matrices, runs), runs[-1])


def _joined(e: Emitter, node: fx.Node, products: Sequence[ir.Value], behind: ir.Value) -> ir.Value:
    """The products, and zeros for the rows behind them."""
    fake = node.meta["val"]
    rest = e.op("Shape", behind, start=0, end=1)
    zeros = e.op("Expand", e.const(0, fake.dtype), e.op("Concat", rest, e.ints([fake.shape[1]]), axis=0))
    return e.op("Concat", *products, zeros, axis=0)  # type: ignore[no-any-return]


def _runs(e: Emitter, x: fx.Node, ends: Any, count: int) -> list[ir.Value]:
    """The rows of every run, and those behind the last one."""
    stops = e.op("Concat", e.cast(ends, torch.int64), e.op("Shape", x, start=0, end=1), axis=0)
    starts = e.op("Concat", e.ints([0]), e.cast(ends, torch.int64), axis=0)
    made: Sequence[ir.Value] = e.op("Split", x, e.op("Sub", stops, starts), axis=0, outputs=count + 1)
    return list(made)


def _dense_products(e: Emitter, weight: fx.Node, runs: Sequence[ir.Value]) -> list[ir.Value]:
    if not is_weight(weight):
        return _multiplied(e, e.op("Transpose", weight, perm=[0, 2, 1]), runs)
    matrices = [e.weight(str(weight.target), "transpose", part=index) for index in range(len(runs) - 1)]
    return [e.op("MatMul", rows, matrix) for rows, matrix in zip(runs, matrices, strict=False)]


def _multiplied(e: Emitter, matrices: Any, runs: Sequence[ir.Value]) -> list[ir.Value]:
    """Each run times its matrix of `[runs, in, out]`."""
    chosen = [e.op("Gather", matrices, e.const(index, torch.int64), axis=0) for index in range(len(runs) - 1)]
    return [e.op("MatMul", rows, matrix) for rows, matrix in zip(runs, chosen, strict=False)]


def _encoded_products(
    e: Emitter, node: fx.Node, weight: Encoded, runs: Sequence[ir.Value], lowerings: Sequence[ProductLowering]
) -> list[ir.Value] | None:
    """None when no lowering carries the matrices."""
    stack = int_matrix(e, weight)
    if stack is None:
        return None
    sites = [_site(e, node, weight, replace(stack, index=index), rows) for index, rows in enumerate(runs[:-1])]
    for lowering in lowerings:
        guarded = lowering is dequantized_product or "minimum" in stack.grid.grid_names
        carry = partial(_if_any, lowering=lowering) if guarded else lowering
        products = [carry(e, sites[0])]
        if products[0] is not None:
            return products + [carry(e, site) for site in sites[1:]]  # type: ignore[return-value]
    return None


def _if_any(e: Emitter, site: Product, lowering: ProductLowering) -> Result:
    """A product where there are rows; ONNX Runtime also cannot sum over the groups of no rows."""
    assert site.matrix is not None
    dtype, out = site.weight.dtype, site.matrix.shape[0]
    rows = e.value(site.x.node)

    def product() -> ir.Value | None:
        made = lowering(e, site)
        return _typed(made, dtype, out) if isinstance(made, ir.Value) else None

    def nothing() -> ir.Value:
        return _typed(e.op("Expand", e.const(0, dtype), [0, out]), dtype, out)

    branches = [e.builder.branch(each) for each in (product, nothing)]
    if branches[0] is None:
        return None
    some = e.op("Greater", e.op("Size", rows), e.const(0, torch.int64))
    return e.op("If", some, then_branch=branches[0], else_branch=branches[1])  # type: ignore[no-any-return]


def _typed(value: ir.Value, dtype: torch.dtype, out: int) -> ir.Value:
    value.type, value.shape = ir.TensorType(onnx_type(dtype)), ir.Shape([None, out])
    return value


def _site(e: Emitter, node: fx.Node, weight: Encoded, matrix: IntMatrix, rows: ir.Value) -> Product:
    """The product of one run; a node of no graph stands for its rows, whose number is at most that of all."""
    x = fx.Graph().placeholder("rows")
    x.meta = dict(node.args[0].meta)  # type: ignore[union-attr]
    e.assign(x, rows)
    return Product(node, Activation(x, "float", x), weight, matrix, copies=weight.shape[0])
