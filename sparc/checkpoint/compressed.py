"""Layers in the formats of compressed-tensors (vllm-project/compressed-tensors, src/compressed_tensors/compressors).

What a layer is stored as is seen from its tensors:

- `weight_packed` int32 `[out, in * bits / 32]`: codes of `pack-quantized`, offset to unsigned, packed along the inputs;
  zero points likewise, packed along the outputs.
- `weight` int8: `int-quantized`. `weight` float8_e4m3fn: `float-quantized`.
- `weight_packed` uint8 `[out, in / 2]`: E2M1 floats, the first one low; with `weight_global_scale`
  `nvfp4-pack-quantized`, whose scales are divided by it, else `mxfp4-pack-quantized`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sparc.checkpoint.base import StoredWeight, decoded, unknown
from sparc.checkpoint.fp8 import float8_weight
from sparc.checkpoint.layer import Layer, integer_weight, sorted_columns, unpack_words, word_count
from sparc.encoding.bits import unpack_bits
from sparc.encoding.microscaling import MXFP4, NVFP4

_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized", "nvfp4-pack-quantized",
            "mxfp4-pack-quantized", "mixed-precision", "dense")  # fmt: skip


def read_compressed(layer: Layer, settings: Mapping[str, Any]) -> StoredWeight:
    """A layer's weight.

    Args:
        layer: its tensors.
        settings: the `quantization_config`; formats, bits and block sizes are read, all else is in the tensors.

    Raises:
        CaptureError: SPARC106, SPARC117 and SPARC118.
    """
    groups = list(_groups(settings))
    for form in [settings.get("format", "dense"), *(group["format"] for group in groups if group.get("format"))]:
        if form not in _FORMATS:
            raise unknown(f"the compressed-tensors format {str(form)[:40]!r}", f"one of {', '.join(_FORMATS)}")
    packed, weight = layer.tensors.get("weight_packed"), layer.tensors.get("weight")
    if packed is not None:
        return _floats(layer) if packed.dtype == torch.uint8 else _packed(layer, groups)
    if weight is not None and weight.dtype == torch.int8:
        return _integers(layer)
    if weight is not None and weight.dtype == torch.float8_e4m3fn:
        return float8_weight(layer, layer.scales("weight_scale", rank=None), _block(layer, groups))
    kind = "nothing" if weight is None else str(weight.dtype).removeprefix("torch.")
    raise unknown(f"layer {layer.name!r} of compressed-tensors holds {kind}")


def _groups(settings: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The schemes of `config_groups`, with what they say about weights."""
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        if isinstance(group, dict) and isinstance(group.get("weights"), dict):
            yield group


def _packed(layer: Layer, groups: list[Mapping[str, Any]]) -> StoredWeight:
    words = layer.tensor("weight_packed", torch.int32)
    shape = [int(size) for size in layer.tensor("weight_shape", (torch.int64, torch.int32), 1)]
    layer.check(len(shape) == 2 and shape[0] == len(words) and shape[1] > 0, "a row of words per output")
    out, columns = shape
    declared = {bits for group in groups if type(bits := group["weights"].get("num_bits")) is int}
    fitting = [bits for bits in sorted(declared) if 1 <= bits <= 8 and word_count(bits, columns) == words.shape[1]]
    layer.check(len(fitting) == 1, "as many words as codes of one of the config's widths take")
    bits = fitting[0]
    scales = _matrix(layer.scales("weight_scale", rank=None))
    zeros = None
    if "weight_zero_point" in layer.tensors:
        packed = layer.tensor("weight_zero_point", torch.int32)
        layer.check(packed.shape == (word_count(bits, out), scales.shape[1]), "a zero point per scale")
        zeros = unpack_words(packed.t(), bits, out).t().contiguous()
    codes = unpack_words(words, bits, columns)
    order = sorted_columns(layer, "weight_g_idx", columns, int(scales.shape[1]))
    codes = codes if order is None else codes.index_select(1, order)
    return integer_weight(layer, bits, codes, scales, zeros, order)


def _integers(layer: Layer) -> StoredWeight:
    signed, scales = layer.tensor("weight", torch.int8), _matrix(layer.scales("weight_scale", rank=None))
    order = sorted_columns(layer, "weight_g_idx", int(signed.shape[1]), int(scales.shape[1]))
    signed = signed if order is None else signed.index_select(1, order)
    zeros = None
    if "weight_zero_point" in layer.tensors:
        zeros = _unsigned(_matrix(layer.tensor("weight_zero_point", torch.int8, rank=None)))
    return integer_weight(layer, 8, _unsigned(signed), scales, zeros, order)


def _floats(layer: Layer) -> StoredWeight:
    packed = layer.tensor("weight_packed", torch.uint8)
    out, columns = int(packed.shape[0]), 2 * int(packed.shape[1])
    codes = unpack_bits(packed, 4, columns)
    if "weight_global_scale" not in layer.tensors:
        scales = layer.tensor("weight_scale", torch.uint8)
        layer.check(scales.shape == (out, -(-columns // 32)), "a scale per 32 columns")
        return decoded(MXFP4(), codes, {"scale": scales}, f"{layer.name}.weight")
    scales, whole = layer.tensor("weight_scale", torch.float8_e4m3fn), layer.scales("weight_global_scale", rank=None)
    layer.check(scales.shape == (out, -(-columns // 16)) and whole.numel() == 1, "a scale per 16 columns, and one more")
    tensors = {"scale": scales.view(torch.uint8), "tensor_scale": whole.float().reciprocal().reshape(1, 1)}
    return decoded(NVFP4(), codes, tensors, f"{layer.name}.weight")


def _block(layer: Layer, groups: list[Mapping[str, Any]]) -> tuple[int, int] | None:
    """The rows and columns that share a scale, where the scales are neither one nor one per row."""
    scales, rows = layer.scales("weight_scale", rank=None), len(layer.tensors["weight"])
    for group in groups:
        size = group["weights"].get("block_structure")
        good = (
            isinstance(size, list) and len(size) == 2 and all(type(each) is int and 1 < each < 1 << 16 for each in size)
        )
        if good and scales.ndim == 2 and len(scales) == -(-rows // size[0]):
            return size[0], size[1]
    return None


def _matrix(scales: Tensor) -> Tensor:
    """Scales `[out, groups]`, however a scale of everything, or one per row, was written."""
    return scales.reshape(1, 1) if scales.numel() == 1 else scales.reshape(len(scales), -1)


def _unsigned(signed: Tensor) -> Tensor:
    return (signed.to(torch.int16) + 128).to(torch.uint8)
