import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparc.encoding.bits import pack_bits, packed_length, unpack_bits


@given(st.integers(1, 8), st.integers(1, 40), st.integers(0, 2**31))
def test_unpacking_restores_what_was_packed(bits, length, seed):
    numbers = torch.randint(0, 2**bits, (3, length), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack_bits(numbers, bits)
    assert packed.shape == (3, packed_length(length, bits))
    assert torch.equal(unpack_bits(packed, bits, length), numbers)


@given(st.integers(1, 8), st.lists(st.integers(0, 255), min_size=1, max_size=20))
def test_rows_are_little_endian_bit_streams(bits, numbers):
    numbers = [number % 2**bits for number in numbers]
    stream = sum(number << (bits * index) for index, number in enumerate(numbers))
    expected = list(stream.to_bytes(packed_length(len(numbers), bits), "little"))
    assert pack_bits(torch.tensor([numbers], dtype=torch.uint8), bits).tolist() == [expected]


@pytest.mark.parametrize(("bits", "length", "size"), [(4, 3, 2), (3, 8, 3), (3, 9, 4), (2, 4, 1), (8, 5, 5), (7, 1, 1)])
def test_rows_take_whole_bytes(bits, length, size):
    assert packed_length(length, bits) == size
