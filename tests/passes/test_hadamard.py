"""Orthogonal matrices by their definitions."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from sparc.passes.rotate.hadamard import hadamard, rotation, split
from sparc.passes.rotate.online import kronecker


@given(st.integers(1, 200), st.sampled_from(["hadamard", "orthogonal"]), st.integers(0, 5))
@settings(max_examples=30)
def test_rotations_are_orthogonal(size, kind, seed):
    matrix = rotation(size, kind, seed)
    assert float((matrix @ matrix.T - torch.eye(size, dtype=torch.float64)).abs().max()) < 1e-10
    assert torch.equal(matrix, rotation(size, kind, seed))


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 28, 36, 40, 60, 108, 140, 192, 576, 768])
def test_hadamard_matrices_by_their_definition(order):
    matrix = hadamard(order)
    assert set(matrix.unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))
    assert rotation(order).abs().max().item() == pytest.approx(order**-0.5)


@pytest.mark.parametrize("order", [3, 6, 10, 52])
def test_orders_without_a_construction(order):
    assert hadamard(order) is None
    assert rotation(order).shape == (order, order)


def test_seeds_and_factors():
    assert not torch.equal(rotation(16, "hadamard", 0), rotation(16, "hadamard", 1))
    assert split(1536) == (32, 48)
    assert split(35) == (5, 7)
    assert split(960) == (24, 40)  # 30 × 32 is nearer to a square, but there is no Hadamard matrix of order 30
    first, second = rotation(4), rotation(6)
    x = torch.randn(3, 24, dtype=torch.float64)
    by_definition = torch.stack([(second @ (first @ row.reshape(4, 6)).T).flatten() for row in x])
    assert torch.allclose(kronecker(x, first, second), by_definition)
    assert torch.allclose(kronecker(x, first, second).norm(dim=1), x.norm(dim=1))
