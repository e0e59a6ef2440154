"""ggml's formats, bit for bit as the gguf package decodes them, on every code and on odd scales."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import dequantize

from sparc.checkpoint.gguf_blocks import BLOCKS, IQ4, stored_weight
from sparc.diag import CaptureError
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.operators import encode_weight
from tests.checkpoint.gguf_files import SCALES, random_blocks

QUANTIZED = [number for number, block in BLOCKS.items() if block.columns > 1]
BITS = {
    "Q4_0": 4.5, "Q4_1": 5, "Q5_0": 8.5, "Q5_1": 9, "Q8_0": 8.5, "Q2_K": 6, "Q3_K": 5,
    "Q4_K": 6, "Q5_K": 10, "Q6_K": 10,
    "MXFP4": 4.25, "IQ4_NL": 4.5, "IQ4_XS": 5,
}  # fmt: skip


def same_bits(first, second):
    """Equal, with zeros of either sign taken for each other."""
    return torch.equal(first + 0.0, second + 0.0)


@pytest.mark.parametrize("number", QUANTIZED, ids=lambda number: BLOCKS[number].name)
def test_values_are_the_formats(number):
    block = BLOCKS[number]
    raw = random_blocks(Kind(number), 16, 512)
    weight = stored_weight(block, raw, "w")
    assert same_bits(weight.dense, torch.from_numpy(dequantize(raw, Kind(number)).astype(np.float32)))
    parts = encode_weight(weight.dense, weight.grid)
    again = weight.grid.spec.decode(parts, weight.dense.shape, torch.float32)
    assert torch.equal(again.view(torch.int32), weight.dense.view(torch.int32))


@pytest.mark.parametrize("number", QUANTIZED, ids=lambda number: BLOCKS[number].name)
def test_codes_are_the_files(number):
    block = BLOCKS[number]
    raw = random_blocks(Kind(number), 8, 256, seed=1)
    codes, tensors = block.read(np.ascontiguousarray(raw).reshape(-1, block.size))
    weight = stored_weight(block, raw, "w")
    found = weight.grid.spec.codes(weight.dense, weight.grid.tensors)
    expected = torch.from_numpy(codes.reshape(8, 256))
    if block.name == "MXFP4":  # negative zero is written as zero
        expected = torch.where(expected == 8, 0, expected)
    scale = torch.from_numpy(np.ascontiguousarray(tensors["scale"], np.float32)).reshape(8, -1)
    alive = (scale != 0).repeat_interleave(256 // scale.shape[1], 1)  # where the scale is 0, any code is right
    assert alive.float().mean() > 0.9
    assert torch.equal(found[alive], expected[alive])


@pytest.mark.parametrize("number", sorted(SCALES), ids=lambda number: Kind(number).name)
def test_scales_of_zero_and_subnormal_scales(number):
    block, raw = BLOCKS[number], random_blocks(Kind(number), 4, 512)
    blocks = raw.reshape(-1, block.size)
    for start in SCALES[number]:
        blocks[0, start : start + 2] = 0
        blocks[1, start : start + 2] = [1, 0]
        blocks[2, start : start + 2] = [0, 0x80]
    weight = stored_weight(block, raw, "w")
    assert same_bits(weight.dense, torch.from_numpy(dequantize(raw, Kind(number)).astype(np.float32)))
    assert (weight.grid.tensors["scale"] != 0).all() or not isinstance(block.spec, IntGrid)
    parts = encode_weight(weight.dense, weight.grid)
    assert torch.equal(weight.grid.spec.decode(parts, weight.dense.shape, torch.float32), weight.dense)


@pytest.mark.parametrize("number", sorted(SCALES), ids=lambda number: Kind(number).name)
@pytest.mark.parametrize("pattern", [0x7C00, 0xFC00, 0x7E01], ids=["inf", "-inf", "nan"])
def test_weights_that_are_not_finite_are_refused(number, pattern):
    block, raw = BLOCKS[number], random_blocks(Kind(number), 4, 512)
    start = SCALES[number][0]
    raw.reshape(-1, block.size)[5, start : start + 2] = [pattern & 255, pattern >> 8]
    with pytest.raises(CaptureError, match=r"layer\.q") as caught:
        stored_weight(block, raw, "layer.q")
    assert caught.value.code == "SPARC106"


def test_bits_per_weight():
    found = {}
    for number in QUANTIZED:
        spec = BLOCKS[number].spec
        table = 16 * 4 if BLOCKS[number].name.startswith("IQ4") else 0  # once per matrix
        found[BLOCKS[number].name] = float((spec.bytes((64, 512)) - table) * 8 / (64 * 512))
    assert found == BITS


def test_floats_are_kept():
    numbers = torch.randn(4, 64)
    for number, dtype in ((0, torch.float32), (1, torch.float16), (30, torch.bfloat16)):
        stored = numbers.to(dtype)
        weight = stored_weight(BLOCKS[number], stored.view(torch.uint8).numpy(), "w")
        assert torch.equal(weight.dense, stored.float())
        assert (weight.grid is None) == (dtype == torch.float32)


def test_the_numbers_of_iq4():
    codes = np.array([[0] * 2 + [code | code << 4 for code in range(16)]], np.uint8)
    codes[0, :2] = np.array([1.0], np.float16).view(np.uint8)
    assert dequantize(codes, Kind.IQ4_NL)[0, :16].tolist() == list(IQ4)
