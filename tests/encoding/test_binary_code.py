import itertools

import pytest
import torch

from sparc.diag import PassError
from sparc.encoding.binary_code import BinaryCode
from sparc.encoding.binary_search import binary_search, levels
from sparc.encoding.grid import Grid
from sparc.encoding.int_grid import IntGrid

KINDS = [(True, "integer"), (False, "integer"), (False, "minimum")]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error_of(spec, weight, cost=1.0, **options):
    return float((cost * (spec.round(weight, spec.fit(weight, **options)) - weight).square()).mean())


# what the numbers mean ------------------------------------------------------------------------------------------------
def test_levels_by_hand():
    assert levels(torch.tensor([4.0, 2.0]), torch.tensor(0.5)).tolist() == [-5.5, 2.5, -1.5, 6.5]


def test_planes_by_hand():
    spec = BinaryCode(2, "channel")
    grid = Grid(spec, {"alphas": torch.tensor([[[4.0, 2.0]]]), "offset": torch.tensor([[0.5]])})
    weight = torch.tensor([[-5.5, 2.5, -1.5, 6.5, 6.5, 6.5, 6.5, 6.5, 2.5]])
    assert torch.equal(spec.round(weight, grid), weight)
    parts = spec.encode(weight, grid)
    assert parts["codes"].tolist() == [[[0b11111010, 0b1]], [[0b11111100, 0b0]]]
    assert parts["codes"].shape == (2, 1, 2)  # bits, out, bytes
    assert parts["alphas"].tolist() == [[[4.0, 2.0]]]


def test_numbers_go_to_the_nearest_sum_and_halfway_to_the_lesser():
    spec = BinaryCode(2, "channel")
    grid = Grid(spec, {"alphas": torch.tensor([[[4.0, 2.0]]]), "offset": torch.tensor([[0.5]])})
    weight = torch.tensor([[-100, -3.6, -3.5, -3.4, 0.5, 4.5, 4.6]])
    assert spec.round(weight, grid).tolist() == [[-5.5, -5.5, -5.5, -1.5, -1.5, 2.5, 6.5]]


def test_equal_sums_take_the_least_code():
    spec = BinaryCode(2, "channel")
    grid = Grid(spec, {"alphas": torch.tensor([[[1.0, 1.0]]]), "offset": torch.tensor([[0.0]])})
    assert spec.codes(torch.tensor([[0.0, 0.1, -5]]), grid.tensors).tolist() == [[1, 1, 0]]


# fitting --------------------------------------------------------------------------------------------------------------
def test_one_bit_is_the_two_means():
    weight = torch.tensor([[1.0, 2, 3, 10, 11, 12]])
    grid = BinaryCode(1, "channel").fit(weight)
    torch.testing.assert_close(grid.tensors["alphas"], torch.tensor([[[4.5]]]))
    torch.testing.assert_close(grid.tensors["offset"], torch.tensor([[6.5]]))


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_sums_of_signs_are_found_again(bits):
    alphas, offset = torch.tensor([1.0, 0.45, 0.2])[:bits], torch.tensor(0.3)
    weight = levels(alphas, offset).repeat(8).reshape(1, -1)
    grid = BinaryCode(bits, "channel").fit(weight)
    torch.testing.assert_close(grid.tensors["alphas"], alphas.reshape(1, 1, -1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(BinaryCode(bits, "channel").round(weight, grid), weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("bits", "known"), [(2, 0.117), (3, 0.035), (4, 0.0108)])
def test_alternation_gets_below_the_error_known_without_an_offset(bits, known):
    assert 0.85 * known < error_of(BinaryCode(bits), normal(256, 1024)) < known


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_search_is_at_least_as_good_as_even_steps_in_every_group(bits):
    weight = normal(32, 128)
    even, spec = IntGrid(bits, 32, symmetric=False, zero="minimum"), BinaryCode(bits, 32)
    errors = [
        (each.round(weight, each.fit(weight, search=search)) - weight).square().unflatten(-1, (-1, 32)).sum(-1)
        for each, search in ((spec, True), (even, False))
    ]
    assert bool((errors[0] <= errors[1] * (1 + 1e-4)).all())


def test_importance_decides_which_errors_count():
    weight, importance = normal(8, 64), torch.ones(64)
    importance[:4] = 1000
    spec = BinaryCode(2, "channel")
    assert error_of(spec, weight, importance, importance=importance) < 0.5 * error_of(spec, weight, importance)


def test_what_has_no_importance_does_not_count():
    weight, importance = torch.tensor([[1.0, 2, 3, 4, 500, -900]]), torch.tensor([1.0, 1, 1, 1, 0, 0])
    spec = BinaryCode(2, 6)
    rounded = spec.round(weight, spec.fit(weight, importance=importance))
    torch.testing.assert_close(rounded[:, :4], weight[:, :4], rtol=1e-4, atol=1e-4)


def test_groups_are_fitted_alone_in_whatever_chunk():
    weight, h = normal(5, 3, 16), torch.ones(5, 3, 16)
    alphas, offset = binary_search(weight, h, 3, evenly=True)
    assert (alphas.shape, offset.shape) == ((5, 3, 3), (5, 3))
    assert bool((alphas >= 0).all())
    assert bool((alphas.diff(dim=-1) <= 0).all())


def test_a_short_last_group_is_not_led_by_what_fills_it():
    weight = torch.tensor([[0.0, 1, 2, 3, 10.0, 20, 24]])
    grid = BinaryCode(1, 4).fit(weight)
    torch.testing.assert_close(grid.tensors["offset"], torch.tensor([[1.5, 16.0]]))


# from integer grids ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("bits", "kind"), list(itertools.product((2, 3, 4), KINDS[:2])))
@pytest.mark.parametrize("group", [7, "channel", "tensor"])
def test_half_precision_integer_grids_are_binary_coded_bitwise(bits, kind, group):
    spec, weight = IntGrid(bits, group, *kind, "float16"), normal(6, 20)
    grid = spec.fit(weight)
    rounded, made = spec.round(weight, grid), BinaryCode.from_int_grid(grid)
    assert made.spec == BinaryCode(bits, group)
    assert torch.equal(made.spec.round(rounded, made), rounded)
    assert torch.equal(made.spec.round(weight, made), made.spec.round(rounded, made))
    parts = made.spec.encode(rounded, made)
    assert torch.equal(made.spec.decode(parts, (6, 20), torch.float32), rounded)


@pytest.mark.parametrize("kind", KINDS)
def test_other_integer_grids_are_binary_coded_to_float_rounding(kind):
    spec, weight = IntGrid(3, 8, *kind), normal(6, 20)
    grid = spec.fit(weight)
    rounded, made = spec.round(weight, grid), BinaryCode.from_int_grid(grid)
    torch.testing.assert_close(made.spec.round(rounded, made), rounded, rtol=0, atol=1e-6)


def test_the_codes_of_an_integer_grid_are_the_signs():
    grid = Grid(IntGrid(2, "channel", symmetric=False), {"scale": torch.ones(1, 1), "zero": torch.ones(1, 1)}, "conv")
    made = BinaryCode.from_int_grid(grid)
    assert made.tensors["alphas"].tolist() == [[[1.0, 0.5]]]
    assert made.tensors["offset"].tolist() == [[0.5]]
    assert made.view == "conv"


@pytest.mark.parametrize("spec", [IntGrid(8), BinaryCode(2, 4)], ids=str)
def test_other_grids_have_no_binary_code(spec):
    with pytest.raises(PassError) as caught:
        BinaryCode.from_int_grid(spec.fit(normal(2, 8)))
    assert caught.value.code == "SPARC209"


# sizes and options ----------------------------------------------------------------------------------------------------
def test_bits_per_weight():
    assert float(BinaryCode(3, 128, "float16").bytes((64, 256)) * 8 / (64 * 256)) == 3 + 4 * 16 / 128
    assert BinaryCode(2, 8).bytes((3, 5, 17)) == 15 * (2 * 3 + 3 * 3 * 4)


@pytest.mark.parametrize(
    "options", [{"bits": 0}, {"bits": 5}, {"bits": 2.0}, {"group": 1}, {"group": None}, {"scale_dtype": "bfloat16"}]
)
def test_bad_options_are_refused(options):
    with pytest.raises(PassError) as caught:
        BinaryCode(**options)
    assert caught.value.code == "SPARC209"
