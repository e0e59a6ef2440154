import torch

from sparc.encoding.kmeans import kmeans


def lloyd(numbers, weights, centres):
    """A round by the definition."""
    nearest = (numbers.unsqueeze(-1) - centres).abs().argmin(-1)
    masses = [weights[nearest == index] for index in range(len(centres))]
    sums = [(weights * numbers)[nearest == index] for index in range(len(centres))]
    return torch.stack([s.sum() / m.sum() if m.sum() > 0 else c for s, m, c in zip(sums, masses, centres, strict=True)])


def test_it_ends_where_lloyds_algorithm_stays():
    generator = torch.Generator().manual_seed(0)
    numbers, weights = torch.randn(300, generator=generator), torch.rand(300, generator=generator)
    centres = kmeans(numbers, weights, 4)
    torch.testing.assert_close(lloyd(numbers.double(), weights.double(), centres.double()).float(), centres)
    assert bool((centres.diff() > 0).all())


def test_two_clusters_by_hand():
    numbers, weights = torch.tensor([5.0, 0, 1, 6, 3e8]), torch.tensor([1.0, 1, 3, 1, 0])
    assert kmeans(numbers, weights, 2).tolist() == [0.75, 5.5]


def test_rows_are_independent():
    numbers = torch.randn(3, 2, 40, generator=torch.Generator().manual_seed(0))
    weights = torch.ones(3, 2, 40)
    together = kmeans(numbers, weights, 8)
    assert together.shape == (3, 2, 8)
    assert torch.equal(together[2, 1], kmeans(numbers[2, 1], weights[2, 1], 8))


def test_without_weight_or_with_fewer_numbers_than_clusters_it_stays_finite():
    assert kmeans(torch.randn(5), torch.zeros(5), 4).tolist() == [0, 0, 0, 0]
    assert set(kmeans(torch.tensor([2.0, 1.0]), torch.ones(2), 4).tolist()) == {1.0, 2.0}
