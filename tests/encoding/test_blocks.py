import pytest
import torch

from sparc.diag import PassError
from sparc.encoding.blocks import Blocks
from sparc.encoding.dense import Dense
from sparc.encoding.int_grid import IntGrid


def weights(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pruned(encoding, weight, density, **options):
    grid = encoding.fit_masked(weight, encoding.select(weight, density, **options))
    return grid, encoding.round(weight, grid)


@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support is in beta")
def test_parts_are_those_of_torchs_own_block_format():
    encoding, weight = Blocks((4, 8)), weights(16, 24)
    grid, rounded = pruned(encoding, weight, 0.5)
    parts = encoding.encode(rounded, grid)
    sparse = torch.sparse_bsr_tensor(
        parts["pointers"], parts["indices"], parts["codes"], (16, 24), check_invariants=True
    )
    assert torch.equal(sparse.to_dense(), rounded)
    assert int(grid.tensors["mask"].sum()) == 6


@pytest.mark.parametrize(("density", "kept"), [(0.0, 0), (0.25, 3), (0.5, 6), (0.54, 6), (0.55, 7), (1.0, 12)])
def test_the_count_is_exact_over_the_whole_matrix(density, kept):
    mask = Blocks((4, 8)).select(weights(16, 24), density)
    assert mask.shape == (4, 3)
    assert int(mask.sum()) == kept


def test_the_count_is_exact_for_equal_blocks_and_the_first_are_kept():
    mask = Blocks((2, 2)).select(torch.ones(4, 6), 0.5)
    assert mask.int().tolist() == [[1, 1, 1], [0, 0, 0]]


def test_norms_differ():
    spread, peaked = torch.full((2, 2), 1.0), torch.tensor([[3.0, 0], [0, 0]])
    weight = torch.cat([spread, peaked], dim=1)
    assert Blocks((2, 2)).select(weight, 0.5, norm="frobenius").tolist() == [[False, True]]
    assert Blocks((2, 2)).select(weight, 0.5, norm="l1").tolist() == [[True, False]]


def test_importance_weighs_columns():
    weight = torch.tensor([[1.0, 1, 2, 2]])
    assert Blocks((1, 2)).select(weight, 0.5, torch.tensor([5.0, 5, 1, 1])).tolist() == [[True, False]]
    assert Blocks((1, 2)).select(weight, 0.5, torch.tensor([3.0, 3, 1, 1])).tolist() == [[False, True]]


def test_large_and_tiny_blocks_are_told_apart():
    weight = torch.tensor([[1e30, 2e30, 1e-30, 2e-30, 3e-30]])
    assert Blocks((1, 1)).select(weight, 0.6).tolist() == [[True, True, False, False, True]]


@pytest.mark.parametrize("shape", [(9, 13), (2, 9, 16), (8, 12), (2, 3, 5, 7)])
@pytest.mark.parametrize("inner", [Dense(), IntGrid(4, 6, symmetric=False, zero="minimum"), IntGrid(2, "channel")])
def test_ragged_and_batched_matrices(shape, inner):
    encoding, weight = Blocks((4, 5), of=inner), weights(*shape) + 5
    grid, rounded = pruned(encoding, weight, 0.4)
    parts = encoding.encode(rounded, grid)
    assert torch.equal(encoding.decode(parts, shape, torch.float32), rounded)
    kept = encoding.spread(grid.tensors["mask"], shape)
    assert kept.shape == shape
    assert not bool(rounded[~kept].any())
    assert sum(part.nbytes for part in parts.values()) == encoding.bytes_on(grid, shape)


def test_fit_keeps_what_is_not_zero_and_loses_nothing():
    weight = weights(12, 12)
    weight[:4, 4:8] = 0
    weight[8:, :] = 0
    weight[11, 11] = 1e-30
    grid = Blocks((4, 4)).fit(weight)
    assert grid.tensors["mask"].int().tolist() == [[1, 0, 1], [1, 1, 1], [0, 0, 1]]
    assert torch.equal(Blocks((4, 4)).round(weight, grid), weight)


def test_nothing_kept():
    encoding, weight = Blocks((4, 4), of=IntGrid(4, 8)), torch.zeros(8, 8)
    grid = encoding.fit(weight)
    parts = encoding.encode(encoding.round(weight, grid), grid)
    assert parts["codes"].shape == (0, 4, 2)
    assert parts["pointers"].tolist() == [0, 0, 0]
    assert torch.equal(encoding.decode(parts, (8, 8), torch.float32), weight)


def test_bytes_count_the_kept_blocks():
    encoding = Blocks((4, 8), of=IntGrid(4, "channel"))
    block, pointers, scales = 4 * 4 + 4, 4 * (4 + 1), 16 * 4
    assert encoding.bytes((16, 24), kept=5) == 5 * block + pointers + scales
    assert encoding.bytes((16, 24)) == 12 * block + pointers + scales


def test_a_matrix_smaller_than_a_block_is_refused():
    assert "fewer than a block's" in Blocks((8, 8)).accepts((4, 64))
    assert "fewer than a block's" in Blocks((8, 8)).accepts((64, 4))
    assert Blocks((8, 8)).accepts((9, 8)) is None
    assert Blocks((1, 8), of=IntGrid()).accepts((64,)) is not None


@pytest.mark.parametrize("size", [(0, 4), (4,), (4, 4, 4), 4, (4.0, 4), (True, 4), "44", ("All", 4), (None, 4)])
def test_bad_sizes_are_refused(size):
    with pytest.raises(PassError) as caught:
        Blocks(size)
    assert caught.value.code == "SPARC209"


def test_sizes_may_be_a_list():
    assert Blocks([8, 4]) == Blocks((8, 4))
    assert hash(Blocks([8, 4])) == hash(Blocks((8, 4)))


@pytest.mark.parametrize("density", [-0.1, 1.1, float("nan")])
def test_bad_densities_are_refused(density):
    with pytest.raises(PassError) as caught:
        Blocks((4, 4)).select(weights(8, 8), density)
    assert caught.value.code == "SPARC209"


def test_whole_rows_and_whole_columns():
    weight = torch.tensor([[1.0, 9, 0, 1], [3, 3, 3, 3], [0, 7, 0, 0]])
    rows, columns = Blocks((1, "all")), Blocks(("all", 1))
    grid, rounded = pruned(rows, weight, 2 / 3)
    assert torch.equal(rounded, weight * torch.tensor([[1.0], [0], [1]]))
    parts = rows.encode(rounded, grid)
    assert torch.equal(parts["codes"], weight[[0, 2]].unsqueeze(1))
    assert (parts["pointers"].tolist(), parts["indices"].tolist()) == ([0, 1, 1, 2], [0, 0])
    grid, rounded = pruned(columns, weight, 0.25)
    assert torch.equal(rounded, weight * torch.tensor([0.0, 1, 0, 0]))
    assert torch.equal(columns.encode(rounded, grid)["codes"], weight[:, 1:2].unsqueeze(0))


def test_whole_matrices_of_a_stack():
    encoding, weight = Blocks(("all", "all")), weights(4, 3, 5) * torch.tensor([1.0, 5, 2, 0.1])[:, None, None]
    mask = encoding.select(weight, 0.5)
    assert mask.flatten().tolist() == [False, True, True, False]
