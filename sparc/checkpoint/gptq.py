"""GPTQ layers, as AutoGPTQ and GPTQModel write them.

`qweight` is int32 `[in * bits / 32, out]`, packed along the inputs; `qzeros` is int32 `[groups, out * bits / 32]`,
packed along the outputs; `scales` is `[groups, out]`, and `g_idx` `[in]` says which group each input belongs to. In
the format `gptq`, the first version, stored zero points are one too small, modulo 2^bits (AutoGPTQ,
nn_modules/qlinear); in `gptq_v2` they are as they are.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparc.checkpoint.base import StoredWeight, unknown
from sparc.checkpoint.layer import Layer, integer_weight, sorted_columns, unpack_words, word_count

_FORMATS = {"gptq": 1, "gptq_v2": 0}


def read_gptq(layer: Layer, settings: Mapping[str, Any]) -> StoredWeight:
    """A layer's weight.

    Args:
        layer: its tensors.
        settings: the `quantization_config`; `bits` and `checkpoint_format` are read, all else is in the tensors.

    Raises:
        CaptureError: SPARC106, SPARC117 and SPARC118.
    """
    form = settings.get("checkpoint_format", "gptq")
    bits = settings.get("bits")
    if settings.get("dynamic"):
        raise unknown("GPTQ with settings of its own for some layers")
    if not isinstance(form, str) or form not in _FORMATS or type(bits) is not int or bits not in (2, 3, 4, 8):
        raise unknown(f"GPTQ of the format {str(form)[:40]!r} with {str(bits)[:40]} bits")
    packed, packed_zeros = layer.tensor("qweight", torch.int32), layer.tensor("qzeros", torch.int32)
    scales = layer.scales("scales").t().contiguous()
    out, groups = scales.shape
    columns = _columns(layer, packed, bits)
    layer.check(packed.shape == (word_count(bits, columns), out), "codes of every input and output")
    layer.check(packed_zeros.shape == (groups, word_count(bits, out)), "a zero point per scale")
    codes = unpack_words(packed.t(), bits, columns)
    zeros = unpack_words(packed_zeros, bits, out).t().contiguous()
    zeros = (zeros + _FORMATS[form]) & ((1 << bits) - 1)
    order = sorted_columns(layer, "g_idx", columns, groups)
    if order is not None:
        codes = codes.index_select(1, order)
    return integer_weight(layer, bits, codes, scales, zeros, order)


def _columns(layer: Layer, packed: Tensor, bits: int) -> int:
    """How many inputs the layer has: as many as groups are listed, else what the words hold."""
    if "g_idx" in layer.tensors:
        return int(layer.tensor("g_idx", (torch.int32, torch.int64), 1).shape[0])
    return int(packed.shape[0]) * 32 // bits
