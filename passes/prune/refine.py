"""Refining a mask without training: elements are exchanged so that the expected output of each row comes back."""

import torch
from torch import Tensor

CYCLES = 50
THRESHOLD = 0.1 / 2048
_ROWS = 256
_LEAST_VARIANCE = 1e-6


def refine_mask(weight: Tensor, kept: Tensor, mean: Tensor, square: Tensor, m: int | None = None) -> Tensor:
    """Exchange dropped and kept elements of each row, one pair after another (DSnoT, Zhang et al. 2024, algorithm 1).

    A row's expected error is `e = sum over dropped j of w_j E[x_j]`. The dropped element of greatest `sign(e) w_j
    E[x_j] / Var[x_j]` is kept instead of the one of least `|w_j| |x_j|` among those whose loss pulls e back to zero;
    with N:M, among those of its own m. A row is done when `|e|` would not get less, when it is at most the threshold,
    or after 50 exchanges. (The published code takes sums over sequences of 2048 tokens for means, and 0.1 as
    threshold; with true means that is 0.1 / 2048. It lets `|e|` grow; here it never does, so that refining again from
    where it stopped changes nothing.)

    Args:
        weight: `[rows, reduce]`, floating, before it was pruned.
        kept: bool of the same shape.
        mean: of the input, `[reduce]` or of the weight's shape.
        square: mean square of the input, alike.
        m: for N:M; None when elements of a row may be exchanged freely.

    Returns:
        Bool `[rows, reduce]`, with as many kept in each row (and each m) as before.
    """
    mean, square = mean.expand(weight.shape), square.expand(weight.shape)
    rows = [slice(start, start + _ROWS) for start in range(0, len(weight), _ROWS)]
    return torch.cat([_refine(weight[some], kept[some], mean[some], square[some], m) for some in rows])


def _refine(weight: Tensor, kept: Tensor, mean: Tensor, square: Tensor, m: int | None) -> Tensor:
    loss = weight.double() * mean
    score = weight.double().abs() * square.double().sqrt()
    variance = (square.double() - mean.double().square()).clamp(min=0)
    least = _LEAST_VARIANCE * variance.mean(-1, keepdim=True) + torch.finfo(torch.float32).tiny
    gain = loss / torch.maximum(variance, least)
    kept = kept.clone()
    error = loss.masked_fill(kept, 0).sum(-1, keepdim=True)
    active = error.abs() > THRESHOLD
    column = torch.arange(weight.shape[-1]) if m is None else torch.arange(weight.shape[-1]) // m
    for _ in range(CYCLES):
        if not bool(active.any()):
            break
        sign = error.sign()
        grown = (sign * gain).masked_fill(kept, -torch.inf).argmax(-1, keepdim=True)
        candidates = kept & (sign * loss < 0 if m is None else column == column[grown])
        pruned = score.masked_fill(~candidates, torch.inf).argmin(-1, keepdim=True)
        changed = error - loss.gather(-1, grown) + loss.gather(-1, pruned)
        exchanged = candidates.gather(-1, pruned) & ~kept.gather(-1, grown)
        active = active & exchanged & (changed.abs() < error.abs())
        kept.scatter_(-1, grown, kept.gather(-1, grown) | active)
        kept.scatter_(-1, pruned, kept.gather(-1, pruned) & ~active)
        error = torch.where(active, changed, error)
        active &= error.abs() > THRESHOLD
    return kept
