"""AWQ layers, as AutoAWQ's `gemm` version writes them.

`qweight` is int32 `[in, out / 8]` and `qzeros` int32 `[groups, out / 8]`, both packed along the outputs: the nibbles of
a word, lowest first, are its outputs 0, 2, 4, 6, 1, 3, 5, 7 (AutoAWQ, awq/utils/packing_utils.py). `scales` is
`[groups, out]`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparc.checkpoint.base import StoredWeight, unknown
from sparc.checkpoint.layer import Layer, integer_weight, unpack_words

_BITS = 4
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of the outputs 0 to 7 among the nibbles of a word


def read_awq(layer: Layer, settings: Mapping[str, Any]) -> StoredWeight:
    """A layer's weight.

    Args:
        layer: its tensors.
        settings: the `quantization_config`; `bits`, `version` and `zero_point` are compared with what is read.

    Raises:
        CaptureError: SPARC106, SPARC117 and SPARC118.
    """
    version = str(settings.get("version", "gemm")).lower()
    bits = settings.get("bits", _BITS)
    if bits != _BITS or version != "gemm" or settings.get("zero_point", True) is not True:
        raise unknown(f"AWQ of the version {version[:40]!r} with {str(bits)[:40]} bits", 'version "gemm", 4 bits')
    packed, packed_zeros = layer.tensor("qweight", torch.int32), layer.tensor("qzeros", torch.int32)
    scales = layer.scales("scales")
    groups, out = scales.shape
    layer.check(packed.shape[1] * 8 == out and packed_zeros.shape == (groups, out // 8), "a scale per output")
    codes = _unpacked(packed).t().contiguous()
    return integer_weight(layer, _BITS, codes, scales.t().contiguous(), _unpacked(packed_zeros).t().contiguous())


def _unpacked(words: Tensor) -> Tensor:
    """Int32 `[rows, words]` as uint8 `[rows, 8 * words]`."""
    nibbles = unpack_words(words, _BITS, 8 * int(words.shape[1]))
    return nibbles.reshape(len(words), -1, 8)[..., list(_PLACES)].reshape(len(words), -1)
