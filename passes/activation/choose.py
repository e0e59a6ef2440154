"""Per tensor or per token: which scale an activation is worth."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparc.encoding.int_grid import IntGrid
from sparc.passes.activation.insert import PER_TENSOR, PER_TOKEN

TOKEN_EXTRA = 0.25
"""Time that per-token activations add to a matrix product, as a share of it (ONNX Runtime, 128 rows: 0.15 to 0.35)."""


@dataclass(frozen=True)
class Errors:
    """Noise of a group's outputs as a share of their power, averaged over rows, under each candidate."""

    tensor: float
    token: float


def output_errors(batches: Sequence[Tensor], matrices: Sequence[Tensor]) -> Errors:
    """Mean noise-to-signal ratio of the rows of `x @ w.T`, for a scale per tensor and per token.

    Every row counts the same: what follows normalises rows, and a scale per tensor harms small ones most.

    Args:
        batches: values of x, `[..., reduce]`; each is one tensor at run time.
        matrices: the weights that read x, `[out, reduce]`.
    """
    weights = torch.cat([matrix.double() for matrix in matrices])
    gram = weights.T @ weights
    found: dict[IntGrid, list[Tensor]] = {PER_TENSOR: [], PER_TOKEN: []}
    for x in batches:
        power = row_energies(x, gram)
        live = power > 0
        for spec, ratios in found.items():
            ratios.append(row_energies(dequantized(x, spec) - x.float(), gram)[live] / power[live])
    tensor, token = (float(torch.cat(ratios).mean()) if sum(map(len, ratios)) else 0.0 for ratios in found.values())
    return Errors(tensor, token)


def dequantized(x: Tensor, spec: IntGrid) -> Tensor:
    """decode(quantize(x)), float32."""
    x = x.float()
    return spec.round(x, spec.fit(x))


def row_energies(x: Tensor, gram: Tensor) -> Tensor:
    """`[rows]`: the squared norm of each row of `x @ w.T`, from the Gram matrix `w.T @ w`."""
    rows = x.double().reshape(-1, x.shape[-1])
    return ((rows @ gram) * rows).sum(-1)


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
