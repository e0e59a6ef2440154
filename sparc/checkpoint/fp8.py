"""Layers in E4M3 with a scale per block of rows and columns, as DeepSeek-V3 and Qwen3 publish theirs (`fp8`).

`weight` is float8_e4m3fn `[out, in]`, `weight_scale_inv` `[out blocks, in blocks]` what it is multiplied by. vLLM
writes one `weight_scale` for everything, or one per row, under the same method's name.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from sparc.checkpoint.base import StoredWeight, decoded
from sparc.checkpoint.layer import SCALE_NAMES, Layer
from sparc.encoding.float8 import Float8


def read_fp8(layer: Layer, settings: Mapping[str, Any]) -> StoredWeight:
    """A layer's weight.

    Args:
        layer: its tensors.
        settings: the `quantization_config`; `weight_block_size` is read, 128 × 128 by default.

    Raises:
        CaptureError: SPARC106 and SPARC117.
    """
    if "weight_scale_inv" not in layer.tensors:
        return float8_weight(layer, layer.scales("weight_scale", rank=None), None)
    size = settings.get("weight_block_size") or [128, 128]
    good = isinstance(size, list) and len(size) == 2 and all(type(each) is int and 1 < each < 1 << 16 for each in size)
    layer.check(good, "weight_block_size is two numbers")
    scales = layer.scales("weight_scale_inv", rank=None)
    return float8_weight(layer, scales, (size[0], size[1]))


def float8_weight(layer: Layer, scales: Tensor, block: tuple[int, int] | None) -> StoredWeight:
    """`float * scale`, computed in float32.

    Args:
        layer: holds `weight`.
        scales: one, one per row, one per row and group, or with `block`, one per block.
        block: rows and columns that share a scale.
    """
    weight = layer.tensor("weight", torch.float8_e4m3fn)
    rows, columns = weight.shape
    group: int | Literal["channel", "tensor"]
    if scales.numel() == 1:
        group, scales = "tensor", scales.reshape(1, 1)
    elif block is not None:
        wanted = (-(-rows // block[0]), -(-columns // block[1]))
        layer.check(scales.shape == wanted, "a scale per block")
        group, scales = block[1], scales.repeat_interleave(block[0], dim=0)[:rows]
    else:
        scales = scales.reshape(-1, 1) if scales.ndim == 1 else scales
        layer.check(scales.ndim == 2 and len(scales) == rows and columns % scales.shape[1] == 0, "a scale per row")
        group = "channel" if scales.shape[1] == 1 else columns // int(scales.shape[1])
    spec = Float8(group, SCALE_NAMES[scales.dtype])
    return decoded(spec, weight.view(torch.uint8), {"scale": scales.contiguous()}, f"{layer.name}.weight")
