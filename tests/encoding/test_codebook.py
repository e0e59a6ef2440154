from itertools import pairwise
from statistics import NormalDist

import pytest
import torch

from sparc.diag import PassError
from sparc.encoding.codebook import NF4, Codebook


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error_of(spec, weight, cost=1.0, **options):
    return float((cost * (spec.round(weight, spec.fit(weight, **options)) - weight).square()).sum())


# nf4 ------------------------------------------------------------------------------------------------------------------
def test_nf4_is_made_of_quantiles_of_the_normal_distribution():
    offset = 0.9677083
    high = [NormalDist().inv_cdf(offset + (0.5 - offset) * step / 8) for step in range(8)]
    low = [-NormalDist().inv_cdf(offset + (0.5 - offset) * step / 7) for step in range(7)]
    made = sorted([*high, 0.0, *low])
    torch.testing.assert_close(torch.tensor(NF4), torch.tensor(made) / max(made), rtol=0, atol=1e-6)


def test_greatest_magnitudes_are_kept_exactly():
    spec, weight = Codebook(group=5), normal(8, 33)
    rounded = spec.round(weight, spec.fit(weight))
    for part, kept in zip(weight.split(5, dim=-1), rounded.split(5, dim=-1), strict=True):
        place = part.abs().argmax(-1, keepdim=True)
        assert torch.equal(kept.gather(-1, place), part.gather(-1, place))


def test_every_number_goes_to_the_nearest_entry():
    spec = Codebook(group="tensor")
    numbers = torch.linspace(-1, 1, 4001).reshape(1, -1)
    grid = spec.fit(numbers)
    distance = (numbers.reshape(-1, 1).double() - torch.tensor(NF4, dtype=torch.float64)).abs()
    chosen = distance.gather(1, spec.codes(numbers, grid.tensors).long().reshape(-1, 1)).squeeze(1)
    assert torch.equal(chosen, distance.amin(1))


def test_nf4_is_stored_low_nibble_first():
    spec, weight = Codebook(group="channel"), torch.tensor([[-1.0, 1.0, 0.0]])
    assert spec.encode(weight, spec.fit(weight))["codes"].tolist() == [[0xF0, 0x07]]


# k-means --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_few_distinct_values_are_found_exactly(bits):
    values = normal(2**bits)
    weight = values[torch.arange(2**bits).repeat(6)].reshape(3, -1)
    spec = Codebook("kmeans", bits, "none")
    grid = spec.fit(weight)
    assert torch.equal(grid.tensors["table"], values.sort().values)
    assert torch.equal(spec.round(weight, grid), weight)


def test_each_matrix_of_a_batch_has_a_table_of_its_own():
    spec, weight = Codebook("kmeans", 3, 8), normal(2, 3, 4, 20)
    grid, rounded = spec.fit(weight), spec.round(weight, spec.fit(weight))
    assert grid.tensors["table"].shape == (2, 3, 8)
    for index in [(0, 0), (1, 2)]:
        alone = spec.fit(weight[index])
        # a scale decides what an error costs, and batches share the greatest
        torch.testing.assert_close(alone.tensors["table"], grid.tensors["table"][index], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(spec.round(weight[index], alone), rounded[index], rtol=1e-5, atol=1e-6)


def test_importance_moves_entries():
    weight, importance = normal(4, 64), torch.ones(64)
    importance[5] = 1e6
    spec = Codebook("kmeans", 2, "none")
    rounded = spec.round(weight, spec.fit(weight, importance=importance))
    torch.testing.assert_close(rounded[:, 5], weight[:, 5], rtol=0, atol=1e-3)


def test_what_has_no_importance_does_not_count():
    weight, importance = torch.tensor([[1.0, 2, 3, 4, 500, -900]]), torch.tensor([1.0, 1, 1, 1, 0, 0])
    for group in ("none", "channel"):
        spec = Codebook("kmeans", 2, group)
        rounded = spec.round(weight, spec.fit(weight, importance=importance))
        torch.testing.assert_close(rounded[:, :4], weight[:, :4])


def test_groups_of_zeros_neither_grow_nor_decide_the_table():
    weight = torch.cat([torch.zeros(2, 16), 0.01 + 0.001 * normal(2, 16).abs()], dim=-1)
    spec = Codebook("kmeans", 2, 16)
    rounded = spec.round(weight, spec.fit(weight))
    assert float(rounded[:, :16].abs().max()) < 1e-30
    torch.testing.assert_close(rounded[:, 16:], weight[:, 16:], rtol=0, atol=0.001)


def test_the_table_is_that_of_the_groups_whose_errors_are_large():
    large = torch.tensor([100.0, -100, 50, -50]).repeat(4).reshape(1, -1)
    small = 0.01 * normal(7, 16).clamp(-1, 1)
    spec = Codebook("kmeans", 2, 16)
    weight = torch.cat([small, large])
    rounded = spec.round(weight, spec.fit(weight))
    torch.testing.assert_close(rounded[-1:], large, rtol=1e-5, atol=0)


def test_tables_beat_nf4_and_more_bits_beat_fewer():
    weight = normal(64, 512)
    errors = [error_of(Codebook("kmeans", bits), weight) for bits in (4, 3, 2)]
    assert errors[0] < error_of(Codebook(), weight) < errors[1] < errors[2]


def test_bytes_by_hand():
    assert Codebook("nf4", 4, 32, "float16").bytes((10, 65)) == 10 * (33 + 3 * 2)
    assert Codebook("kmeans", 3, "none").bytes((2, 10, 9)) == 20 * 4 + 2 * 8 * 4
    assert Codebook("kmeans", 2, "tensor").bytes((10, 9)) == 10 * 3 + 4 * 4 + 4


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "nf3"},
        {"bits": 3},
        {"kind": "kmeans", "bits": 5},
        {"kind": "kmeans", "bits": 4.0},
        {"group": "none"},
        {"group": 1},
        {"kind": "kmeans", "group": None},
        {"scale_dtype": "float64"},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(PassError) as caught:
        Codebook(**options)
    assert caught.value.code == "SPARC209"


def test_entries_ascend():
    assert all(low < high for low, high in pairwise(NF4))
    table = Codebook("kmeans").fit(normal(8, 64)).tensors["table"]
    assert bool((table.diff() >= 0).all())
