"""The laws for encodings that hypothesis makes up, and the whole contract for those that are shipped."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparc.encoding.binary_code import BinaryCode
from sparc.encoding.blocks import Blocks
from sparc.encoding.codebook import Codebook
from sparc.encoding.dense import Dense
from sparc.encoding.float8 import Float8
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.microscaling import MXFP4, NVFP4
from sparc.encoding.nm import NM
from sparc.encoding.unstructured import Unstructured
from sparc.testing import assert_encoding
from sparc.testing.encodings import same_bits

SHIPPED = [
    Dense(),
    IntGrid(),
    IntGrid(8, "tensor", symmetric=False),
    IntGrid(4, 7, symmetric=False, scale_dtype="bfloat16"),
    IntGrid(4, 32, symmetric=False, zero="minimum", scale_dtype="float16"),
    IntGrid(3, 10, symmetric=False, zero="minimum"),
    Float8(5, "bfloat16"),
    MXFP4(),
    NVFP4(),
    Codebook(group=7, scale_dtype="float16"),
    Codebook("kmeans", 3, "none"),
    BinaryCode(1, "channel", "float16"),
    NM(2, 4, of=IntGrid(8)),
    NM(5, 16, of=IntGrid(2, 6, symmetric=False)),
    NM(2, 4, of=Float8()),
    Blocks((8, 16)),
    Blocks((5, 3), of=Codebook()),
    Blocks((1, "all"), of=IntGrid(4, 12, symmetric=False, zero="minimum")),
    Unstructured(),
    Unstructured(of=IntGrid(3, 10, symmetric=False, zero="minimum")),
]
"""Every encoding, and what is particular about each."""

MORE = [
    Dense("bfloat16"),
    IntGrid(8, 32, symmetric=False, zero="minimum"),
    IntGrid(4, 32),
    IntGrid(2, 16, symmetric=False),
    IntGrid(3, 32),
    Float8(),
    Float8("tensor"),
    Codebook(),
    Codebook("kmeans", 4, 32),
    Codebook("kmeans", 2, "channel"),
    BinaryCode(),
    BinaryCode(2, "tensor"),
    BinaryCode(4, 7),
    NM(),
    NM(1, 4, of=IntGrid(4, 32, symmetric=False, zero="minimum")),
    NM(2, 4, of=IntGrid(3, 32, symmetric=False)),
    NM(2, 4, of=NVFP4()),
    NM(2, 4, of=Codebook("kmeans", 3)),
    NM(2, 4, of=BinaryCode(2, 32)),
    Blocks((64, 64), of=IntGrid(8)),
    Blocks((8, 16), of=Float8(32, "float16")),
    Blocks((5, 3), of=MXFP4()),
    Blocks((5, 3), of=BinaryCode(3, 16)),
    Blocks((5, 3), of=IntGrid(4, 12, symmetric=False, zero="minimum")),
    Blocks(("all", 1), of=IntGrid(8)),
    Unstructured(of=IntGrid(4, 32)),
    Unstructured(of=NVFP4()),
    Unstructured(of=Codebook("kmeans", 3)),
    Unstructured(of=BinaryCode(2, 16)),
]
"""Other options and combinations."""


@pytest.mark.parametrize(
    "encoding", [*SHIPPED, *(pytest.param(each, marks=pytest.mark.slow) for each in MORE)], ids=str
)
def test_the_contract_holds(encoding):
    assert_encoding(encoding)


@pytest.mark.parametrize(
    "encoding", [Float8(), MXFP4(), NVFP4(), Codebook(), Codebook("kmeans", 3, "none"), BinaryCode()], ids=str
)
@pytest.mark.parametrize("search", [False, True])
def test_numbers_that_are_not_finite_are_rounded_to_finite_ones(encoding, search):
    weight = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    weight[0, 0], weight[1, 3], weight[2, 35] = torch.inf, torch.nan, -torch.inf
    grid = encoding.fit(weight, search=search)
    assert bool(torch.isfinite(encoding.round(weight, grid)).all())
    finite = encoding.fit(torch.ones(4, 40), search=search)
    assert bool(torch.isfinite(encoding.round(weight, finite)).all())


@st.composite
def elements(draw):
    group = draw(st.sampled_from(["channel", "tensor"]) | st.integers(2, 40))
    dtype = draw(st.sampled_from(["float32", "float16", "bfloat16"]))
    kind = draw(st.sampled_from([Dense, IntGrid, Float8, MXFP4, NVFP4, Codebook, BinaryCode]))
    if kind is IntGrid:
        symmetric, zero = draw(st.sampled_from([(True, "integer"), (False, "integer"), (False, "minimum")]))
        return IntGrid(draw(st.sampled_from([2, 3, 4, 8])), group, symmetric, zero, dtype)
    if kind is Codebook:
        code, bits = draw(st.sampled_from([("nf4", 4), ("kmeans", 2), ("kmeans", 3), ("kmeans", 4)]))
        return Codebook(code, bits, draw(st.sampled_from([group, "none"])) if code == "kmeans" else group, dtype)
    if kind is BinaryCode:
        return BinaryCode(draw(st.integers(1, 4)), group, draw(st.sampled_from(["float32", "float16"])))
    return {Dense: lambda: Dense(dtype), Float8: lambda: Float8(group, dtype)}.get(kind, kind)()


@st.composite
def encodings_and_shapes(draw):
    inner = draw(elements())
    rows, columns, batch = (
        draw(st.integers(1, 9)),
        draw(st.integers(1, 40)),
        draw(st.sampled_from([(), (), (2,), (1, 3)])),
    )
    kind = draw(st.sampled_from(["plain", "nm", "blocks", "unstructured"]))
    if kind == "unstructured":
        return Unstructured(of=inner), (*batch, rows, columns)
    if kind == "nm":
        m = draw(st.integers(2, 12))
        return NM(draw(st.integers(1, m - 1)), m, of=inner), (*batch, rows, m * draw(st.integers(1, 5)))
    if kind == "blocks":
        edges = draw(st.just("all") | st.integers(1, rows)), draw(st.just("all") | st.integers(1, columns))
        return Blocks(edges, of=inner), (*batch, rows, columns)
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
