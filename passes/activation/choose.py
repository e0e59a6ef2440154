"""Per tensor or per token: which scale an activation is worth."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sparc.encoding.int_grid import IntGrid
from sparc.passes.activation.insert import PER_TENSOR, PER_TOKEN

TOKEN_EXTRA = 0.25
"""Time that per-token activations add to a matrix product, as a share of it (ONNX Runtime, 128 rows: 0.15 to 0.35)."""


@dataclass(frozen=True)
class Errors:
    """Noise of a group's outputs as a share of their power, under each candidate."""

    tensor: float
    token: float


def output_errors(batches: Sequence[Tensor], matrices: Sequence[Tensor]) -> Errors:
    """Noise-to-signal ratio of `x @ w.T`, for a scale per tensor and per token.

    Args:
        batches: values of x, `[..., reduce]`; each is one tensor at run time.
        matrices: the weights that read x, `[out, reduce]`.
    """
    noise = {PER_TENSOR: 0.0, PER_TOKEN: 0.0}
    power = 0.0
    gram = sum(matrix.double().T @ matrix.double() for matrix in matrices)
    assert isinstance(gram, Tensor)
    for x in batches:
        power += energy(x, gram)
        for spec in noise:
            noise[spec] += energy(dequantized(x, spec) - x.float(), gram)
    if power <= 0:
        return Errors(0.0, 0.0)
    return Errors(noise[PER_TENSOR] / power, noise[PER_TOKEN] / power)


def dequantized(x: Tensor, spec: IntGrid) -> Tensor:
    """decode(quantize(x)), float32."""
    x = x.float()
    return spec.round(x, spec.fit(x))


def energy(x: Tensor, gram: Tensor) -> float:
    """`|x @ w.T|²`, from the Gram matrix `w.T @ w`."""
    rows = x.double().reshape(-1, x.shape[-1])
    return float(((rows @ gram) * rows).sum())


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
