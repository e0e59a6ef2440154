"""Convolutions, pooling, resizing."""

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from sparc.codegen.onnx.emit import Emitter, Translation
from sparc.codegen.onnx.table.shield import shielded


def _spread(value: Any, rank: int) -> list[int]:
    items = [value] if isinstance(value, int) else list(value)
    return items * rank if len(items) == 1 else items


def _same_padding(kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    totals = [step * (size - 1) for size, step in zip(kernel, dilation, strict=True)]
    return [total // 2 for total in totals] + [total - total // 2 for total in totals]


def conv(
    e: Emitter,
    node: fx.Node,
    x: fx.Node,
    weight: fx.Node,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> ir.Value | None:
    """Convolution of 1, 2 or 3 spatial axes; a sample without batch axis gets one."""
    shift = None if bias is None else e.value(bias)
    return convolve(e, node, shielded(e, x), e.value(weight), shift, conv_attributes(node))


def conv_attributes(node: fx.Node) -> dict[str, Any]:
    """ONNX attributes of a convolution node (`conv1d`, `conv2d`, `conv3d`), string paddings resolved."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    kernel = list(given["weight"].meta["val"].shape[2:])  # type: ignore[union-attr]
    rank = len(kernel)
    dilation = _spread(given.get("dilation", 1), rank)
    padding: Any = given.get("padding", 0)
    if padding == "same":
        pads = _same_padding(kernel, dilation)
    else:
        pads = [0] * (2 * rank) if padding == "valid" else _spread(padding, rank) * 2
    return {
        "kernel_shape": kernel,
        "strides": _spread(given.get("stride", 1), rank),
        "pads": pads,
        "dilations": dilation,
        "group": given.get("groups", 1),
    }


def convolve(
    e: Emitter, node: fx.Node, x: Any, weight: ir.Value, bias: ir.Value | None, attributes: dict[str, Any]
) -> ir.Value:
    """A Conv, with a batch axis added and removed where the input has none."""
    if node.meta["val"].ndim == len(attributes["kernel_shape"]) + 2:
        return e.op("Conv", x, weight, bias, **attributes)
    return e.op("Squeeze", e.op("Conv", e.op("Unsqueeze", x, [0]), weight, bias, **attributes), [0])


def convolution(
    e: Emitter,
    node: fx.Node,
    x: fx.Node,
    weight: fx.Node,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> ir.Value:
    """The one operator behind all convolutions."""
    rank = x.meta["val"].ndim - 2
    attributes: dict[str, Any] = {
        "kernel_shape": list(weight.meta["val"].shape[2:]),
        "strides": _spread(stride, rank),
        "pads": _spread(padding, rank) * 2,
        "dilations": _spread(dilation, rank),
        "group": groups,
    }
    if transposed:
        return e.op(
            "ConvTranspose", shielded(e, x), weight, bias, output_padding=_spread(output_padding, rank), **attributes
        )
    return e.op("Conv", shielded(e, x), weight, bias, **attributes)


def conv_transpose(
    e: Emitter,
    node: fx.Node,
    x: fx.Node,
    weight: fx.Node,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> ir.Value | None:
    """Transposed convolution."""
    rank = weight.meta["val"].ndim - 2
    if x.meta["val"].ndim != rank + 2:
        return None
    return convolution(e, node, x, weight, bias, stride, padding, dilation, True, output_padding, groups)


def max_pool(rank: int, with_indices: bool = False) -> Translation:
    """Maxima over windows."""

    def translate(
        e: Emitter,
        node: fx.Node,
        x: fx.Node,
        kernel: Any,
        stride: Any = (),
        padding: Any = 0,
        dilation: Any = 1,
        ceil: bool = False,
    ) -> Any:
        window = _spread(kernel, rank)
        if with_indices and any(user.args[1] == 1 for user in node.users):
            return None
        value = e.op(
            "MaxPool",
            _batched(e, x, rank),
            kernel_shape=window,
            strides=_spread(stride, rank) if stride else window,
            pads=_spread(padding, rank) * 2,
            dilations=_spread(dilation, rank),
            ceil_mode=int(ceil),
        )
        value = value if x.meta["val"].ndim == rank + 2 else e.op("Squeeze", value, [0])
        return [value, None] if with_indices else value

    return translate


def avg_pool(rank: int) -> Translation:
    """Means over windows."""

    def translate(
        e: Emitter,
        node: fx.Node,
        x: fx.Node,
        kernel: Any,
        stride: Any = (),
        padding: Any = 0,
        ceil: bool = False,
        count_pad: bool = True,
        divisor: Any = None,
    ) -> ir.Value | None:
        if divisor is not None or (ceil and e.target.opset < 19):
            return None
        window = _spread(kernel, rank)
        value = e.op(
            "AveragePool",
            _batched(e, x, rank),
            kernel_shape=window,
            strides=_spread(stride, rank) if stride else window,
            pads=_spread(padding, rank) * 2,
            ceil_mode=int(ceil),
            count_include_pad=int(count_pad),
        )
        return value if x.meta["val"].ndim == rank + 2 else e.op("Squeeze", value, [0])

    return translate


def _batched(e: Emitter, x: fx.Node, rank: int) -> ir.Value:
    return e.value(x) if x.meta["val"].ndim == rank + 2 else e.op("Unsqueeze", x, [0])


def adaptive_pool(rank: int, operator: str, with_indices: bool = False) -> Translation:
    """Pooling to a given size: a global one, or windows of equal size where the sizes divide."""

    def translate(e: Emitter, node: fx.Node, x: fx.Node, size: Any) -> Any:
        target = _spread(size, rank)
        spatial = x.meta["val"].shape[-rank:]
        batched = _batched(e, x, rank)
        if all(each == 1 for each in target):
            value = e.op(f"Global{operator}", batched)
        else:
            if not all(
                isinstance(have, int) and want and have % want == 0 for have, want in zip(spatial, target, strict=True)
            ):
                return None
            window = [have // want for have, want in zip(spatial, target, strict=True)]
            value = e.op(operator, batched, kernel_shape=window, strides=window)
        value = value if x.meta["val"].ndim == rank + 2 else e.op("Squeeze", value, [0])
        return [value, None] if with_indices else value

    return translate


def upsample(mode: str) -> Translation:
    """Interpolation to the output's spatial size."""

    def translate(e: Emitter, node: fx.Node, x: fx.Node, *args: Any, **named: Any) -> ir.Value:
        fake, out = x.meta["val"], node.meta["val"]
        align = mode != "nearest" and any(arg is True for arg in (*args, named.get("align_corners")))
        coordinates = "asymmetric" if mode == "nearest" else "align_corners" if align else "half_pixel"
        attributes: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": coordinates}
        if mode == "nearest":
            attributes["nearest_mode"] = "floor"
        if mode == "cubic":
            attributes["cubic_coeff_a"] = -0.75
        scales = _given_scales(args, fake.ndim - 2)
        if scales is not None and not align:
            return e.op("Resize", x, None, e.const([1.0, 1.0, *scales], torch.float32), **attributes)
        return e.op("Resize", x, None, None, e.sizes.vector(list(out.shape)), **attributes)

    return translate


def _given_scales(args: Sequence[Any], rank: int) -> list[float] | None:
    """Scale factors among the arguments, which torch then uses instead of the ratio of sizes."""
    for arg in args:
        if isinstance(arg, (list, tuple)) and len(arg) == rank and all(isinstance(item, float) for item in arg):
            return list(arg)
    loose = [arg for arg in args if isinstance(arg, float)]
    return loose if len(loose) == rank else None


def pixel_shuffle(e: Emitter, node: fx.Node, x: fx.Node, factor: int) -> ir.Value | None:
    """Channels become blocks of pixels."""
    return e.op("DepthToSpace", x, blocksize=factor, mode="CRD") if x.meta["val"].ndim == 4 else None


def unfold_windows(e: Emitter, node: fx.Node, x: fx.Node, dim: int, size: int, step: int) -> ir.Value | None:
    """Sliding windows along an axis of known size, on a new last axis."""
    length = x.meta["val"].shape[dim]
    rank = x.meta["val"].ndim
    if not isinstance(length, int) or rank == 0:
        return None
    dim %= rank
    starts = range(0, length - size + 1, step)
    windows = e.op(
        "Gather", x, e.const([[start + index for index in range(size)] for start in starts], torch.int64), axis=dim
    )
    order = [axis for axis in range(rank + 1) if axis != dim + 1]
    return e.op("Transpose", windows, perm=[*order, dim + 1])


def _dims(name: str, make: Callable[[int], Translation]) -> dict[str, Translation]:
    return {f"aten.{name}{rank}d.default": make(rank) for rank in (1, 2, 3)}


_VECTORS = {"upsample_nearest1d": "nearest", "upsample_nearest2d": "nearest", "upsample_nearest3d": "nearest",
            "upsample_linear1d": "linear", "upsample_bilinear2d": "linear", "upsample_trilinear3d": "linear",
            "upsample_bicubic2d": "cubic"}  # fmt: skip

TABLE: dict[str, Translation] = {
    **{f"aten.conv{rank}d.{overload}": conv for rank in (1, 2, 3) for overload in ("default", "padding")},
    "aten.convolution.default": convolution,
    "aten.conv_transpose1d.default": conv_transpose,
    "aten.conv_transpose2d.input": conv_transpose,
    "aten.conv_transpose3d.input": conv_transpose,
    **_dims("max_pool", max_pool),
    "aten.max_pool2d_with_indices.default": max_pool(2, with_indices=True),
    **_dims("avg_pool", avg_pool),
    **_dims("adaptive_avg_pool", lambda rank: adaptive_pool(rank, "AveragePool")),
    **_dims("adaptive_max_pool", lambda rank: adaptive_pool(rank, "MaxPool", with_indices=True)),
    **{f"aten.{name}.{overload}": upsample(mode) for name, mode in _VECTORS.items() for overload in ("default", "vec")},
    "aten.pixel_shuffle.default": pixel_shuffle,
    "aten.unfold.default": unfold_windows,
}
