"""Unstructured masks: counts, ties, layout by hand, sizes, and parts that belong to no such matrix."""

import pytest
import torch
from torch import Tensor

from sparc.diag import PassError
from sparc.encoding.dense import Dense
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.mask import keep_greatest
from sparc.encoding.unstructured import Unstructured


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("density", "kept"), [(0.0, 0), (0.1, 8), (0.5, 42), (0.505, 42), (0.507, 43), (1.0, 84)])
def test_the_count_is_exact_over_the_whole_matrix(density: float, kept: int) -> None:
    weight = weights(7, 12)
    mask = Unstructured().select(weight, density)
    assert int(mask.sum()) == kept
    if 0 < kept < 84:
        assert weight[mask].abs().min() >= weight[~mask].abs().max()


@pytest.mark.parametrize(("density", "kept"), [(0.0, 0), (0.1, 1), (0.5, 6), (0.9, 11), (1.0, 12)])
def test_the_count_is_exact_in_each_row(density: float, kept: int) -> None:
    mask = Unstructured().select(weights(2, 7, 12), density, by_row=True)
    assert bool((mask.sum(-1) == kept).all())


def test_equal_elements_are_kept_from_the_first_and_none_too_many() -> None:
    weight = torch.tensor([[1.0, 2, 1, 1], [1, 1, 2, 1]])
    assert Unstructured().select(weight, 0.5).int().tolist() == [[1, 1, 1, 0], [0, 0, 1, 0]]
    assert Unstructured().select(weight, 0.5, by_row=True).int().tolist() == [[1, 1, 0, 0], [1, 0, 1, 0]]
    assert Unstructured().select(torch.zeros(3, 4), 0.25).int().tolist() == [[1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_numbers_that_are_not_finite_keep_the_count() -> None:
    score = torch.tensor([torch.nan, 1.0, torch.inf, 0.0, torch.inf, 2.0])
    assert keep_greatest(score, 3).int().tolist() == [0, 0, 1, 0, 1, 1]


def test_importance_weighs_squared_magnitudes() -> None:
    weight = torch.tensor([[1.0, 2, 3, 4]])
    assert Unstructured().select(weight, 0.25, torch.tensor([17.0, 1, 1, 1])).int().tolist() == [[1, 0, 0, 0]]
    assert Unstructured().select(weight, 0.25, torch.tensor([15.0, 1, 1, 1])).int().tolist() == [[0, 0, 0, 1]]


def test_stored_layout() -> None:
    encoding = Unstructured()
    weight = torch.tensor([[0.0, 3, 0, 0, 0, 0, 0, 0, 5, 7], [1, 0, 0, 0, 0, 0, 0, 2, 0, 0]])
    parts = encoding.encode(weight, encoding.fit(weight))
    assert parts["codes"].tolist() == [[3.0, 5, 7, 1, 2]]
    assert parts["bitmap"].tolist() == [[0b10, 0b11], [0b10000001, 0]]
    assert torch.equal(encoding.decode(parts, (2, 10), torch.float32), weight)


def test_bits_per_dense_weight() -> None:
    encoding, shape = Unstructured(of=IntGrid(4, "tensor")), (64, 128)
    assert float((encoding.bytes(shape, kept=64 * 32) - 4) * 8 / (64 * 128)) == 1 + 4 / 4
    assert encoding.bytes(shape) == 64 * 128 // 2 + 64 * 16 + 4


def test_nothing_kept() -> None:
    encoding, weight = Unstructured(of=IntGrid(4, 8)), torch.zeros(3, 10)
    parts = encoding.encode(weight, encoding.fit(weight))
    assert parts["codes"].shape == (1, 0)
    assert torch.equal(encoding.decode(parts, (3, 10), torch.float32), weight)


def test_dropped_elements_are_zero_even_where_the_inner_grid_has_no_zero() -> None:
    encoding = Unstructured(of=IntGrid(4, 16, symmetric=False, zero="minimum"))
    weight = weights(8, 32) + 10
    grid = encoding.fit_masked(weight, encoding.select(weight, 0.3))
    decoded = encoding.decode(encoding.encode(encoding.round(weight, grid), grid), (8, 32), torch.float32)
    assert not bool((decoded[~grid.tensors["mask"]].view(torch.int32) != 0).any())
    assert int((decoded != 0).sum()) == 77


@pytest.mark.parametrize(
    ("part", "wrong"),
    [
        ("bitmap", torch.zeros(4, 1, dtype=torch.uint8)),
        ("bitmap", torch.zeros(4, 3, dtype=torch.uint8)),
        ("bitmap", torch.zeros(4, 2, dtype=torch.float32)),
        ("bitmap", torch.full((4, 2), 255, dtype=torch.uint8)),
        ("bitmap", torch.zeros(4, 2, dtype=torch.uint8)),
        ("codes", torch.zeros(1, 0)),
        ("codes", torch.zeros(1, 31)),
        ("codes", torch.zeros(32)),
        ("codes", torch.zeros(4, 8)),
        ("codes", torch.zeros(1, 1 << 12)),
    ],
)
def test_parts_of_no_such_matrix_are_refused(part: str, wrong: Tensor) -> None:
    encoding, weight = Unstructured(), weights(4, 16)
    grid = encoding.fit_masked(weight, encoding.select(weight, 0.5))
    parts = {**encoding.encode(encoding.round(weight, grid), grid), part: wrong}
    with pytest.raises(ValueError, match="not th"):
        encoding.decode(parts, (4, 16), torch.float32)


@pytest.mark.parametrize("density", [-0.1, 1.1, float("nan")])
def test_bad_densities_are_refused(density: float) -> None:
    with pytest.raises(PassError, match="SPARC209"):
        Unstructured().select(weights(8, 8), density)


def test_masks_do_not_nest() -> None:
    with pytest.raises(PassError, match="SPARC209"):
        Unstructured(of=Unstructured())  # type: ignore[arg-type]
    assert Unstructured(of=Dense()).accepts((4,)) is not None
