"""Rounding weights to a grid: to nearest, over the whole range or with a search for the best clip."""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from torch import Tensor

from sparc.analysis.sites import Site
from sparc.contract import Approximate
from sparc.encoding.base import Encoding
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.operators import round_weight
from sparc.pass_base import Pass, PassContext, Stage
from sparc.passes.round.importance import column_importance
from sparc.program import Program


@dataclass(frozen=True)
class Round(Pass):
    """w => round(w, grid), where grid = encoding.fit(w); a mask that the weight already has is kept.

    Args:
        encoding: the grid's encoding.
        search: look for the grid with the least squared error instead of covering the whole range.
        importance: what an error in a column costs: `none` (the same in every column), `norm` (estimated from the norms and weights before
            the site, without data) or `data` (mean square of the input column, from calibration).
        floor: a site whose signal-to-noise ratio in decibels falls below is restored, with a remark.
    """

    name: ClassVar[str] = "round"
    stage: ClassVar[Stage] = Stage.ROUND

    encoding: Encoding = field(default=IntGrid())
    search: bool = False
    importance: Literal["none", "norm", "data"] = "none"
    floor: float | None = None

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Mean squares of the inputs, when importance comes from data."""
        return frozenset({"moments"}) if self.importance == "data" else frozenset()

    @property
    def contract(self) -> Approximate:
        """Every site's signal-to-noise ratio is measured, and held to the floor."""
        return Approximate("snr_db", self.floor)

    def run(self, program: Program, context: PassContext) -> None:
        """Round every selected site."""
        for site in context.sites(program):
            weight = program.weights[site.weight]
            encoding = self._encoding(program, site)
            if encoding is None:
                continue
            shape = site.view.matrix_shape(weight.shape)
            why = encoding.accepts(shape) or _too_small(encoding, shape, weight)
            if why:
                context.skip(site.weight, why, site.location)
                continue
            if not context.edit():
                continue
            importance = None if self.importance == "none" else column_importance(program, site, context)
            round_site(program, site, encoding, importance, self.search)

    def _encoding(self, program: Program, site: Site) -> Encoding | None:
        """The encoding the site will have; None when it lies on such a grid already."""
        grid = program.grid(site.weight)
        if grid is None:
            return self.encoding
        wanted = grid.spec.compose(self.encoding)
        return None if wanted == grid.spec else wanted


def round_site(program: Program, site: Site, encoding: Encoding, importance: Tensor | None, search: bool) -> None:
    """Fit a grid to a site's weight and move the weight onto it.

    Args:
        program: is edited.
        site: whose weight.
        encoding: the grid's encoding; it accepts the weight's matrix.
        importance: `[reduce]`, the cost of a squared error in each column; None for uniform.
        search: minimise the error instead of covering the range.
    """
    weight = program.weights[site.weight]
    grid = encoding.fit(site.view.to_matrix(weight), importance=importance, search=search)
    grid = replace(grid, view=str(site.view))
    program.set_weight(site.weight, round_weight(weight, grid), grid)


def _too_small(encoding: Encoding, shape: tuple[int, ...], weight: Tensor) -> str | None:
    encoded = int(encoding.bytes(shape))
    return f"it would take {encoded} bytes as {encoding} and takes {weight.nbytes} as it is" if encoded >= weight.nbytes else None
