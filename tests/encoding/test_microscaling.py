import itertools

import pytest
import torch

from sparc.encoding.codebook import Codebook
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.microscaling import MXFP4, NVFP4, e2m1_codes, e2m1_numbers

MAGNITUDES = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(spec, weight, **options):
    grid = spec.fit(weight, **options)
    return float((spec.round(weight, grid) - weight).square().mean() / weight.square().mean())


def test_every_pattern_means_what_the_format_says():
    codes = torch.arange(16, dtype=torch.uint8)
    assert e2m1_numbers(codes).tolist() == [*MAGNITUDES, *(-each for each in MAGNITUDES)]
    assert e2m1_codes(e2m1_numbers(codes)).tolist() == [*range(8), 0, *range(9, 16)]


def test_nearest_with_ties_to_the_even_pattern():
    for code, (low, high) in enumerate(itertools.pairwise(MAGNITUDES)):
        middle = (low + high) / 2
        below, above = middle * (1 - 1e-6), middle * (1 + 1e-6)
        even = code + code % 2
        assert e2m1_codes(torch.tensor([below, middle, above])).tolist() == [code, even, code + 1]
        signed = [code + 8 if code else 0, even + 8 if even else 0, code + 9]
        assert e2m1_codes(-torch.tensor([below, middle, above])).tolist() == signed
    assert e2m1_codes(torch.tensor([7.0, -1e30])).tolist() == [7, 15]


# MXFP4 ----------------------------------------------------------------------------------------------------------------
def test_mx_by_hand():
    weight = torch.zeros(1, 70)
    weight[0, :3] = torch.tensor([6.0, -1.0, 7.9])  # floor(log2 7.9) - 2 = 0
    weight[0, 32:34] = torch.tensor([0.25, 0.05])  # floor(log2 0.25) - 2 = -4: values 4/16 and 0.0625 * 0.8 -> 1/16
    spec = MXFP4()
    grid = spec.fit(weight)
    assert grid.tensors["scale"].tolist() == [[127, 123, 127]]
    rounded = spec.round(weight, grid)
    assert rounded[0, :3].tolist() == [6.0, -1.0, 6.0]
    assert rounded[0, 32:34].tolist() == [0.25, 0.0625]
    assert spec.encode(rounded, grid)["codes"][0, :2].tolist() == [0x7 | 0xA << 4, 0x7]


def test_mx_scales_are_exact_powers_of_two_down_to_the_least():
    exponents = torch.arange(255, dtype=torch.uint8).reshape(1, -1)
    assert MXFP4().scales({"scale": exponents}).tolist() == [[2.0 ** (each - 127) for each in range(255)]]


@pytest.mark.parametrize("power", [-40, -3, 1, 60])
def test_mx_errors_follow_powers_of_two(power):
    weight, spec = normal(8, 96), MXFP4()
    scaled = spec.round(weight * 2.0**power, spec.fit(weight * 2.0**power))
    assert torch.equal(scaled, spec.round(weight, spec.fit(weight)) * 2.0**power)


def test_a_search_takes_the_next_power_where_the_floor_rule_saturates():
    weight = torch.full((1, 32), 7.9)
    spec = MXFP4()
    assert spec.fit(weight).tensors["scale"].tolist() == [[127]]
    grid = spec.fit(weight, search=True)
    assert grid.tensors["scale"].tolist() == [[128]]
    assert spec.round(weight, grid)[0, 0] == 8


# NVFP4 ----------------------------------------------------------------------------------------------------------------
def test_nv_by_hand():
    weight = torch.zeros(1, 33)
    weight[0, 0], weight[0, 1] = 2688, -448  # 448 * 6: the tensor scale is 1, the block's 448
    weight[0, 16], weight[0, 17] = 12, 2  # the block's scale is 2
    spec = NVFP4()
    grid = spec.fit(weight)
    assert grid.tensors["tensor_scale"].tolist() == [[1.0]]
    assert grid.tensors["scale"].tolist() == [[0x7E, 0x40, 0x01]]
    rounded = spec.round(weight, grid)
    assert rounded[0, [0, 1, 16, 17]].tolist() == [2688, -448, 12, 2]


def test_nv_has_a_tensor_scale_for_each_matrix_of_a_batch():
    spec, weight = NVFP4(), normal(3, 4, 32) * torch.tensor([1.0, 100, 1e-4]).reshape(3, 1, 1)
    grid = spec.fit(weight)
    for index, matrix in enumerate(weight):
        alone = spec.fit(matrix)
        for name in ("tensor_scale", "scale"):
            assert torch.equal(alone.tensors[name], grid.tensors[name][index])


def test_a_small_block_keeps_a_scale():
    weight = torch.zeros(1, 32)
    weight[0, 0], weight[0, 16] = 1e4, 1e-4
    assert NVFP4().fit(weight).tensors["scale"].tolist() == [[0x7E, 0x01]]


# both -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("spec", [MXFP4(), NVFP4()], ids=str)
def test_a_short_last_block_is_not_led_by_what_fills_it(spec, search):
    weight = normal(3, 70)
    filled = torch.cat([weight, torch.zeros(3, 26)], dim=-1)  # zeros cost nothing
    short, long = (spec.fit(each, search=search) for each in (weight, filled))
    assert torch.equal(spec.round(weight, short), spec.round(filled, long)[:, :70])


@pytest.mark.parametrize(("spec", "bits"), [(MXFP4(), 4.25), (NVFP4(), 4.5), (Codebook(scale_dtype="float16"), 4.25)])
def test_bits_per_weight(spec, bits):
    shape = (64, 128)
    per_matrix = 4 if isinstance(spec, NVFP4) else 0
    assert float((spec.bytes(shape) - per_matrix) * 8 / (64 * 128)) == bits


def test_errors_of_normal_weights_are_in_the_known_order():
    weight = normal(256, 1024)
    errors = [relative_error(spec, weight) for spec in (Codebook(), NVFP4(), IntGrid(4, 32), MXFP4())]
    assert errors == sorted(errors)
    for error, known in zip(errors, (0.0085, 0.0091, 0.0094, 0.0130), strict=True):
        assert abs(error / known - 1) < 0.02


@pytest.mark.parametrize("spec", [MXFP4(), NVFP4(), Codebook()], ids=str)
def test_a_search_is_never_worse_in_any_row(spec):
    weight, importance = normal(16, 80), torch.linspace(0.1, 3, 80)
    plain, searched = (spec.fit(weight, importance=importance, search=search) for search in (False, True))
    errors = [(importance * (spec.round(weight, grid) - weight).square()).sum(-1) for grid in (plain, searched)]
    assert bool((errors[1] <= errors[0] * (1 + 1e-6)).all())
    assert float(errors[1].sum()) < 0.99 * float(errors[0].sum())
