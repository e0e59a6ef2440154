"""Looking for the sums of ±alphas that are nearest to the numbers of each group.

Greedy start: every alpha is the mean magnitude of what the ones before leave (Rastegari et al. 2016, "XNOR-Net",
section 3.1; Guo et al. 2017, "Network Sketching"). Alternation (Xu et al. 2018, "Alternating Multi-bit Quantization for
Recurrent Neural Networks"): given the signs, alphas and offset are a linear least squares problem; given those, the
nearest of the 2^bits sums gives the signs. The squared error of a group never grows.
"""

import torch
from torch import Tensor

_ROUNDS = 15
_WORTH = 1e-4  # the part of the error that a round must remove to be followed by another
_RIDGE = 1e-9  # keeps the equations solvable where signs do not differ
_CHUNK = 2**20  # elements


def levels(alphas: Tensor, offset: Tensor) -> Tensor:
    """The sum that each code stands for, `[..., 2**bits]` float32, added up from alpha 0 on, the offset last.

    Args:
        alphas: `[..., bits]`.
        offset: `[...]`.
    """
    code = torch.arange(2 ** alphas.shape[-1], device=alphas.device)
    sums = torch.zeros((), device=alphas.device)
    for bit, alpha in enumerate(alphas.float().unbind(-1)):
        sums = sums + alpha.unsqueeze(-1) * (2 * ((code >> bit) & 1) - 1)
    return sums + offset.float().unsqueeze(-1)


def nearest_level(sums: Tensor, numbers: Tensor) -> Tensor:
    """The code of the level nearest to each number: uint8 in the shape of `numbers`.

    Of equally near levels the least is taken, and of equal ones the one of the least code.

    Args:
        sums: `[..., 2**bits]`, float32.
        numbers: `[..., n]`, float32, finite.
    """
    ordered, order = sums.sort(dim=-1, stable=True)
    wide = ordered.double()
    middle = ((wide[..., 1:] + wide[..., :-1]) / 2).float()
    code = order.to(torch.uint8).gather(-1, torch.searchsorted(ordered, ordered))
    return code.gather(-1, torch.searchsorted(middle, numbers.contiguous()))


def binary_search(numbers: Tensor, importance: Tensor, bits: int, *, evenly: bool) -> tuple[Tensor, Tensor]:
    """Alphas `[..., bits]`, descending and not negative, and offset `[...]`, for each group; float32.

    Args:
        numbers: `[..., n]`, float32: groups.
        importance: `[..., n]`, the cost of a squared error, not negative.
        bits: how many alphas.
        evenly: try evenly spaced sums over each group's range as a start too.
    """
    groups, costs = numbers.flatten(0, -2), importance.flatten(0, -2)
    step = max(1, _CHUNK // groups.shape[-1])
    found = [_fit(w, h, bits, evenly) for w, h in zip(groups.split(step), costs.split(step), strict=True)]
    alphas, offset = (torch.cat(each) for each in zip(*found, strict=True))
    return alphas.reshape(*numbers.shape[:-1], bits), offset.reshape(numbers.shape[:-1])


def _fit(w: Tensor, h: Tensor, bits: int, evenly: bool) -> tuple[Tensor, Tensor]:
    w = w.masked_fill(h == 0, 0)
    unit = w.abs().amax(-1, keepdim=True)
    unit = torch.where(unit > 0, unit, 1)
    w = w / unit  # so that squares neither under- nor overflow
    total = h.sum(-1, keepdim=True)
    h = h / torch.where(total > 0, total, 1)
    best, error = _refine(w, h, _greedy(w, h, bits))
    if evenly:
        other, other_error = _refine(w, h, _even(w, h, bits))
        best = torch.where((other_error < error).unsqueeze(-1), other, best)
    alphas = best[:, :-1].abs().sort(dim=-1, descending=True, stable=True).values
    return alphas * unit, (best[:, -1:] * unit).squeeze(-1)


def _greedy(w: Tensor, h: Tensor, bits: int) -> Tensor:
    """Alphas and offset, `[groups, bits + 1]`: the mean, then mean magnitudes of what is left."""
    offset = (h * w).sum(-1, keepdim=True)
    rest, found = w - offset, []
    for _ in range(bits):
        found.append((h * rest.abs()).sum(-1, keepdim=True))
        rest = rest - torch.where(rest >= 0, found[-1], -found[-1])
    return torch.cat([*found, offset], dim=-1)


def _even(w: Tensor, h: Tensor, bits: int) -> Tensor:
    """Alphas and offset whose sums are evenly spaced over each group's range."""
    low = w.masked_fill(h == 0, torch.inf).amin(-1, keepdim=True)
    high = w.masked_fill(h == 0, -torch.inf).amax(-1, keepdim=True)
    low, high = low.masked_fill(low > high, 0), high.masked_fill(low > high, 0)
    scale = (high - low) / (2**bits - 1)
    return torch.cat([*(scale * (2**bit / 2) for bit in reversed(range(bits))), (low + high) / 2], dim=-1)


def _refine(w: Tensor, h: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    """Alternate from a start on; what it ends at, and the error of each group."""
    signs, error = _signs(w, h, best)
    for _ in range(_ROUNDS):
        other = best + _least_squares(signs, h, w - _sums(signs, best))
        other_signs, other_error = _signs(w, h, other)
        better = other_error < error
        before, error = error, torch.where(better, other_error, error)
        best = torch.where(better.unsqueeze(-1), other, best)
        signs = torch.where(better.unsqueeze(-1).unsqueeze(-1), other_signs, signs)
        if float(before.sum() - error.sum()) <= _WORTH * float(before.sum()):
            break
    return best, error


def _signs(w: Tensor, h: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """The ±1 of the nearest sums and a column of ones, `[groups, n, bits + 1]`, and the error of each group."""
    codes = nearest_level(levels(found[:, :-1], found[:, -1]), w).to(torch.int32)
    bits = found.shape[-1] - 1
    planes = [2.0 * ((codes >> bit) & 1) - 1 for bit in range(bits)]
    signs = torch.stack([*planes, torch.ones_like(w)], dim=-1)
    return signs, (h * (_sums(signs, found) - w).square()).sum(-1)


def _sums(signs: Tensor, found: Tensor) -> Tensor:
    return (signs @ found.unsqueeze(-1)).squeeze(-1)


def _least_squares(signs: Tensor, h: Tensor, rest: Tensor) -> Tensor:
    """What to add to alphas and offset so that the same signs fit best."""
    weighted = (signs * h.unsqueeze(-1)).transpose(-1, -2).double()
    gram = weighted @ signs.double()
    ridge = _RIDGE * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + ridge, weighted @ rest.unsqueeze(-1).double()).squeeze(-1).float()
