"""Per tensor or per token: which scale an activation is worth."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparc.passes.activation.insert import PER_TENSOR, PER_TOKEN
from sparc.passes.activation.noise import Rows, product_noise

TOKEN_EXTRA = 0.25
"""Time that per-token activations add to a matrix product, as a share of it (ONNX Runtime, 128 rows: 0.15 to 0.35)."""


@dataclass(frozen=True)
class Errors:
    """Noise of a group's outputs as a share of their power, averaged over rows, under each candidate."""

    tensor: float
    token: float


def output_errors(batches: Sequence[Tensor], matrices: Sequence[Tensor]) -> Errors:
    """Mean noise-to-signal ratio of the rows of `x @ w.T`, for a scale per tensor and per token.

    Args:
        batches: values of x, `[..., reduce]`; each is one tensor at run time.
        matrices: the weights that read x, `[out, reduce]`.
    """
    x, weights = Rows(batches), torch.cat([matrix.float() for matrix in matrices])
    return Errors(*(product_noise(x, weights, spec) for spec in (PER_TENSOR, PER_TOKEN)))


def wants_token(errors: Errors, share: float, price: float) -> bool:
    """Whether a scale per token is worth its time.

    Minimising `sum of errors + price * (per cent of time added to all matrix products)` decides each group by itself: a
    scale per token is chosen where it removes more noise than its time costs.

    Args:
        errors: of the group.
        share: the group's share of the multiply-adds of all quantized products.
        price: the noise-to-signal ratio that one per cent of time is worth.
    """
    return errors.tensor - errors.token > price * 100 * TOKEN_EXTRA * share
