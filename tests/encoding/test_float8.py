import math

import pytest
import torch

from sparc.diag import PassError
from sparc.encoding.float8 import Float8, e4m3_codes, e4m3_numbers
from sparc.encoding.operators import spec_name


def e4m3(code):
    """What a bit pattern means by the definition: bias 7, subnormals below 2^-6, one NaN of either sign."""
    sign, exponent, mantissa = (-1) ** (code >> 7), code >> 3 & 15, code & 7
    if (exponent, mantissa) == (15, 7):
        return math.nan
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))


PATTERNS = [code for code in range(256) if not math.isnan(e4m3(code))]


def test_every_bit_pattern_means_what_the_format_says():
    codes = torch.tensor(PATTERNS, dtype=torch.uint8)
    assert e4m3_numbers(codes).tolist() == [e4m3(code) for code in PATTERNS]
    assert torch.equal(e4m3_codes(e4m3_numbers(codes)), codes)


def test_ties_go_to_the_even_pattern():
    for code in range(0, 125):
        middle = torch.tensor((e4m3(code) + e4m3(code + 1)) / 2)
        assert e4m3_codes(middle).item() == code + code % 2


def test_by_hand():
    spec = Float8(2)
    grid = spec.fit(torch.tensor([[448.0, -3.0, 0.0, 0.0, 0.875]]))
    torch.testing.assert_close(grid.tensors["scale"], torch.tensor([[1.0, 2.0**-40, 0.875 / 448]]))
    codes = spec.codes(torch.tensor([[448.0, -3.0, 0.0, 0.0, 0.875]]), grid.tensors)
    assert codes.tolist() == [[0x7E, 0xC4, 0, 0, 0x7E]]
    assert codes.dtype == torch.uint8


@pytest.mark.parametrize("group", [4, "channel", "tensor"])
def test_no_code_is_nan(group):
    weight = torch.tensor([[1.0, -torch.inf, 2, 3, torch.nan, 1e30], [460, -500, 1e9, 470, 464, 1e-30]])
    spec = Float8(group)
    for grid in (spec.fit(weight), spec.fit(torch.full((2, 6), 448.0))):
        codes = spec.codes(weight, grid.tensors)
        assert not bool(((codes & 0x7F) == 0x7F).any())
        assert bool(torch.isfinite(spec.values(codes, grid.tensors, torch.float32)).all())


def test_relative_errors_are_at_most_a_sixteenth_where_numbers_are_normal():
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    spec = Float8()
    grid = spec.fit(weight)
    normal = weight.abs() >= grid.tensors["scale"] * 2**-6
    error = ((spec.round(weight, grid) - weight) / weight).abs()[normal]
    assert float(error.max()) <= 1 / 16
    assert int(normal.sum()) > 900


def test_columns_without_importance_do_not_widen_the_range():
    weight, importance = torch.tensor([[1.0, -0.5, 100.0, 0.25]]), torch.tensor([1.0, 2.0, 0.0, 1.0])
    torch.testing.assert_close(Float8().fit(weight, importance=importance).tensors["scale"], torch.tensor([[1 / 448]]))


def test_activations_are_quantized_per_token():
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    name = spec_name(Float8())
    codes, scale = torch.ops.sparc.quantize(x, [], name)
    assert codes.dtype == torch.uint8
    torch.testing.assert_close(scale, x.abs().amax(-1, keepdim=True) / 448)
    again = torch.ops.sparc.decode([codes, scale], name, "matrix", None, torch.float32)
    assert float(((again - x).abs() / x.abs().amax(-1, keepdim=True)).max()) <= 1 / 28 + 1e-6
    (static,) = torch.ops.sparc.quantize(x, [scale], name)
    assert torch.equal(static, codes)


def test_the_type_of_quantized_activations_is_known():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        codes, scale = torch.ops.sparc.quantize(torch.empty(2, 3, 8), [], spec_name(Float8()))
    assert (codes.dtype, tuple(codes.shape)) == (torch.uint8, (2, 3, 8))
    assert (scale.dtype, tuple(scale.shape)) == (torch.float32, (2, 3, 1))


@pytest.mark.parametrize("options", [{"group": 1}, {"group": "row"}, {"group": None}, {"scale_dtype": "float64"}])
def test_bad_options_are_refused(options):
    with pytest.raises(PassError) as caught:
        Float8(**options)
    assert caught.value.code == "SPARC209"
