"""Packing of small unsigned numbers into bytes."""

import math

import torch
from torch import Tensor


def pack_bits(numbers: Tensor, bits: int) -> Tensor:
    """Rows of numbers as little-endian bit streams, each row in whole bytes.

    Number `i` of a row takes the bits `[i * bits, (i + 1) * bits)` of its stream, lowest bit first; bit `s` of the
    stream is bit `s % 8` of byte `s // 8`; what is left of the last byte is 0. With 4 bits, the first number is the low
    nibble.

    Args:
        numbers: uint8 `[..., n]`, each below `2**bits`.
        bits: 1 to 8.

    Returns:
        uint8 `[..., ceil(n * bits / 8)]`.
    """
    if bits == 8:
        return numbers
    count, size = _word(bits)
    length = packed_length(int(numbers.shape[-1]), bits)
    lanes = _in_words(numbers, count)
    word = lanes[..., 0].to(_word_dtype(size))
    for lane in range(1, count):
        word = word | (lanes[..., lane].to(word.dtype) << (bits * lane))
    if size == 1:
        return word
    split = torch.stack([(word >> (8 * byte)) & 0xFF for byte in range(size)], dim=-1).to(torch.uint8)
    return split.flatten(-2)[..., :length].contiguous()


def unpack_bits(packed: Tensor, bits: int, length: int) -> Tensor:
    """The inverse of `pack_bits`, for rows of `length` numbers: uint8 `[..., length]`."""
    if bits == 8:
        return packed
    count, size = _word(bits)
    lanes = _in_words(packed, size)
    word = lanes[..., 0].to(_word_dtype(size))
    for byte in range(1, size):
        word = word | (lanes[..., byte].to(word.dtype) << (8 * byte))
    split = torch.stack([(word >> (bits * lane)) & (2**bits - 1) for lane in range(count)], dim=-1).to(torch.uint8)
    return split.flatten(-2)[..., :length].contiguous()


def packed_length(length: int, bits: int) -> int:
    """Bytes of a packed row of `length` numbers."""
    return -(-length * bits // 8)


def _word(bits: int) -> tuple[int, int]:
    """The least group of numbers that fills whole bytes: how many numbers, how many bytes."""
    shared = math.gcd(bits, 8)
    return 8 // shared, bits // shared


def _word_dtype(size: int) -> torch.dtype:
    return torch.uint8 if size == 1 else torch.int64


def _in_words(row: Tensor, count: int) -> Tensor:
    """`[..., n]` as `[..., words, count]`, filled up with zeros."""
    short = -row.shape[-1] % count
    if short:
        row = torch.nn.functional.pad(row, (0, short))
    return row.reshape(*row.shape[:-1], row.shape[-1] // count, count)
