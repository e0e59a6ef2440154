"""Matrix products with dense operands; `sites` takes the encoded ones first."""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

from sparc.codegen.onnx.emit import MS, Emitter, Translation
from sparc.codegen.onnx.table.shield import shielded
from sparc.program import is_weight


def linear(e: Emitter, node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None = None) -> ir.Value:
    """`x @ weight.T + bias`; a weight is stored transposed, unless something else reads it as it is."""
    if is_weight(weight) and not _read_otherwise(e, weight):
        product = e.op("MatMul", shielded(e, x), e.weight(str(weight.target), "transpose"))
    elif is_weight(weight):
        return _linear_untransposed(e, node, x, weight, bias)
    else:
        product = e.op("MatMul", shielded(e, x), e.op("Transpose", weight, perm=[1, 0]))
    return product if bias is None else e.op("Add", product, bias)


def _read_otherwise(e: Emitter, weight: fx.Node) -> bool:
    """Whether some entry reads the weight in its own layout too (a tied embedding)."""
    uses = [
        user
        for _, each in e.program.nodes()
        if each.op == "get_attr" and each.target == weight.target
        for user in each.users
    ]
    return any(str(user.target) != "aten.linear.default" for user in uses)


def _linear_untransposed(e: Emitter, node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> ir.Value:
    """The product with a weight that stays `[out, in]`: a Gemm on flattened rows, or FusedMatMul."""
    fake = x.meta["val"]
    if e.target.contrib and fake.dtype == torch.float32:
        product = e.op("FusedMatMul", shielded(e, x), weight, transB=1, domain=MS)
        return product if bias is None else e.op("Add", product, bias)
    rows = shielded(e, x) if fake.ndim == 2 else e.reshape(shielded(e, x), fake.shape, [-1, fake.shape[-1]])
    product = e.op("Gemm", rows, weight, bias, transB=1)
    if fake.ndim == 2:
        return product
    out = node.meta["val"].shape
    return e.op("Reshape", product, e.sizes.vector(list(out)))


def matmul(e: Emitter, node: fx.Node, a: fx.Node, b: fx.Node) -> ir.Value:
    """The (batched) matrix product."""
    dtype = node.meta["val"].dtype
    return e.op("MatMul", e.cast(a, dtype), e.cast(b, dtype))


def addmm(e: Emitter, node: fx.Node, c: fx.Node, a: fx.Node, b: fx.Node, *, beta: Any = 1, alpha: Any = 1) -> ir.Value:
    """`beta * c + alpha * (a @ b)`."""
    if not node.meta["val"].dtype.is_floating_point:
        return e.op("Add", c, e.op("MatMul", a, b))
    return e.op("Gemm", shielded(e, a), b, c, alpha=float(alpha), beta=float(beta))


def baddbmm(
    e: Emitter, node: fx.Node, c: fx.Node, a: fx.Node, b: fx.Node, *, beta: Any = 1, alpha: Any = 1
) -> ir.Value:
    """`beta * c + alpha * (a @ b)`, batched."""
    dtype = node.meta["val"].dtype
    product = e.op("MatMul", a, b)
    if alpha != 1:
        product = e.op("Mul", product, e.const(alpha, dtype))
    if beta == 0:
        return product
    return e.op("Add", product, c if beta == 1 else e.op("Mul", c, e.const(beta, dtype)))


def einsum(e: Emitter, node: fx.Node, equation: str, operands: Sequence[fx.Node], **named: Any) -> ir.Value:
    """Einstein summation."""
    return e.op("Einsum", *operands, equation=equation.replace(" ", ""))


def dot(e: Emitter, node: fx.Node, a: fx.Node, b: fx.Node) -> ir.Value:
    """The scalar product of vectors."""
    return e.op("MatMul", a, b)


def outer(e: Emitter, node: fx.Node, a: fx.Node, b: fx.Node) -> ir.Value:
    """`a[:, None] * b[None, :]`."""
    dtype = node.meta["val"].dtype
    return e.op("Mul", e.op("Unsqueeze", e.cast(a, dtype), [1]), e.cast(b, dtype))


def embedding(e: Emitter, node: fx.Node, weight: fx.Node, indices: fx.Node, *_: Any) -> ir.Value:
    """Rows of a table."""
    assert isinstance(weight.meta["val"], Tensor)
    return e.op("Gather", weight, indices, axis=0)


TABLE: dict[str, Translation] = {
    "aten.linear.default": linear,
    "aten.matmul.default": matmul,
    "aten.mm.default": matmul,
    "aten.bmm.default": matmul,
    "aten.mv.default": matmul,
    "aten.dot.default": dot,
    "aten.outer.default": outer,
    "aten.addmm.default": addmm,
    "aten.baddbmm.default": baddbmm,
    "aten.einsum.default": einsum,
    "aten.embedding.default": embedding,
}
