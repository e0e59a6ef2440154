"""How a weight that already lies on a grid is rounded to another encoding: a mask stays, all else is replaced."""

from dataclasses import replace

from torch import Tensor

from sparc.encoding.base import Encoding
from sparc.encoding.grid import Grid
from sparc.encoding.mask import MaskEncoding


def compose(existing: Encoding | None, new: Encoding) -> Encoding:
    """The encoding of a weight on `existing` once it is also rounded to `new`.

    `NM(2, 4)` and `IntGrid(4)` give `NM(2, 4, of=IntGrid(4))`.

    Raises:
        PassError: SPARC209 when the existing mask cannot hold the new encoding.
    """
    return new if existing is None else existing.compose(new)


def refit(
    grid: Grid | None, weight: Tensor, spec: Encoding, *, importance: Tensor | None = None, search: bool = False
) -> Grid:
    """The grid for rounding a matrix to `spec`, which keeps the mask that the matrix already carries.

    Args:
        grid: the grid the matrix lies on, if any; the result has its view.
        weight: `[batch..., out, reduce]`, floating, in that view.
        spec: what to round to.
        importance: as for `Encoding.fit`.
        search: as for `Encoding.fit`.

    Raises:
        PassError: SPARC209 when the existing mask cannot hold `spec`.
    """
    if grid is None:
        return spec.fit(weight, importance=importance, search=search)
    composed = compose(grid.spec, spec)
    if isinstance(composed, MaskEncoding) and composed.same_pattern(grid.spec):
        fitted = composed.fit_masked(weight, grid.tensors["mask"], importance=importance, search=search)
    else:
        fitted = composed.fit(weight, importance=importance, search=search)
    return replace(fitted, view=grid.view)
