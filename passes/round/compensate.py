"""Rounding once more to grids that are there already, so that columns make up for each other's error."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, fx

from sparc import codes
from sparc.analysis.sites import Site
from sparc.contract import Approximate
from sparc.diag import PassError
from sparc.encoding.grid import Grid
from sparc.pass_base import Pass, PassContext, Stage
from sparc.passes.round.gptq import column_of, refined, why_not_by_column
from sparc.passes.second_order.factor import DAMPING, factor
from sparc.passes.second_order.gram import better_rows, gram_watches, site_gram
from sparc.passes.second_order.sweep import sweep
from sparc.program import Program


@dataclass(frozen=True)
class Compensate(Pass):
    """w' => gptq(w), where w' lies on a grid, perhaps with a mask, and w is what it was before the first of both.

    What decides about grids and masks may so be anything (a shared budget of bytes, a search, any pruning), and the
    sweep (GPTQ, Frantar et al. 2022; with a mask, SparseGPT, Frantar and Alistarh 2023) only chooses the values. A row
    whose products would get more error keeps its values; sites without a grid are left alone.

    Args:
        damping: of the sweep, as a part of the inputs' mean square.
        activation_order: whether the sweep begins with the columns whose inputs are greatest.
        refit: choose values again, by coordinate descent, and fit the scales of integer grids to them.
        floor: a site whose signal-to-noise ratio falls below so many decibels is restored, with a remark.

    Raises:
        PassError: SPARC209 when the damping is negative.
    """

    name: ClassVar[str] = "compensate"
    stage: ClassVar[Stage] = Stage.ROUND
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    damping: float = field(default=DAMPING)
    activation_order: bool = True
    refit: bool = False
    floor: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.damping < float("inf"):
            raise PassError(codes.BAD_OPTION, f"compensate has no damping {self.damping!r}", hint="0.01")

    @property
    def contract(self) -> Approximate:
        """Every site's signal-to-noise ratio is measured, and held to the floor."""
        return Approximate("snr_db", self.floor)

    def watches(self, program: Program, context: PassContext) -> Iterator[tuple[fx.Node, str]]:
        """The inputs of the selected sites."""
        return gram_watches(program, context)

    def run(self, program: Program, context: PassContext) -> None:
        """Compensate every selected site that lies on a grid."""
        for site in context.sites(program):
            grid = program.grid(site.weight)
            if grid is None:
                continue
            dense, gram = _dense(program, site, context), site_gram(program, site, context)
            if dense is None:
                context.skip(site.weight, "its weight from before is not known", site.location)
            elif torch.equal(dense, program.weights[site.weight]):
                context.skip(site.weight, "no mask and no rounding has changed it", site.location)
            elif gram is None:
                context.skip(site.weight, "no calibration data says what it is multiplied with", site.location)
            elif why := why_not_by_column(grid.spec):
                context.skip(site.weight, why, site.location)
            elif context.edit():
                self._compensate(program, site, grid, dense, gram)

    def _compensate(self, program: Program, site: Site, grid: Grid, dense: Tensor, gram: Tensor) -> None:
        old = program.weights[site.weight]
        matrix = site.view.to_matrix(dense)
        shape = (gram.shape[0], -1, matrix.shape[-1])
        wanted, present = matrix.reshape(shape), site.view.to_matrix(old).reshape(shape)
        prepared = factor(gram, self.damping, descending=self.activation_order)
        swept = sweep(wanted, prepared, column_of(grid, matrix.shape, masked=True)).weight
        chosen = torch.where(better_rows(swept, present, wanted, gram), swept, present)
        if self.refit:
            chosen, grid = refined(grid, matrix.shape, chosen, wanted, gram, prepared)
        rounded = grid.spec.round(chosen.reshape(matrix.shape), grid)
        program.set_weight(site.weight, site.view.from_matrix(rounded, old.shape), grid)


def _dense(program: Program, site: Site, context: PassContext) -> Tensor | None:
    """The weight before the first pass that masks or rounds, if it is still the same matrix."""
    reference = context.reference
    if reference is None or site.weight not in reference.weights:
        return None
    found = reference.weights[site.weight]
    return found if found.shape == program.weights[site.weight].shape else None
