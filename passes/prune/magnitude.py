"""Pruning by magnitude, to N:M and to blocks."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from sparc import codes
from sparc.analysis.sites import Site
from sparc.contract import Approximate
from sparc.diag import PassError
from sparc.encoding.blocks import Blocks
from sparc.encoding.dense import Dense
from sparc.encoding.nm import NM
from sparc.encoding.operators import round_weight
from sparc.pass_base import Pass, PassContext, Stage
from sparc.passes.round.importance import column_importance, input_moments
from sparc.program import Program

_DTYPES: dict[torch.dtype, Literal["float64", "float32", "float16", "bfloat16"]] = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


@dataclass(frozen=True)
class Prune(Pass):
    """w => w * mask, which keeps the n greatest `|w| * sqrt(importance)` of every m, or the blocks of greatest norm.

    The weight gets a grid that holds the mask, which rounding keeps. Embeddings are left alone: no product skips their
    zeros.

    Args:
        pattern: `NM(n, m)` or `Blocks((rows, columns))`; how the kept values are stored is for `Round` to say.
        density: the part of the blocks to keep, 0 to 1; for `Blocks` only, since `NM` keeps n of m.
        importance: `none` prunes by magnitude; `data` weighs a column by the mean square of its input (Wanda, Sun et
            al. 2023).
        floor: a site whose signal-to-noise ratio falls below so many decibels is restored, with a remark.

    Raises:
        PassError: SPARC209 when the pattern is no mask, says how values are stored, or does not go with the density.
    """

    name: ClassVar[str] = "prune"
    stage: ClassVar[Stage] = Stage.MASK

    pattern: NM | Blocks = field(default=NM(2, 4))
    density: float | None = None
    importance: Literal["none", "data"] = "none"
    floor: float | None = None

    def __post_init__(self) -> None:
        pattern = self.pattern
        if not isinstance(pattern, (NM, Blocks)):
            raise _refused(f"prune has no pattern {pattern!r}", "pattern is NM(n, m) or Blocks((rows, columns))")
        if pattern.of != Dense():
            bare = pattern.around(Dense())
            raise _refused(f"prune cannot store values as {pattern.of}", f"prune to {bare}, then round to {pattern.of}")
        if isinstance(pattern, NM) and self.density is not None:
            raise _refused(f"prune has no density for {pattern}", "n of m are kept: choose n and m")
        if isinstance(pattern, Blocks) and (self.density is None or not 0 < self.density < 1):
            raise _refused(f"prune to {pattern} needs a density, not {self.density}", "density=0.5 keeps half")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Mean squares of the inputs, when importance comes from data."""
        return frozenset({"moments"}) if self.importance == "data" else frozenset()

    @property
    def contract(self) -> Approximate:
        """Every site's signal-to-noise ratio is measured, and held to the floor."""
        return Approximate("snr_db", self.floor)

    def watches(self, program: Program, context: PassContext) -> Iterator[tuple[fx.Node, str]]:
        """The inputs of the selected sites, per channel."""
        return input_moments(program, context) if self.needs else iter(())

    def run(self, program: Program, context: PassContext) -> None:
        """Prune every selected site."""
        for site in context.sites(program):
            grid = program.grid(site.weight)
            if grid is not None and self.pattern.same_pattern(grid.spec):
                continue
            why = self._unsuitable(program, site)
            if why:
                context.skip(site.weight, why, site.location)
            elif context.edit():
                importance = column_importance(program, site, context) if self.needs else None
                self._prune(program, site, importance)

    def _prune(self, program: Program, site: Site, importance: Tensor | None) -> None:
        weight = program.weights[site.weight]
        matrix = site.view.to_matrix(weight)
        pattern = self.pattern.around(Dense(_DTYPES[weight.dtype]))
        if isinstance(pattern, Blocks):
            mask = pattern.select(matrix, self.density or 0.0, importance)
        else:
            mask = pattern.select(matrix, importance)
        grid = replace(pattern.fit_masked(matrix, mask), view=str(site.view))
        program.set_weight(site.weight, round_weight(weight, grid), grid)

    def _unsuitable(self, program: Program, site: Site) -> str | None:
        weight = program.weights[site.weight]
        if weight.dtype not in _DTYPES:
            return f"its dtype is {str(weight.dtype).removeprefix('torch.')}"
        if any(use.operator == "embedding" for use in site.uses):
            return "it is an embedding: no product skips its zeros"
        if any(use.operator == "conv" for use in site.uses) and weight.shape[1] == 1:
            return "it is a depthwise convolution: each output reads a single channel"
        return self.pattern.accepts(site.view.matrix_shape(weight.shape))


def _refused(what: str, hint: str) -> PassError:
    return PassError(codes.BAD_OPTION, what, hint=hint)
