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
from sparc.encoding.compose import compose
from sparc.encoding.dense import Dense
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.mask import MaskEncoding
from sparc.encoding.operators import round_weight
from sparc.pass_base import Pass, PassContext, Stage
from sparc.passes.maskable import why_not_masked
from sparc.passes.round.fit import Fit, check_fit, fit_grid
from sparc.passes.round.gptq import chosen_pattern, round_by_sweep, why_not_by_column
from sparc.passes.round.importance import column_importance, damped, input_moments
from sparc.passes.round.mixed import Rounded, worth_more
from sparc.passes.second_order.factor import DAMPING, factor
from sparc.passes.second_order.gram import gram_watches, site_gram
from sparc.program import Program


@dataclass(frozen=True)
class Round(Pass):
    """w => round(w, grid), where grid = encoding.fit(w); a mask that the weight already has is kept.

    Args:
        encoding: the grid's encoding.
        fit: how grids are found: `range` covers all values, `search` looks for the least squared error, `hqq` for the
            least `sum |error|^0.7` (HQQ, Badri and Shaji 2023; for integers with a floating minimum). With `gptq`,
            `search` also fits the scales of integer grids to the codes that the sweep chose, and codes to those scales.
        importance: what a squared error in a column costs: `none` (the same in every column) or `data` (the mean square
            of the input column, from calibration, and a hundredth of all columns' mean).
        floor: a site whose signal-to-noise ratio falls below so many decibels is restored, with a remark.
        method: `nearest`, or `gptq`: column by column, what is left of a row makes up for the error so far (GPTQ,
            Frantar et al. 2022; it needs data). With a mask as encoding, `NM(2, 4, of=IntGrid(4))`, the mask is chosen
            in the same sweep (SparseGPT, Frantar and Alistarh 2023).
        damping: of the sweep, as a part of the inputs' mean square.
        activation_order: whether the sweep begins with the columns whose inputs are greatest.
        finer: an encoding of more bytes, for the sites where it removes most noise from the model's outputs.
        budget: what all selected sites may take together, as a part of their dense bytes; goes with `finer`.

    Raises:
        PassError: SPARC209 when only one of `finer` and `budget` is given, or the budget is not between 0 and 1; when
            they go with `gptq`, which knows one block at a time; when the damping is negative; or when the encoding
            cannot be fitted so.
    """

    name: ClassVar[str] = "round"
    stage: ClassVar[Stage] = Stage.ROUND

    encoding: Encoding = field(default=IntGrid())
    fit: Fit = "range"
    importance: Literal["none", "data"] = "none"
    floor: float | None = None
    method: Literal["nearest", "gptq"] = "nearest"
    damping: float = DAMPING
    activation_order: bool = True
    finer: Encoding | None = None
    budget: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fit("round", self.fit, self.encoding, self.finer)
        if self.fit == "hqq" and self.importance == "data":
            raise PassError(codes.BAD_OPTION, "round weighs no errors for hqq", hint='fit="search", or no importance')
        if (self.finer is None) != (self.budget is None):
            raise PassError(codes.BAD_OPTION, "round takes finer and budget together", hint="give both, or neither")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise PassError(codes.BAD_OPTION, f"round has no budget of {self.budget!r}", hint="above 0, at most 1")
        if self.method == "gptq" and self.finer is not None:
            raise PassError(
                codes.BAD_OPTION,
                "round shares no budget out with gptq",
                why="the sweep knows one block at a time, a budget needs all sites",
                hint="add compensate() behind it: the same sweep on the grids that the budget chose",
            )
        if not 0 <= self.damping < math.inf:
            raise PassError(codes.BAD_OPTION, f"round has no damping {self.damping!r}", hint="0.01")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Gram matrices of the inputs for gptq; mean squares, when importance comes from data or a budget is shared."""
        if self.method == "gptq":
            return frozenset({"gram"})
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
        if self.method == "gptq":
            return gram_watches(program, context)
        return input_moments(program, context) if self.needs else iter(())

    def run(self, program: Program, context: PassContext) -> None:
        """Round every selected site."""
        rounded = []
        for site in context.sites(program):
            wanted, why_dense = _worth_masking(program, site, self.encoding)
            encoding = _encoding(program, site, wanted)
            if encoding is None:
                continue
            why = why_dense if isinstance(wanted, Dense) else _unsuitable(program, site, encoding)
            if why:
                context.skip(site.weight, why, site.location)
            elif not context.edit():
                break
            else:
                if why_dense:
                    what = f"{site.weight} was rounded to {wanted} without a mask"
                    context.diagnostics.remark(codes.NOT_MATCHED, what, where=site.location, why=why_dense)
                if self.method == "gptq":
                    self._sweep(program, site, wanted, context)
                    continue
                importance = column_importance(program, site, context) if self.needs else None
                rounded.append(Rounded(site, program.weights.record(site.weight), importance))
                self._round(program, rounded[-1], wanted)
        if self.finer is not None and self.budget is not None:
            for each in worth_more(program, rounded, self.finer, self.budget, context.example, context.diagnostics):
                program.weights.put(each.site.weight, each.original)
                self._round(program, each, self.finer)

    def _sweep(self, program: Program, site: Site, wanted: Encoding, context: PassContext) -> None:
        """Round by a sweep; to nearest, with a remark, where inputs are unknown or columns cannot be rounded alone."""
        gram = site_gram(program, site, context)
        encoding = compose(_spec(program, site), wanted)
        why = "no calibration data says what it is multiplied with" if gram is None else why_not_by_column(encoding)
        if gram is None or why:
            context.diagnostics.remark(
                codes.NOT_MATCHED, f"{site.weight} was rounded to nearest", where=site.location, why=why
            )
            self._round(program, Rounded(site, program.weights.record(site.weight), None), wanted)
            return
        pattern = chosen_pattern(_spec(program, site), wanted)
        unit = 1 if pattern is None else pattern.m
        prepared = factor(gram, self.damping, descending=self.activation_order, unit=unit)
        importance = gram.diagonal(dim1=-2, dim2=-1) if self.importance == "data" else None
        swept = round_by_sweep(program, site, wanted, gram, prepared, importance, self.fit)
        program.set_weight(site.weight, *swept)

    def _round(self, program: Program, each: Rounded, encoding: Encoding) -> None:
        importance = damped(each.importance) if self.importance == "data" and each.importance is not None else None
        round_site(program, each.site, encoding, importance, self.fit)


def round_site(program: Program, site: Site, encoding: Encoding, importance: Tensor | None, fit: Fit) -> None:
    """Fit a grid to a site's weight and move the weight onto it.

    Args:
        program: is edited.
        site: whose weight; a mask it has is kept.
        encoding: the grid's encoding; it accepts the weight's matrix.
        importance: `[reduce]` or `[batch..., out, reduce]`, the cost of a squared error; None for uniform.
        fit: how the grid is found.
    """
    weight = program.weights[site.weight]
    grid = fit_grid(program.grid(site.weight), site.view.to_matrix(weight), encoding, fit, importance)
    grid = replace(grid, view=str(site.view))
    program.set_weight(site.weight, round_weight(weight, grid), grid)


def _spec(program: Program, site: Site) -> Encoding | None:
    grid = program.grid(site.weight)
    return None if grid is None else grid.spec


def _worth_masking(program: Program, site: Site, wanted: Encoding) -> tuple[Encoding, str]:
    """What to round a site to: without the mask, and why, where that would be a new one and is worth nothing."""
    existing = _spec(program, site)
    composed = compose(existing, wanted)
    if not isinstance(composed, MaskEncoding) or (existing is not None and composed.same_pattern(existing)):
        return wanted, ""
    why = why_not_masked(program, site)
    return (composed.of, why) if why else (wanted, "")


def _encoding(program: Program, site: Site, wanted: Encoding) -> Encoding | None:
    """The encoding the site will have; None when its weight lies on such a grid already."""
    existing = _spec(program, site)
    composed = compose(existing, wanted)
    return None if composed == existing else composed


def _unsuitable(program: Program, site: Site, encoding: Encoding) -> str | None:
    """Why a site cannot be rounded, or would not get smaller."""
    weight = program.weights[site.weight]
    shape = site.view.matrix_shape(weight.shape)
    why = encoding.accepts(shape)
    if why is None and int(encoding.bytes(shape)) >= weight.nbytes:
        why = f"it takes {weight.nbytes} bytes as it is and {int(encoding.bytes(shape))} as {encoding}"
    return why
