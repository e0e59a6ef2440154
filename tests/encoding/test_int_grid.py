import itertools

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparc.diag import PassError
from sparc.encoding.grid import Grid
from sparc.encoding.int_grid import IntGrid

KINDS = [(True, "integer"), (False, "integer"), (False, "minimum")]
DTYPES = ["float32", "float16", "bfloat16"]


def weights(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def q4_1(rows=64, groups=5, seed=0):
    """Codes, fp16 scales and fp16 minima of a GGUF Q4_1 tensor, whose quantizer always uses the codes 0 and 15."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, groups, 32), generator=generator)
    codes[..., 3], codes[..., 17] = 0, 15
    scale = (torch.rand(rows, groups, generator=generator) * 0.01 + 0.001).half()
    minimum = (torch.randn(rows, groups, generator=generator) * 0.1).half()
    values = codes * scale.float().unsqueeze(-1) + minimum.float().unsqueeze(-1)
    return codes.flatten(-2), scale, minimum, values.flatten(-2)


# what the numbers mean ----------------------------------------------------------------------------------------------
def test_symmetric_by_hand():
    spec = IntGrid(4, 2)
    grid = spec.fit(torch.tensor([[0.7, -1.4, 0.0, 0.05, 3.0]]))
    torch.testing.assert_close(grid.tensors["scale"], torch.tensor([[0.2, 0.05 / 7, 3 / 7]]))
    assert spec.codes(torch.tensor([[0.7, -1.4, 0.0, 0.05, 3.0]]), grid.tensors).tolist() == [[4, -7, 0, 7, 7]]


def test_integer_zero_by_hand():
    spec = IntGrid(4, "channel", symmetric=False)
    grid = spec.fit(torch.tensor([[-1.0, 0.5, 2.0], [1.0, 2.0, 3.0]]))
    torch.testing.assert_close(grid.tensors["scale"], torch.tensor([[0.2], [0.2]]))
    assert grid.tensors["zero"].tolist() == [[5], [0]]
    assert grid.tensors["zero"].dtype == torch.uint8


def test_minimum_by_hand():
    spec = IntGrid(2, "tensor", symmetric=False, zero="minimum")
    grid = spec.fit(torch.tensor([[5.0, 6.0], [7.0, 8.0]]))
    assert {name: tensor.tolist() for name, tensor in grid.tensors.items()} == {"scale": [[1.0]], "minimum": [[5.0]]}
    assert spec.codes(torch.tensor([[5.0, 6.4], [7.0, 9.0]]), grid.tensors).tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize(("bits", "kind", "dtype"), list(itertools.product((2, 3, 4, 8), KINDS, DTYPES)))
@pytest.mark.parametrize("group", [5, "channel", "tensor"])
def test_min_max_rounds_by_at_most_half_a_step(bits, kind, dtype, group):
    spec = IntGrid(bits, group, *kind, dtype)
    weight = weights(6, 13)
    grid = spec.fit(weight)
    scale = grid.tensors["scale"].float()
    spread = scale.repeat_interleave(5, -1)[..., :13] if group == 5 else scale
    error = (spec.round(weight, grid) - weight).abs() / spread
    # a stored scale may be rounded down by half an ulp, and clips the outermost values by as much times the code
    stored = 0 if dtype == "float32" else torch.finfo(getattr(torch, dtype)).eps * 2**bits
    assert float(error.max()) <= 0.5 + stored + 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_short_last_group_is_a_group_of_its_own(kind):
    spec, weight = IntGrid(4, 8, *kind), weights(3, 21)
    whole = spec.fit(weight)
    alone = [spec.fit(part) for part in weight.split(8, dim=-1)]
    for name, tensor in whole.tensors.items():
        assert torch.equal(tensor, torch.cat([grid.tensors[name] for grid in alone], dim=-1))
    rounded = [spec.round(part, grid) for part, grid in zip(weight.split(8, dim=-1), alone, strict=True)]
    assert torch.equal(spec.round(weight, whole), torch.cat(rounded, dim=-1))


@pytest.mark.parametrize("group", [4, "channel", "tensor"])
def test_batches_are_independent_matrices_but_for_one_scale(group):
    spec, weight = IntGrid(4, group), weights(3, 2, 8)
    grid = spec.fit(weight)
    if group == "tensor":
        assert grid.tensors["scale"].shape == (1, 1, 1)
    else:
        each = [spec.fit(matrix).tensors["scale"] for matrix in weight]
        assert torch.equal(grid.tensors["scale"], torch.stack(each))


def test_nibbles_first_code_lowest_and_signed_codes_offset():
    assert IntGrid(4).pack(torch.tensor([[-8, 7, 0]], dtype=torch.int8)).tolist() == [[0xF0, 0x08]]
    assert IntGrid(4, symmetric=False).pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8)).tolist() == [[0x21, 0x03]]
    assert IntGrid(3).pack(torch.tensor([[-4, 3, 0]], dtype=torch.int8)).tolist() == [[0b00111000, 0b1]]
    assert IntGrid(2).pack(torch.tensor([[-2, -1, 0, 1]], dtype=torch.int8)).tolist() == [[0b11100100]]


def test_bytes_by_hand():
    rows, columns = sympy.symbols("rows columns", integer=True, positive=True)
    assert IntGrid(4, 32, False, "minimum", "float16").bytes((10, 64)) == 10 * (32 + 2 * 4)
    assert IntGrid(4, 32, False).bytes((10, 65)) == 10 * (33 + 3 * 5)
    assert IntGrid(3, 32).bytes((10, 65)) == 10 * (25 + 3 * 4)
    assert IntGrid(8, "tensor").bytes((2, 3, 5)) == 30 + 4
    assert IntGrid(8).bytes((rows, columns)) == rows * columns + 4 * rows


# grids found again --------------------------------------------------------------------------------------------------
def test_q4_1_is_found_again():
    codes, scale, minimum, values = q4_1()
    spec = IntGrid(4, 32, symmetric=False, zero="minimum")
    grid = spec.fit(values)
    assert torch.equal(grid.tensors["minimum"], minimum.float())
    torch.testing.assert_close(grid.tensors["scale"], scale.float(), rtol=1e-5, atol=0)
    assert torch.equal(spec.codes(values, grid.tensors).long(), codes)
    ulp = torch.finfo(torch.float32).eps * values.abs().max()
    assert float((spec.round(values, grid) - values).abs().max()) <= 4 * float(ulp)


def test_q4_1_is_found_again_bitwise_with_its_own_scale_dtype():
    _, scale, minimum, values = q4_1(seed=1)
    spec = IntGrid(4, 32, symmetric=False, zero="minimum", scale_dtype="float16")
    for search in (False, True):
        grid = spec.fit(values, search=search)
        assert torch.equal(grid.tensors["scale"], scale)
        assert torch.equal(grid.tensors["minimum"], minimum)
        assert torch.equal(spec.round(values, grid), values)


@pytest.mark.parametrize(("bits", "kind"), list(itertools.product((2, 3, 4, 8), KINDS)))
def test_rounding_again_with_a_new_fit_changes_nothing(bits, kind):
    for group in (8, "channel", "tensor"):
        spec = IntGrid(bits, group, *kind, "float16")
        weight = weights(16, 24)
        grid = spec.fit(weight)
        rounded = spec.round(weight, grid)
        again = spec.fit(rounded)
        assert all(torch.equal(again.tensors[name], tensor) for name, tensor in grid.tensors.items())
        assert torch.equal(spec.round(rounded, again), rounded)


def test_a_zero_point_that_ends_in_a_half_is_not_found_again():
    spec = IntGrid(4, "channel", symmetric=False)
    weight = torch.tensor([[-2.5, 12.5]])  # scale 1, zero 2.5: the greatest code used is 14
    grid = spec.fit(weight)
    rounded = spec.round(weight, grid)
    assert rounded.tolist() == [[-2.0, 12.0]]
    assert float(spec.fit(rounded).tensors["scale"]) != float(grid.tensors["scale"])


# edges ----------------------------------------------------------------------------------------------------
def test_groups_of_zeros_have_a_scale_of_next_to_nothing():
    for kind in KINDS:
        for dtype in ("float32", "float16"):
            grid = IntGrid(4, 4, *kind, scale_dtype=dtype).fit(torch.zeros(2, 8))
            assert (grid.tensors["scale"] > 0).all()
            assert (grid.tensors["scale"] < 1e-4).all()
            assert not grid.spec.round(torch.zeros(2, 8), grid).any()


def test_scales_that_vanish_in_half_precision_still_cover_the_range():
    weight = torch.linspace(-1e-6, 1e-6, 16).reshape(1, 16)
    spec = IntGrid(8, scale_dtype="float16")
    grid = spec.fit(weight)
    assert float(grid.tensors["scale"]) == 2.0**-24  # the least half
    assert float((spec.round(weight, grid) - weight).abs().max()) <= 2.0**-25 * (1 + 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_scales_that_overflow_in_half_precision_saturate(kind):
    spec = IntGrid(4, "channel", *kind, "float16")
    weight = torch.tensor([[1e9, -1e9, 3e8]])
    grid = spec.fit(weight)
    assert float(grid.tensors["scale"]) == 65504
    rounded = spec.round(weight, grid)
    assert bool(torch.isfinite(rounded).all())
    assert float(rounded[0, 0]) > float(rounded[0, 1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_greatest_half_precision_weights_stay_finite(dtype, kind):
    weight = torch.tensor([[1.0, -1, 0.9, 0.3]], dtype=dtype) * torch.finfo(dtype).max
    for scale_dtype in DTYPES:
        spec = IntGrid(8, "channel", *kind, scale_dtype)
        assert bool(torch.isfinite(spec.round(weight, spec.fit(weight))).all())


@given(st.integers(0, 2**31), st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
def test_rounding_is_stable_where_floats_are_as_sparse_as_the_grid(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.finfo(dtype).eps * 2.0 ** torch.randint(1, 6, (32, 1), generator=generator)
    weight = (1 + torch.randn(32, 16, generator=generator) * spread).to(dtype)
    spec = IntGrid(4, 4, symmetric=False, zero="minimum")
    grid = spec.fit(weight)
    rounded = spec.round(weight, grid)
    assert torch.equal(spec.round(rounded, grid), rounded)
    assert torch.equal(spec.decode(spec.encode(rounded, grid), (32, 16), dtype), rounded)


@given(st.integers(0, 2**31), st.sampled_from([2, 4, 8]), st.booleans(), st.integers(-126, 120))
def test_float32_is_rounded_once_to_grids_that_hold_zero(seed, bits, symmetric, exponent):
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    spec = IntGrid(bits, 4, symmetric)
    for grid in (spec.fit(weight), spec.fit(weight[:, :1].expand(8, 16) / 3)):  # the second clips
        rounded = spec.round(weight, grid)
        assert torch.equal(spec.round(rounded, grid), rounded)
        assert torch.equal(spec.decode(spec.encode(rounded, grid), (8, 16), torch.float32), rounded)


def test_a_clipped_value_whose_float_is_nearer_to_another_value_is_rounded_on():
    spec, eps = IntGrid(4, "channel", symmetric=False, zero="minimum"), torch.finfo(torch.bfloat16).eps
    step, top = 0.8 * eps, 1 + 0.45 * eps  # the top value is stored as 1, and 1 is nearer to the value below the top
    tensors = {"scale": torch.tensor([[step]]), "minimum": torch.tensor([[top - 15 * step]])}
    rounded = spec.round(torch.tensor([[1.5]], dtype=torch.bfloat16), Grid(spec, tensors))
    assert rounded.item() == 1 - eps / 2
    assert torch.equal(spec.decode(spec.encode(rounded, Grid(spec, tensors)), (1, 1), torch.bfloat16), rounded)


def test_columns_without_importance_do_not_widen_the_range():
    weight, importance = torch.tensor([[1.0, -0.5, 100.0, 0.25]]), torch.tensor([1.0, 2.0, 0.0, 1.0])
    for search in (False, True):
        grid = IntGrid(8).fit(weight, importance=importance, search=search)
        assert float(grid.tensors["scale"]) <= 1 / 127 * (1 + 1e-6)


def test_importance_may_be_given_for_every_element():
    weight = torch.tensor([[1.0, 100.0], [100.0, 1.0]])
    importance = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    grid = IntGrid(8).fit(weight, importance=importance)
    torch.testing.assert_close(grid.tensors["scale"], torch.full((2, 1), 1 / 127))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (2, 0, 3)])
def test_empty_matrices_are_refused(shape):
    assert IntGrid().accepts(shape) == "it is empty"


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 5},
        {"bits": 4.0},
        {"group": 1},
        {"group": "row"},
        {"group": True},
        {"symmetric": None},
        {"symmetric": False, "zero": "float"},
        {"symmetric": True, "zero": "minimum"},
        {"scale_dtype": "float64"},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(PassError) as caught:
        IntGrid(**options)
    assert caught.value.code == "SPARC209"
