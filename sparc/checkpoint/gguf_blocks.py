"""ggml's formats of blocks as encodings, value for value (ggml, src/ggml-common.h and ggml-quants.c).

Rows are cut into blocks, each with its own scales. What a block says is written as an encoding of sparc with the same
codes and, but for products of two scales that a block multiplies first, the same scales. Those products are exact in
float32: a float16 has 11 significant bits, what it is multiplied by has at most 8.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from sparc.checkpoint.base import StoredWeight, decoded, plain
from sparc.encoding.base import ElementEncoding
from sparc.encoding.codebook import Codebook
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.microscaling import MXFP4

Bytes = NDArray[np.uint8]
Numbers = NDArray[Any]
Parts = tuple[Numbers, Mapping[str, Numbers]]

_SUPER = 256  # weights in a block of the K formats
# the 16 numbers of IQ4_NL and IQ4_XS, kvalues_iq4nl in ggml-common.h
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Block:
    """A format.

    Args:
        name: ggml's name.
        columns: how many weights of a row a block holds.
        size: its bytes.
        read: from blocks `[n, size]` to a code per element, `[n, columns]`, and the grid's tensors, `[n, groups]`; None
            for plain floats.
        spec: the encoding; None for plain floats.
    """

    name: str
    columns: int
    size: int
    read: Callable[[Bytes], Parts] | None = None
    spec: ElementEncoding | None = None


def stored_weight(block: Block, rows: Bytes, name: str) -> StoredWeight:
    """The weight whose rows have these bytes.

    Args:
        block: the format.
        rows: uint8 `[out, bytes per row]`; not kept.
        name: the weight's name, for messages.

    Raises:
        CaptureError: SPARC106 when a value is not finite.
    """
    if block.read is None or block.spec is None:
        return plain(torch.from_numpy(rows.copy()).view(getattr(torch, block.name)), name)
    out = rows.shape[0]
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is refused afterwards
        numbers, tensors = block.read(np.ascontiguousarray(rows).reshape(-1, block.size))
    grid = {key: torch.from_numpy(np.ascontiguousarray(each)).reshape(out, -1) for key, each in tensors.items()}
    if isinstance(block.spec, Codebook):
        grid["table"] = torch.tensor(IQ4, dtype=torch.float32)
    return decoded(block.spec, torch.from_numpy(numbers.reshape(out, -1)), grid, name)


# fields of blocks -----------------------------------------------------------------------------------------------------
def _half(blocks: Bytes, start: int) -> NDArray[np.float16]:
    """A float16 of every block, `[n, 1]`."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16)


def _single(blocks: Bytes, start: int) -> NDArray[np.float32]:
    """The same in float32, to multiply with."""
    return _half(blocks, start).astype(np.float32)


def _halves(codes: Bytes, run: int) -> Bytes:
    """Nibbles `[n, bytes]` as numbers `[n, 2 * bytes]`: of every `run` bytes first the low ones, then the high ones."""
    split = codes.reshape(len(codes), -1, 1, run) >> np.array([0, 4], np.uint8)[:, None]
    return (split & np.uint8(15)).reshape(len(codes), -1)


def _bits(codes: Bytes, run: int, width: int) -> Bytes:
    """Numbers of `width` bits: of every `run` bytes first their lowest bits, and so on."""
    split = codes.reshape(len(codes), -1, 1, run) >> np.arange(0, 8, width, dtype=np.uint8)[:, None]
    return (split & np.uint8(2**width - 1)).reshape(len(codes), -1)


def _signed(codes: Bytes, offset: int) -> NDArray[np.int8]:
    return codes.astype(np.int8) - np.int8(offset)


# blocks of 32 ---------------------------------------------------------------------------------------------------------
def _q4_0(blocks: Bytes) -> Parts:
    return _signed(_halves(blocks[:, 2:], 16), 8), {"scale": _half(blocks, 0)}


def _q4_1(blocks: Bytes) -> Parts:
    return _halves(blocks[:, 4:], 16), {"scale": _half(blocks, 0), "minimum": _half(blocks, 2)}


def _fifth(blocks: Bytes, start: int) -> Bytes:
    """Codes of 5 bits: the fifth bits are in 4 bytes, in order, before the nibbles."""
    high = np.unpackbits(blocks[:, start : start + 4], axis=1, bitorder="little")
    return _halves(blocks[:, start + 4 :], 16) | (high << np.uint8(4))


def _q5_0(blocks: Bytes) -> Parts:
    return _signed(_fifth(blocks, 2), 16), {"scale": _half(blocks, 0)}


def _q5_1(blocks: Bytes) -> Parts:
    return _fifth(blocks, 4), {"scale": _half(blocks, 0), "minimum": _half(blocks, 2)}


def _q8_0(blocks: Bytes) -> Parts:
    return blocks[:, 2:].view(np.int8), {"scale": _half(blocks, 0)}


def _iq4_nl(blocks: Bytes) -> Parts:
    return _halves(blocks[:, 2:], 16), {"scale": _half(blocks, 0)}


def _mxfp4(blocks: Bytes) -> Parts:
    return _halves(blocks[:, 1:], 16), {"scale": blocks[:, :1]}


# blocks of 256 --------------------------------------------------------------------------------------------------------
def _six_bits(blocks: Bytes, start: int) -> tuple[Bytes, Bytes]:
    """Eight scales and eight minima of 6 bits in 12 bytes, of Q4_K and Q5_K."""
    low, middle, high = (blocks[:, start + 4 * each : start + 4 * each + 4] for each in range(3))
    scales = np.concatenate([low & 63, (high & 15) | (low >> 2 & 48)], axis=1)
    minima = np.concatenate([middle & 63, (high >> 4) | (middle >> 2 & 48)], axis=1)
    return scales, minima


def _with_minima(blocks: Bytes) -> Mapping[str, Numbers]:
    scales, minima = _six_bits(blocks, 4)
    return {"scale": _single(blocks, 0) * scales, "minimum": -(_single(blocks, 2) * minima)}


def _q4_k(blocks: Bytes) -> Parts:
    return _halves(blocks[:, 16:], 32), _with_minima(blocks)


def _q5_k(blocks: Bytes) -> Parts:
    high = _bits(blocks[:, 16:48], 32, 1)
    return _halves(blocks[:, 48:], 32) | (high << 4), _with_minima(blocks)


def _q6_k(blocks: Bytes) -> Parts:
    low, high = _halves(blocks[:, :128], 64), _bits(blocks[:, 128:192], 32, 2)
    scales = blocks[:, 192:208].view(np.int8)
    return _signed(low | (high << np.uint8(4)), 32), {"scale": _single(blocks, 208) * scales}


def _q3_k(blocks: Bytes) -> Parts:
    low, high = _bits(blocks[:, 32:96], 32, 2), _bits(blocks[:, :32], 32, 1)
    scales = _halves(blocks[:, 96:104], 8) | (_bits(blocks[:, 104:108], 4, 2) << np.uint8(4))
    return _signed(low | (high << np.uint8(2)), 4), {"scale": _single(blocks, 108) * _signed(scales, 32)}


def _q2_k(blocks: Bytes) -> Parts:
    both = blocks[:, :16]
    scale, minimum = _single(blocks, 80) * (both & 15), -(_single(blocks, 82) * (both >> 4))
    return _bits(blocks[:, 16:80], 32, 2), {"scale": scale, "minimum": minimum}


def _iq4_xs(blocks: Bytes) -> Parts:
    high = np.ascontiguousarray(blocks[:, 2:4]).view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=-1).reshape(len(blocks), -1)
    scales = _signed(low | (high.astype(np.uint8) << 4), 32)
    return _halves(blocks[:, 8:], 16), {"scale": _single(blocks, 0) * scales}


_symmetric = partial(IntGrid, symmetric=True)
_shifted = partial(IntGrid, symmetric=False, zero="minimum")
_F16: Literal["float16"] = "float16"

# by ggml's number of the type; codes of 5 and 6 bits are stored as bytes
BLOCKS: Mapping[int, Block] = {
    0: Block("float32", 1, 4),
    1: Block("float16", 1, 2),
    30: Block("bfloat16", 1, 2),
    2: Block("Q4_0", 32, 18, _q4_0, _symmetric(4, 32, scale_dtype=_F16)),
    3: Block("Q4_1", 32, 20, _q4_1, _shifted(4, 32, scale_dtype=_F16)),
    6: Block("Q5_0", 32, 22, _q5_0, _symmetric(8, 32, scale_dtype=_F16)),
    7: Block("Q5_1", 32, 24, _q5_1, _shifted(8, 32, scale_dtype=_F16)),
    8: Block("Q8_0", 32, 34, _q8_0, _symmetric(8, 32, scale_dtype=_F16)),
    10: Block("Q2_K", _SUPER, 84, _q2_k, _shifted(2, 16)),
    11: Block("Q3_K", _SUPER, 110, _q3_k, _symmetric(3, 16)),
    12: Block("Q4_K", _SUPER, 144, _q4_k, _shifted(4, 32)),
    13: Block("Q5_K", _SUPER, 176, _q5_k, _shifted(8, 32)),
    14: Block("Q6_K", _SUPER, 210, _q6_k, _symmetric(8, 16)),
    20: Block("IQ4_NL", 32, 18, _iq4_nl, Codebook("kmeans", 4, 32, scale_dtype=_F16)),
    23: Block("IQ4_XS", _SUPER, 136, _iq4_xs, Codebook("kmeans", 4, 32)),
    39: Block("MXFP4", 32, 17, _mxfp4, MXFP4()),
}
