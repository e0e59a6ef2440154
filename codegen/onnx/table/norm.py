"""Normalisations."""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from sparc.codegen.onnx.emit import Emitter, Translation


def layer_norm(
    e: Emitter,
    node: fx.Node,
    x: fx.Node,
    shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *_: Any,
) -> ir.Value:
    """`(x - mean) / sqrt(variance + eps) * weight + bias` over the last axes."""
    gain = e.value(weight) if weight is not None else ones(e, shape, x.meta["val"].dtype)
    return e.op("LayerNormalization", x, gain, bias, axis=-len(shape), epsilon=eps)


def native_layer_norm(e: Emitter, node: fx.Node, *args: Any) -> Sequence[ir.Value | None] | None:
    """`layer_norm` whose statistics nobody reads."""
    return [layer_norm(e, node, *args), None, None]


def rms_norm(
    e: Emitter, node: fx.Node, x: fx.Node, shape: Sequence[int], weight: Any = None, eps: float | None = None
) -> ir.Value:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axes; before opset 23 from its parts."""
    dtype = x.meta["val"].dtype
    eps = torch.finfo(dtype).eps if eps is None else eps
    if e.target.opset >= 23:
        gain = e.value(weight) if weight is not None else ones(e, shape, dtype)
        return e.op("RMSNormalization", x, gain, axis=-len(shape), epsilon=eps)
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    value = e.cast(x, wide)
    mean = e.op("ReduceMean", e.op("Pow", value, e.const(2, wide)), list(range(-len(shape), 0)), keepdims=1)
    normal = e.op("Div", value, e.op("Sqrt", e.op("Add", mean, e.const(eps, wide))))
    normal = normal if wide == dtype else e.op("Cast", normal, to=e.value(x).dtype)
    return normal if weight is None else e.op("Mul", normal, weight)


def batch_norm(
    e: Emitter,
    node: fx.Node,
    x: fx.Node,
    weight: Any,
    bias: Any,
    mean: Any,
    variance: Any,
    training: bool,
    momentum: float,
    eps: float,
    *_: Any,
) -> ir.Value | None:
    """`(x - mean) / sqrt(variance + eps) * weight + bias` per channel, with stored statistics."""
    if training or mean is None:
        return None
    dtype, channels = x.meta["val"].dtype, mean.meta["val"].shape
    gain = e.value(weight) if weight is not None else ones(e, channels, dtype)
    shift = (
        e.value(bias)
        if bias is not None
        else e.derived(f"zeros{list(channels)}", torch.zeros(tuple(channels), dtype=dtype))
    )
    return e.op("BatchNormalization", x, gain, shift, mean, variance, epsilon=eps)


def batch_norm_no_training(
    e: Emitter, node: fx.Node, x: fx.Node, weight: Any, bias: Any, mean: Any, variance: Any, momentum: float, eps: float
) -> Sequence[ir.Value | None]:
    """The same, whose other results nobody reads."""
    return [batch_norm(e, node, x, weight, bias, mean, variance, False, momentum, eps), None, None]


def group_norm(
    e: Emitter, node: fx.Node, x: fx.Node, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> ir.Value:
    """Each group of channels normalised by itself: an instance norm over groups, then a gain per channel."""
    fake = x.meta["val"]
    dtype, rank, channels = fake.dtype, fake.ndim, fake.shape[1]
    grouped = e.op("Reshape", x, [0, groups, -1])
    unit, zero = e.const([1.0] * groups, dtype), e.const([0.0] * groups, dtype)
    normal = e.op("InstanceNormalization", grouped, unit, zero, epsilon=eps)
    sizes = e.op("Shape", x) if any(not isinstance(size, int) for size in fake.shape) else e.ints(list(fake.shape))
    value = e.op("Reshape", normal, sizes)
    spread = [channels, *[1] * (rank - 2)]
    if weight is not None:
        value = e.op("Mul", value, e.op("Reshape", weight, spread))
    return value if bias is None else e.op("Add", value, e.op("Reshape", bias, spread))


def instance_norm(
    e: Emitter,
    node: fx.Node,
    x: fx.Node,
    weight: Any,
    bias: Any,
    mean: Any,
    variance: Any,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    *_: Any,
) -> ir.Value | None:
    """Each channel of each sample normalised by its own statistics."""
    if not use_input_stats:
        return None
    dtype, channels = x.meta["val"].dtype, [x.meta["val"].shape[1]]
    gain = e.value(weight) if weight is not None else ones(e, channels, dtype)
    shift = e.value(bias) if bias is not None else e.derived(f"zeros{channels}", torch.zeros(channels, dtype=dtype))
    return e.op("InstanceNormalization", x, gain, shift, epsilon=eps)


def ones(e: Emitter, shape: Sequence[int], dtype: torch.dtype) -> ir.Value:
    """A gain of one."""
    return e.derived(f"ones{list(shape)}".replace(" ", ""), torch.ones(tuple(shape), dtype=dtype))


TABLE: dict[str, Translation] = {
    "aten.layer_norm.default": layer_norm,
    "aten.native_layer_norm.default": native_layer_norm,
    "aten.rms_norm.default": rms_norm,
    "aten.batch_norm.default": batch_norm,
    "aten._native_batch_norm_legit_no_training.default": batch_norm_no_training,
    "aten.group_norm.default": group_norm,
    "aten.instance_norm.default": instance_norm,
}
