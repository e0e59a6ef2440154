"""Where a product's activation lies in memory, from the arguments of its operator."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from sparc.analysis.values import tensor_type
from sparc.codegen.triton.problem import Access, Window

aten = torch.ops.aten

BATCHED = (aten.bmm.default, aten.matmul.default)  # of an activation with a batch of matrices


def find_access(anchor: fx.Node) -> Access | str:
    """Where the activation's elements lie, or why no kernel reads them."""
    if anchor.target is aten.linear.default:
        return Access()
    if anchor.target in BATCHED:
        return _batched(anchor)
    names = ("stride", "padding", "dilation", "groups")
    given = dict(zip(names, anchor.args[3:], strict=False)) | {
        key: anchor.kwargs[key] for key in names if key in anchor.kwargs
    }
    x, y, w = (tensor_type(node) for node in (anchor.args[0], anchor, anchor.args[1]))
    assert x is not None
    assert y is not None
    assert w is not None
    if given.get("groups", 1) != 1:
        return "it is a grouped convolution"
    sizes = [*x.shape[2:], *y.shape[2:]]
    if x.ndim != 4 or not all(isinstance(size, int) for size in sizes):
        return "its image has no static size"
    stride, padding, dilation = (
        _pair(given.get(name, default)) for name, default in zip(names, (1, 0, 1), strict=False)
    )
    if stride is None or padding is None or dilation is None:
        return "its padding is not a number"
    kernel = (int(w.shape[2]), int(w.shape[3]))
    positions = int(y.shape[2]) * int(y.shape[3])
    if kernel == stride == (1, 1) and padding == (0, 0):
        return Access("channels", positions)
    image, output = (int(x.shape[2]), int(x.shape[3])), (int(y.shape[2]), int(y.shape[3]))
    return Access("window", positions, Window(int(x.shape[1]), image, output, kernel, stride, padding, dilation))


def _batched(anchor: fx.Node) -> Access | str:
    x, y, w = (tensor_type(node) for node in (anchor.args[0], anchor, anchor.args[1]))
    assert x is not None
    assert y is not None
    assert w is not None
    batch = int(w.shape[0])
    if x.ndim not in (2, 3) or not isinstance(y.shape[0], int) or y.shape[0] != batch:
        return "its activation has other axes than a batch of matrices, tokens and features"
    return Access("batched", batch=batch, shared=is_shared(x.shape, batch))


def is_shared(shape: Sequence[Any], batch: int) -> bool:
    """Whether an activation of this shape is one for several matrices."""
    return batch > 1 and (len(shape) == 2 or (isinstance(shape[0], int) and shape[0] == 1))


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, int):
        return value, value
    if not isinstance(value, (list, tuple)) or not all(isinstance(each, int) for each in value):
        return None
    return (value[0], value[-1])
