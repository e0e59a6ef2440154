"""Ranges from histograms: by hand, and against brute force."""

import math

import pytest
import torch
from torch import Tensor

from sparc.passes.activation.ranges import (
    bin_centres,
    divergence,
    entropy_range,
    mse_range,
    percentile_range,
    squared_errors,
)


def counts_of(values: Tensor, bins: int = 2048) -> tuple[Tensor, float, float]:
    low, high = float(values.min()), float(values.max())
    return torch.histc(values, bins, low, high).double(), low, high


def test_percentile_by_hand() -> None:
    counts = torch.tensor([1.0, 9.0, 80.0, 9.0, 1.0])
    assert percentile_range(counts, -5.0, 5.0, 98.0) == (-3.0, 3.0)
    assert percentile_range(counts, -5.0, 5.0, 100.0) == (-5.0, 5.0)
    assert percentile_range(counts, -5.0, 5.0, 80.0) == (-1.0, 1.0)


def test_percentile_keeps_zero_inside() -> None:
    assert percentile_range(torch.tensor([1.0, 98.0, 1.0]), 10.0, 13.0, 98.0) == (0.0, 12.0)


def test_squared_errors_by_hand() -> None:
    """Range [0, 255] has scale 1: 0.25 rounds down by 0.25, 300 is clipped by 45."""
    found = squared_errors(
        torch.tensor([4.0, 2.0]), torch.tensor([0.25, 300.0]).double(), torch.zeros(1), torch.tensor([255.0])
    )
    assert float(found) == pytest.approx(4 * 0.25**2 + 2 * 45**2)


def brute_force(counts: Tensor, centres: Tensor, low: float, high: float) -> float:
    """The least error over every pair of ends on a grid of 1%, one range and one value at a time."""
    values = [(float(v), float(c)) for v, c in zip(centres, counts, strict=True) if c > 0]
    least = math.inf
    for a in range(20, 101, 1) if low < 0 else [100]:
        for b in range(20, 101, 1):
            scale = (high * b - low * a) / 100 / 255
            zero = round(-low * a / 100 / scale)
            error = 0.0
            for value, count in values:
                code = min(255, max(0, round(value / scale) + zero))
                error += count * ((code - zero) * scale - value) ** 2
            least = min(least, error)
    return least


def half_normal(outlier: float) -> tuple[Tensor, float, float]:
    """Two million values and one outlier, in 512 bins."""
    torch.manual_seed(0)
    counts, low, high = counts_of(torch.cat([torch.zeros(1), torch.randn(20_000).abs(), torch.tensor([outlier])]), 512)
    counts[:-1] *= 100
    return counts, low, high


@pytest.mark.parametrize("outlier", [5.0, 9.0, 25.0])
def test_mse_is_no_worse_than_trying_every_percent(outlier: float) -> None:
    counts, low, high = half_normal(outlier)
    centres = bin_centres(counts, low, high)
    first, last = (torch.tensor([end], dtype=torch.float64) for end in mse_range(counts, low, high))
    found = float(squared_errors(counts, centres, first, last))
    assert found <= brute_force(counts, centres, low, high) * (1 + 1e-9)


def test_mse_clips_an_outlier_and_keeps_a_flat_range() -> None:
    low, high = mse_range(*half_normal(9.0))
    assert low == 0.0
    assert high < 7
    assert mse_range(torch.ones(2048), 0.0, 1.0) == (0.0, 1.0)


def test_divergence_by_hand() -> None:
    """512 bins, two to a level: unequal pairs are averaged, the clipped count lies in the last bin of the reference."""
    counts = torch.ones(513, dtype=torch.float64)
    counts[2], counts[512] = 3.0, 4.0
    p = torch.ones(512, dtype=torch.float64)
    p[2], p[511] = 3.0, 5.0
    q = torch.ones(512, dtype=torch.float64)
    q[2] = q[3] = 2.0
    p, q = p / p.sum(), q / q.sum()
    assert divergence(counts, 0, 512) == pytest.approx(float((p * (p / q).log()).sum()))


def test_as_many_bins_as_levels_cannot_diverge() -> None:
    """Why a candidate must span more bins than levels: at 256 bins every histogram is its own quantization."""
    counts = torch.arange(1, 257, dtype=torch.float64)
    assert divergence(counts, 0, 256) == pytest.approx(0.0, abs=1e-12)


def test_entropy_is_the_best_of_its_candidates() -> None:
    torch.manual_seed(0)
    counts, low, high = counts_of(torch.cat([torch.randn(100_000).abs(), torch.tensor([0.0, 30.0])]))
    found = entropy_range(counts, low, high)
    ends = [round(2048 * step / 128) for step in range(129)]
    best = min((divergence(counts, 0, last), -last) for last in ends if last >= 512)
    assert found == (0.0, pytest.approx(low + (high - low) * -best[1] / 2048))
    assert found[1] < 29


def test_spikes_at_zero_and_at_a_clip_do_not_shrink_the_range() -> None:
    """What a ReLU6 writes: half zeros, a tenth sixes, and something between."""
    torch.manual_seed(0)
    values = torch.cat([torch.zeros(50_000), torch.rand(40_000) * 6, torch.full((10_000,), 6.0)])
    assert entropy_range(*counts_of(values)) == (0.0, 6.0)


def test_entropy_keeps_a_flat_range() -> None:
    assert entropy_range(torch.ones(2048), -1.0, 1.0) == (-1.0, 1.0)
