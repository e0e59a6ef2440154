"""Rounding weights to a grid: to nearest, over the whole range or with a search for the grid of least error."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from torch import Tensor, fx

from sparc import codes
from sparc.analysis.sites import Site
from sparc.contract import Approximate
from sparc.diag import PassError
from sparc.encoding.base import Encoding
from sparc.encoding.compose import compose, refit
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.operators import round_weight
from sparc.pass_base import Pass, PassContext, Stage
from sparc.passes.round.importance import column_importance, input_moments
from sparc.passes.round.mixed import Rounded, worth_more
from sparc.program import Program

DAMPING = 0.01


@dataclass(frozen=True)
class Round(Pass):
    """w => round(w, grid), where grid = encoding.fit(w); a mask that the weight already has is kept.

    Args:
        encoding: the grid's encoding.
        search: look for the grid with the least squared error instead of covering the whole range.
        importance: what a squared error in a column costs: `none` (the same in every column) or `data` (the mean square
            of the input column, from calibration, and a hundredth of all columns' mean).
        floor: a site whose signal-to-noise ratio falls below so many decibels is restored, with a remark.
        finer: an encoding of more bytes, for the sites where it removes most noise from the model's outputs.
        budget: what all selected sites may take together, as a part of their dense bytes; goes with `finer`.

    Raises:
        PassError: SPARC209 when only one of `finer` and `budget` is given, or the budget is not between 0 and 1.
    """

    name: ClassVar[str] = "round"
    stage: ClassVar[Stage] = Stage.ROUND

    encoding: Encoding = field(default=IntGrid())
    search: bool = False
    importance: Literal["none", "data"] = "none"
    floor: float | None = None
    finer: Encoding | None = None
    budget: float | None = None

    def __post_init__(self) -> None:
        if (self.finer is None) != (self.budget is None):
            raise PassError(codes.BAD_OPTION, "round takes finer and budget together", hint="give both, or neither")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise PassError(codes.BAD_OPTION, f"round has no budget of {self.budget!r}", hint="above 0, at most 1")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Mean squares of the inputs, when importance comes from data or a budget is shared out."""
        return frozenset({"moments"}) if self.importance == "data" or self.finer is not None else frozenset()

    @property
    def scope(self) -> str:  # type: ignore[override]
        """`program` when a budget is shared out: every site must be known before one is chosen."""
        return "match" if self.finer is None else "program"

    @property
    def contract(self) -> Approximate:
        """Every site's signal-to-noise ratio is measured, and held to the floor."""
        return Approximate("snr_db", self.floor)

    def watches(self, program: Program, context: PassContext) -> Iterator[tuple[fx.Node, str]]:
        """The inputs of the selected sites, per channel."""
        return input_moments(program, context) if self.needs else iter(())

    def run(self, program: Program, context: PassContext) -> None:
        """Round every selected site."""
        rounded = []
        for site in context.sites(program):
            encoding = _encoding(program, site, self.encoding)
            if encoding is None:
                continue
            why = _unsuitable(program, site, encoding)
            if why:
                context.skip(site.weight, why, site.location)
            elif context.edit():
                importance = column_importance(program, site, context) if self.needs else None
                rounded.append(Rounded(site, program.weights.record(site.weight), importance))
                self._round(program, rounded[-1], self.encoding)
        if self.finer is not None and self.budget is not None:
            for each in worth_more(program, rounded, self.finer, self.budget, context.example, context.diagnostics):
                program.weights.put(each.site.weight, each.original)
                self._round(program, each, self.finer)

    def _round(self, program: Program, each: Rounded, encoding: Encoding) -> None:
        importance = damped(each.importance) if self.importance == "data" and each.importance is not None else None
        round_site(program, each.site, encoding, importance, self.search)


def damped(importance: Tensor) -> Tensor | None:
    """Importance plus a hundredth of its mean; None where there is none.

    Calibration sees few inputs: a column that met only zeros there may still meet others.
    """
    mean = float(importance.mean())
    return importance + DAMPING * mean if 0 < mean < math.inf else None


def round_site(program: Program, site: Site, encoding: Encoding, importance: Tensor | None, search: bool) -> None:
    """Fit a grid to a site's weight and move the weight onto it.

    Args:
        program: is edited.
        site: whose weight; a mask it has is kept.
        encoding: the grid's encoding; it accepts the weight's matrix.
        importance: `[reduce]` or `[batch..., out, reduce]`, the cost of a squared error; None for uniform.
        search: minimise the error instead of covering the range.
    """
    weight = program.weights[site.weight]
    grid = refit(program.grid(site.weight), site.view.to_matrix(weight), encoding, importance=importance, search=search)
    grid = replace(grid, view=str(site.view))
    program.set_weight(site.weight, round_weight(weight, grid), grid)


def _encoding(program: Program, site: Site, wanted: Encoding) -> Encoding | None:
    """The encoding the site will have; None when its weight lies on such a grid already."""
    grid = program.grid(site.weight)
    if grid is None:
        return wanted
    composed = compose(grid.spec, wanted)
    return None if composed == grid.spec else composed


def _unsuitable(program: Program, site: Site, encoding: Encoding) -> str | None:
    """Why a site cannot be rounded, or would not get smaller."""
    weight = program.weights[site.weight]
    shape = site.view.matrix_shape(weight.shape)
    why = encoding.accepts(shape)
    if why is None and int(encoding.bytes(shape)) >= weight.nbytes:
        why = f"it takes {weight.nbytes} bytes as it is and {int(encoding.bytes(shape))} as {encoding}"
    return why
