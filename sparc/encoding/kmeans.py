"""Weighted k-means of numbers: because clusters of numbers are intervals, a round costs a few binary searches."""

import torch
from torch import Tensor

_ROUNDS = 50


def kmeans(numbers: Tensor, weights: Tensor, clusters: int) -> Tensor:
    """The centres that Lloyd's algorithm finds from evenly spaced quantiles on; the same for the same input.

    Each round moves every centre to the weighted mean of the numbers nearest to it, so that the weighted squared error
    never grows (Lloyd 1982, "Least squares quantization in PCM"); a centre that is nearest to none stays. It ends after
    50 rounds, or when nothing moves.

    Args:
        numbers: `[..., n]`, floating, finite.
        weights: `[..., n]`, not negative: what a squared error in each number costs. Numbers of weight 0 do not count;
            if all have weight 0, the centres are 0.
        clusters: how many.

    Returns:
        `[..., clusters]` float32, ascending.
    """
    ordered, order = numbers.double().sort(dim=-1, stable=True)
    mass = torch.nn.functional.pad(weights.double().gather(-1, order).cumsum(-1), (1, 0))
    moment = (weights.double().gather(-1, order) * ordered).cumsum(-1)
    moment = torch.nn.functional.pad(moment, (1, 0))
    total = mass[..., -1:]
    quantiles = (torch.arange(clusters, device=mass.device) + 0.5) / clusters * total
    chosen = torch.searchsorted(mass[..., 1:].contiguous(), quantiles).clamp(max=numbers.shape[-1] - 1)
    centres = ordered.gather(-1, chosen) * (total > 0)
    ends = [chosen.new_zeros((*chosen.shape[:-1], 1)), chosen.new_full((*chosen.shape[:-1], 1), numbers.shape[-1])]
    for _ in range(_ROUNDS):
        middle = (centres[..., 1:] + centres[..., :-1]) / 2
        bounds = torch.cat([ends[0], torch.searchsorted(ordered, middle), ends[1]], dim=-1)
        held = mass.gather(-1, bounds).diff()
        means = torch.where(held > 0, moment.gather(-1, bounds).diff() / held, centres)
        if torch.equal(means, centres):
            break
        centres = means
    return centres.sort(dim=-1).values.float()
