"""A density for each matrix: those that the model's outputs depend on most keep more."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparc.execute import execute
from sparc.program import Program

SPREAD = 0.1
_PROBES = 8
_STEPS = 60


def allocate(sensitivities: Sequence[float], sizes: Sequence[int], density: float, spread: float) -> list[float]:
    """Densities that rise with the rank of the sensitivity and keep a given part of all parameters.

    `d = c + density + spread (2 rank / (n - 1) - 1)`, cut off at 0 and 1. (Shao et al. 2024, "One-Shot
    Sensitivity-Aware Mixed Sparsity Pruning", algorithm 1. What that calls sparsity grows with the sensitivity and has
    the mean 1 - p, so it is the density, as in the code published with it. Its mean is over matrices; c, found by
    bisection, makes it one over parameters.)

    Args:
        sensitivities: of each matrix; equal ones share their mean rank.
        sizes: the number of elements of each.
        density: the part of all elements to keep.
        spread: how much more than the mean the most sensitive matrix keeps, and the least sensitive one less.
    """
    known = torch.tensor(sensitivities, dtype=torch.float64)
    above = (known[:, None] > known).sum(-1) - (known[:, None] < known).sum(-1)  # twice the rank, from the middle
    wanted = density + spread * above.double() / max(1, len(known) - 1)
    weights = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    low, high = -1.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        mean = float((weights * (wanted + middle).clamp(0, 1)).sum())
        low, high = (middle, high) if mean < density else (low, middle)
    return [float(each) for each in (wanted + high).clamp(0, 1)]


def mean_curvatures(
    program: Program, weights: Sequence[str], examples: Mapping[str, list[Tensor]], probes: int = _PROBES
) -> dict[str, float]:
    """For each weight, `Tr(H) / n`, where H is the Hessian of `|f(w) - f(w₀)|² / 2` at w₀ and f all floating outputs.

    There the difference is zero, so that `H = JᵀJ` exactly, and `E |Jᵀ v|² = Tr(H)` for a normal v (Hutchinson 1989):
    a probe is one run forwards and one backwards. A loss on labels would need second derivatives, and labels, which a
    program has not.

    Args:
        program: is run with gradients.
        weights: the names; each must be floating.
        examples: for each entry, flat inputs.
        probes: how many v.

    Raises:
        RuntimeError: torch's, for an operator without a derivative.
    """
    leaves = {name: program.weights[name].detach().requires_grad_() for name in weights}
    found = dict.fromkeys(weights, 0.0)
    generator = torch.Generator().manual_seed(0)
    for entry, tensors in examples.items():
        outputs = execute(program.entries[entry].graph, {**program.weights, **leaves}, tensors, grad=True)
        outputs = [each for each in outputs if isinstance(each, Tensor) and each.requires_grad]
        for _ in range(probes if outputs else 0):
            directions = [torch.randn(each.shape, generator=generator).to(each.dtype) for each in outputs]
            gradients = torch.autograd.grad(
                outputs, list(leaves.values()), directions, retain_graph=True, allow_unused=True
            )
            for name, gradient in zip(leaves, gradients, strict=True):
                if gradient is not None:
                    found[name] += float(gradient.double().square().sum()) / (probes * gradient.numel())
    return found
