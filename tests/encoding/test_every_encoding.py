"""The laws for encodings that hypothesis makes up, and the whole contract for those that are shipped."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparc.encoding.blocks import Blocks
from sparc.encoding.dense import Dense
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.nm import NM
from sparc.testing import assert_encoding
from sparc.testing.encodings import same_bits

SHIPPED = [
    Dense(),
    Dense("bfloat16"),
    IntGrid(),
    IntGrid(8, "tensor", symmetric=False),
    IntGrid(8, 32, symmetric=False, zero="minimum"),
    IntGrid(4, 32),
    IntGrid(4, 7, symmetric=False, scale_dtype="bfloat16"),
    IntGrid(4, 32, symmetric=False, zero="minimum", scale_dtype="float16"),
    IntGrid(2, 16, symmetric=False),
    NM(),
    NM(2, 4, of=IntGrid(8)),
    NM(1, 4, of=IntGrid(4, 32, symmetric=False, zero="minimum")),
    NM(5, 16, of=IntGrid(2, 6, symmetric=False)),
    Blocks((8, 16)),
    Blocks((64, 64), of=IntGrid(8)),
    Blocks((5, 3), of=IntGrid(4, 12, symmetric=False, zero="minimum")),
]


@pytest.mark.parametrize("encoding", SHIPPED, ids=str)
def test_the_contract_holds(encoding):
    assert_encoding(encoding)


@st.composite
def elements(draw):
    if draw(st.booleans()):
        return Dense(draw(st.sampled_from(["float32", "float16", "bfloat16"])))
    symmetric, zero = draw(st.sampled_from([(True, "integer"), (False, "integer"), (False, "minimum")]))
    group = draw(st.sampled_from(["channel", "tensor"]) | st.integers(2, 40))
    dtype = draw(st.sampled_from(["float32", "float16", "bfloat16"]))
    return IntGrid(draw(st.sampled_from([2, 4, 8])), group, symmetric, zero, dtype)


@st.composite
def encodings_and_shapes(draw):
    inner = draw(elements())
    rows, columns, batch = (
        draw(st.integers(1, 9)),
        draw(st.integers(1, 40)),
        draw(st.sampled_from([(), (), (2,), (1, 3)])),
    )
    kind = draw(st.sampled_from(["plain", "nm", "blocks"]))
    if kind == "nm":
        m = draw(st.integers(2, 12))
        return NM(draw(st.integers(1, m - 1)), m, of=inner), (*batch, rows, m * draw(st.integers(1, 5)))
    if kind == "blocks":
        return Blocks((draw(st.integers(1, rows)), draw(st.integers(1, columns))), of=inner), (*batch, rows, columns)
    return inner, (*batch, rows, columns)


@given(
    encodings_and_shapes(),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from([0.0, 1.0, -30.0]),
    st.integers(-10, 10),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_decoding_what_was_encoded_is_exact(case, dtype, shift, exponent, search, seed):
    encoding, shape = case
    assert encoding.accepts(shape) is None
    generator = torch.Generator().manual_seed(seed)
    weight = ((torch.randn(shape, generator=generator) + shift) * 2.0**exponent).to(dtype)
    weight = weight * (torch.rand(shape[-2:], generator=generator) < 0.7)
    grid = encoding.fit(weight, search=search)
    rounded = encoding.round(weight, grid)
    parts = encoding.encode(rounded, grid)
    assert tuple(parts) == encoding.part_names
    assert sum(part.nbytes for part in parts.values()) == encoding.bytes_on(grid, shape)
    assert same_bits(encoding.decode(parts, shape, dtype), rounded)
    assert same_bits(encoding.round(rounded, grid), rounded)
