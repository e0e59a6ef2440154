"""Contracts: what a pass promises about the numbers."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

_PLACES = 16


@dataclass(frozen=True)
class Exact:
    """Outputs stay equal bit for bit."""

    def __str__(self) -> str:
        return "exact"


@dataclass(frozen=True)
class Bounded:
    """Equal in real arithmetic; in floating point only the rounding differs.

    Every rewritten region is run before and after in float64 and must agree to 1e-9 relative; natively, region and
    program must agree to `rtol`, which is meant for float32; in half precision a few roundings are more than that.
    """

    rtol: float = 1e-4

    def native(self, dtypes: Iterable[torch.dtype]) -> float:
        """The tolerance of native results where tensors of these types take part: at least 16 last places of the
        coarsest.
        """
        coarse = max((torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point), default=0.0)
        return max(self.rtol, _PLACES * coarse if coarse > torch.finfo(torch.float32).eps else 0.0)

    def __str__(self) -> str:
        return f"bounded({self.rtol:g})"


@dataclass(frozen=True)
class Approximate:
    """Numbers change, and the change is measured at every site.

    Args:
        metric: `snr_db` (signal-to-noise ratio of the site's output in decibels) or `cosine`.
        floor: a site that measures less is restored, with a remark; None measures only.
    """

    metric: str = "snr_db"
    floor: float | None = None

    def __str__(self) -> str:
        return f"approximate({self.metric})" if self.floor is None else f"approximate({self.metric} ≥ {self.floor:g})"


Contract = Exact | Bounded | Approximate
