"""A sum that a layer norm reads, spelt so that ONNX Runtime leaves it alone."""

import torch
from torch import fx

from sparc.codegen.onnx.fuse.plan import Plan

aten = torch.ops.aten
_NORMS = (aten.layer_norm.default, aten.native_layer_norm.default)


def plan_residual(plan: Plan, node: fx.Node) -> None:
    """`layer_norm(a + b)`: the sum becomes `Sum`.

    ONNX Runtime merges `Add` and `LayerNormalization` into one operator whose CPU kernel is several times slower.
    """
    if plan.target.flavour != "cpu" or node.target not in _NORMS:
        return
    total = node.args[0]
    if not isinstance(total, fx.Node) or total.target is not aten.add.Tensor or total.kwargs:
        return
    a, b = total.args
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return
    if all(each.meta["val"].dtype == torch.float32 for each in (a, b, total)):
        plan.put(total, lambda e: e.op("Sum", a, b))
