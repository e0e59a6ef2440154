import pytest
import torch

from sparc.diag import PassError
from sparc.encoding.blocks import Blocks
from sparc.encoding.dense import Dense
from sparc.encoding.grid import Grid
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.nm import NM


def weights(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_keeps_the_largest_and_of_equals_the_first():
    mask = NM(2, 4).select(torch.tensor([[1.0, -3, 2, 0, 5, 5, 5, 5, 0, 0, 0, 0]]))
    assert mask.int().tolist() == [[0, 1, 1, 0, 1, 1, 0, 0, 1, 1, 0, 0]]


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (5, 16), (7, 9)])
def test_keeps_exactly_n_of_every_m(n, m):
    weight = weights(6, 3 * m).round(decimals=0)  # many equal values
    groups = weight.abs().unflatten(-1, (-1, m))
    mask = NM(n, m).select(weight).unflatten(-1, (-1, m))
    assert bool((mask.sum(-1) == n).all())
    kept, dropped = groups.where(mask, torch.inf).amin(-1), groups.where(~mask, -torch.inf).amax(-1)
    assert bool((kept >= dropped).all())


def test_importance_weighs_squared_magnitudes():
    weight = torch.tensor([[1.0, 2, 3, 4]])
    assert NM(1, 4).select(weight, torch.tensor([17.0, 1, 1, 1])).tolist() == [[True, False, False, False]]
    assert NM(1, 4).select(weight, torch.tensor([15.0, 1, 1, 1])).tolist() == [[False, False, False, True]]


def test_tiny_weights_are_still_told_apart():
    assert NM(1, 2).select(torch.tensor([[1e-30, 2e-30]])).tolist() == [[False, True]]


def test_stored_layout():
    encoding, weight = NM(2, 4), torch.tensor([[1.0, -3, 2, 0, 5, 5, 5, 5]])
    grid = encoding.fit(weight)
    parts = encoding.encode(encoding.round(weight, grid), grid)
    assert parts["codes"].tolist() == [[-3.0, 2, 5, 5]]
    assert parts["positions"].tolist() == [[1 | 2 << 2 | 0 << 4 | 1 << 6]]
    assert encoding.decode(parts, (1, 8), torch.float32).tolist() == [[0.0, -3, 2, 0, 5, 5, 0, 0]]


@pytest.mark.parametrize(("bits", "expected"), [(2, 2.0), (4, 3.0), (8, 5.0)])
def test_bits_per_dense_weight(bits, expected):
    shape = (64, 128)
    encoding = NM(2, 4, of=IntGrid(bits, "tensor"))
    without_scale = encoding.bytes(shape) - 4
    assert float(without_scale * 8 / (64 * 128)) == expected


def test_dropped_elements_are_zero_even_where_the_inner_grid_has_no_zero():
    encoding = NM(2, 4, of=IntGrid(4, 32, symmetric=False, zero="minimum"))
    weight = weights(8, 64) + 10
    grid = encoding.fit(weight)
    rounded = encoding.round(weight, grid)
    decoded = encoding.decode(encoding.encode(rounded, grid), (8, 64), torch.float32)
    assert int((rounded != 0).sum()) == 8 * 32
    assert torch.equal(decoded, rounded)
    assert not bool((decoded[~grid.tensors["mask"]].view(torch.int32) != 0).any())


def test_dropped_elements_do_not_widen_the_inner_range():
    encoding = NM(2, 4, of=IntGrid(4, 32, symmetric=False, zero="minimum"))
    weight = weights(8, 64) * 0.1 + 10
    grid = encoding.fit(weight)
    kept = weight[grid.tensors["mask"]].reshape(8, 2, 16)
    assert torch.equal(grid.tensors["minimum"], kept.amin(-1))
    error = (encoding.round(weight, grid) - weight)[grid.tensors["mask"]].abs()
    assert float(error.max()) <= float(grid.tensors["scale"].max()) / 2 * (1 + 1e-5)


def test_a_wholly_dropped_group_has_a_harmless_scale():
    encoding = NM(1, 4, of=IntGrid(8, 2))  # groups of 2 within every 4
    grid = encoding.fit(torch.tensor([[0.0, 0, 3, 1]]))
    assert 0 < float(grid.tensors["scale"][0, 0]) < 1e-4
    assert torch.equal(encoding.round(torch.tensor([[5.0, 6, 3, 1]]), grid)[:, :2], torch.zeros(1, 2))


def test_a_mask_with_another_count_is_refused():
    encoding = NM(2, 4)
    with pytest.raises(PassError, match="exactly 2 of every 4") as caught:
        encoding.encode(weights(1, 8), Grid(encoding, {"mask": torch.ones(1, 8, dtype=torch.bool)}))
    assert caught.value.code == "SPARC209"


@pytest.mark.parametrize("shape", [(4, 6), (4, 3), (2, 4, 10)])
def test_a_size_that_m_does_not_divide_is_refused(shape):
    assert "4 does not divide" in NM(2, 4).accepts(shape)


def test_what_the_inner_encoding_refuses_is_refused():
    assert NM(2, 4, of=IntGrid()).accepts((0, 8)) == IntGrid().accepts((0, 8))
    assert NM(2, 4).accepts((8,)) is not None
    assert NM(2, 4).accepts((3, 8)) is None


@pytest.mark.parametrize("options", [(4, 4), (0, 4), (5, 4), (1, 257), (2.0, 4), (True, 4), (2, "4"), (-1, 2)])
def test_bad_patterns_are_refused(options):
    with pytest.raises(PassError) as caught:
        NM(*options)
    assert caught.value.code == "SPARC209"


@pytest.mark.parametrize("inner", [NM(), Blocks(), "IntGrid(4)", None])
def test_only_element_encodings_fit_inside(inner):
    with pytest.raises(PassError, match="cannot hold"):
        NM(2, 4, of=inner)


def test_half_precision_codes_halve_the_storage():
    shape = (16, 64)
    assert NM(2, 4, of=Dense("bfloat16")).bytes(shape) == 16 * (32 * 2 + 8)
