"""Orthogonal matrices: Hadamard matrices of many orders, generated, and random ones of every order."""

from functools import lru_cache
from math import isqrt
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["hadamard", "orthogonal"]


def hadamard(order: int) -> Tensor | None:
    """A Hadamard matrix: entries of ±1 and `H Hᵀ = order I`; None where the constructions give none.

    Sylvester's doubling `[[H, H], [H, -H]]` on top of 1, or of Paley's constructions over the integers modulo a prime
    (R. E. A. C. Paley, "On orthogonal matrices", 1933).

    Args:
        order: the number of rows.

    Returns:
        `[order, order]`, float64.
    """
    if order in (1, 2):
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)[:order, :order]
    if order % 4:
        return None
    half = hadamard(order // 2)
    return _paley(order) if half is None else torch.kron(hadamard(2), half)  # type: ignore[arg-type]


def _paley(order: int) -> Tensor | None:
    """Paley's matrix of an order `q + 1` with `q ≡ 3 (mod 4)`, or `2 (q + 1)` with `q ≡ 1 (mod 4)`, for a prime q."""
    if _is_prime(order - 1):  # order is a multiple of 4, so that q ≡ 3
        skew = _bordered(order - 1, -1.0)
        return skew + torch.eye(order, dtype=torch.float64)
    q = order // 2 - 1
    if q % 4 == 1 and _is_prime(q):
        symmetric, unit = _bordered(q, 1.0), torch.eye(q + 1, dtype=torch.float64)
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(symmetric, plus) + torch.kron(unit, minus)
    return None


def _bordered(q: int, sign: float) -> Tensor:
    """`[[0, 1], [sign, Q]]` with the Jacobsthal matrix `Q[i, j] = χ(i - j)`: χ(a) is 1 where a is a square modulo q."""
    numbers = torch.arange(q)
    character = -torch.ones(q, dtype=torch.float64)
    character[(numbers * numbers) % q] = 1.0
    character[0] = 0.0
    whole = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    whole[0, 1:], whole[1:, 0] = 1.0, sign
    whole[1:, 1:] = character[(numbers[:, None] - numbers[None, :]) % q]
    return whole


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, isqrt(number) + 1))


@lru_cache(maxsize=4)
def rotation(size: int, kind: Kind = "hadamard", seed: int = 0) -> Tensor:
    """A random orthogonal matrix `R` with `R Rᵀ = I`.

    `hadamard` is `H diag(±1) / sqrt(size)` with random signs, which spreads every channel evenly over all (Ashkboos et
    al., "QuaRot", 2024, section 3); where no Hadamard matrix of this order can be made, and for `orthogonal`, it is
    drawn uniformly, by the QR decomposition of a Gaussian matrix with the signs of R's diagonal (F. Mezzadri, "How to
    generate random matrices from the classical compact groups", 2007).

    Args:
        size: the number of rows.
        kind: which.
        seed: draws the signs, or the Gaussian.

    Returns:
        `[size, size]`, float64.
    """
    generator = torch.Generator().manual_seed(seed)
    known = hadamard(size) if kind == "hadamard" else None
    if known is not None:
        signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
        return known.T * signs / size**0.5
    gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return q * r.diagonal().sign()


def split(size: int, kind: Kind = "hadamard") -> tuple[int, int]:
    """Factors `(a, b)` of `size`: applying a rotation of each costs `a + b` multiplications an element.

    The least sum; with `hadamard`, pairs whose Hadamard matrices can be made come first, up to twice the least sum.
    """
    pairs = [(a, size // a) for a in range(1, isqrt(size) + 1) if size % a == 0]
    least = min(pairs, key=sum)
    if kind == "orthogonal":
        return least
    near = [pair for pair in pairs if sum(pair) <= 2 * sum(least)]
    known = [pair for pair in near if all(hadamard(order) is not None for order in pair)]
    return min(known or [least], key=sum)
