"""How the grid of a weight is found."""

from typing import Literal

from torch import Tensor

from sparc import codes
from sparc.diag import PassError
from sparc.encoding.base import Encoding
from sparc.encoding.compose import refit
from sparc.encoding.grid import Grid
from sparc.encoding.half_quadratic import half_quadratic, why_no_minimum

Fit = Literal["range", "search", "hqq"]


def check_fit(name: str, fit: Fit, *encodings: Encoding | None) -> None:
    """Raise PassError SPARC209 for a way to fit grids that an encoding does not take.

    Args:
        name: of the pass.
        fit: its option.
        encodings: what it rounds to.
    """
    for encoding in encodings if fit == "hqq" else ():
        if encoding is not None and (why := why_no_minimum(encoding)):
            raise PassError(
                codes.BAD_OPTION,
                f'{name} cannot fit {encoding} by "hqq"',
                why=why,
                hint='IntGrid(bits=4, group=64, symmetric=False, zero="minimum"), or fit="search"',
            )


def fit_grid(existing: Grid | None, matrix: Tensor, encoding: Encoding, fit: Fit, importance: Tensor | None) -> Grid:
    """The grid for a matrix; a mask that it has is kept.

    Args:
        existing: the grid that it lies on, if any.
        matrix: `[batch..., out, reduce]`, floating.
        encoding: what to round to.
        fit: cover the range, look for the least squared error, or for the least `sum |error|^0.7` (HQQ).
        importance: as for `Encoding.fit`.
    """
    grid = refit(existing, matrix, encoding, importance=importance, search=fit == "search")
    return half_quadratic(matrix, grid) if fit == "hqq" else grid
