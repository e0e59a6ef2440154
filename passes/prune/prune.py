"""Pruning: which elements of each weight are zero, and what those that are kept become."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from sparc import codes
from sparc.analysis.sites import Site, find_sites
from sparc.contract import Approximate
from sparc.diag import PassError
from sparc.encoding.blocks import Blocks
from sparc.encoding.dense import Dense
from sparc.encoding.nm import NM
from sparc.encoding.operators import round_weight
from sparc.encoding.unstructured import Unstructured
from sparc.pass_base import Pass, PassContext, Stage
from sparc.passes.maskable import why_not_masked
from sparc.passes.prune.allocate import SPREAD, allocate, mean_curvatures
from sparc.passes.prune.masks import Pruned, Pruning
from sparc.passes.prune.refine import refine_mask
from sparc.passes.round.importance import column_importance, column_means, input_moments
from sparc.passes.second_order.factor import DAMPING, factor
from sparc.passes.second_order.gram import gram_watches, site_gram
from sparc.program import Program

_DTYPES: dict[torch.dtype, Literal["float64", "float32", "float16", "bfloat16"]] = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


@dataclass(frozen=True)
class Prune(Pass):
    """w => w' * mask; w' is w, or with `sparsegpt` what makes up for the elements that are gone.

    The weight gets a grid that holds the mask, which rounding keeps. Embeddings are left alone: no product skips their
    zeros. On the calibration data, the squared error of a matrix's products is never more than by magnitude: where a
    method makes it worse, magnitude decides (of the row, for N:M; else of the matrix).

    Args:
        pattern: `NM(n, m)`, `Unstructured()` or `Blocks((rows, columns))`; how the kept values are stored is for
            `Round` to say.
        density: the part of the elements (or blocks) to keep, 0 to 1; `NM` says it itself.
        method: `magnitude`; `wanda`, which weighs a column by the norm of its input and compares in each row (Wanda,
            Sun et al. 2023); `wanda_variant`, whose rows lose an equal part of their scores instead of their elements;
            `sparsegpt`, which makes up for what is pruned (SparseGPT, Frantar and Alistarh 2023). All but the first
            need data.
        criterion: what `sparsegpt` ranks by, `obs` or `isc` (Shao et al. 2024, "One-Shot Sensitivity-Aware Mixed
            Sparsity Pruning").
        refine: exchange kept and dropped elements until the mean output of a row comes back (DSnoT, Zhang et al.
            2024), where that lowers the row's error.
        allocation: `uniform`, or `sensitivity`: matrices that the outputs depend on keep more, the density being that
            of all selected ones together (Shao et al. 2024, algorithm 1).
        spread: how much more, or less, than the density a matrix may then keep.
        damping: of the Gram matrix in `sparsegpt`, as a part of the inputs' mean square.
        floor: a site whose signal-to-noise ratio falls below so many decibels is restored, with a remark.

    Raises:
        PassError: SPARC209 when the pattern is no mask, says how values are stored, does not go with the density, or
            options do not go together.
    """

    name: ClassVar[str] = "prune"
    stage: ClassVar[Stage] = Stage.MASK

    pattern: NM | Blocks | Unstructured = field(default=NM(2, 4))
    density: float | None = None
    method: Literal["magnitude", "wanda", "wanda_variant", "sparsegpt"] = "magnitude"
    criterion: Literal["obs", "isc"] = "obs"
    refine: bool = False
    allocation: Literal["uniform", "sensitivity"] = "uniform"
    spread: float = SPREAD
    damping: float = DAMPING
    floor: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_pattern()
        if self.method not in ("magnitude", "wanda", "wanda_variant", "sparsegpt"):
            raise _refused(f"prune has no method {self.method!r}", "magnitude, wanda, wanda_variant or sparsegpt")
        if self.method == "wanda_variant" and not isinstance(self.pattern, Unstructured):
            raise _refused(f"wanda_variant has no pattern {self.pattern}", "its rows keep different counts")
        if self.criterion != "obs" and (self.criterion != "isc" or self.method != "sparsegpt"):
            raise _refused(f"prune has no criterion {self.criterion!r} for {self.method}", 'method="sparsegpt"')
        if self.refine and isinstance(self.pattern, Blocks):
            raise _refused(f"prune cannot refine {self.pattern}", "single elements are exchanged")
        if self.allocation not in ("uniform", "sensitivity"):
            raise _refused(f"prune has no allocation {self.allocation!r}", "uniform or sensitivity")
        if self.allocation == "sensitivity" and isinstance(self.pattern, NM):
            raise _refused(f"prune cannot share out {self.pattern}", "n of m are kept in every matrix")
        if not 0 <= self.spread < 1:
            raise _refused(f"prune has no spread {self.spread!r}", "0.1; at least 0, less than 1")
        if not 0 <= self.damping < math.inf:
            raise _refused(f"prune has no damping {self.damping!r}", "0.01")

    def _check_pattern(self) -> None:
        pattern = self.pattern
        if not isinstance(pattern, (NM, Blocks, Unstructured)):
            raise _refused(f"prune has no pattern {pattern!r}", "NM(n, m), Unstructured() or Blocks((rows, columns))")
        if pattern.of != Dense():
            bare = pattern.around(Dense())
            raise _refused(f"prune cannot store values as {pattern.of}", f"prune to {bare}, then round to {pattern.of}")
        if isinstance(pattern, NM) and self.density is not None:
            raise _refused(f"prune has no density for {pattern}", "n of m are kept: choose n and m")
        if not isinstance(pattern, NM) and (self.density is None or not 0 < self.density < 1):
            raise _refused(f"prune to {pattern} needs a density, not {self.density}", "density=0.5 keeps half")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Gram matrices of the inputs, for all that looks at data; their means, to refine."""
        if self.refine:
            return frozenset({"gram", "moments"})
        return frozenset() if self.method == "magnitude" else frozenset({"gram"})

    @property
    def contract(self) -> Approximate:
        """Every site's signal-to-noise ratio is measured, and held to the floor."""
        return Approximate("snr_db", self.floor)

    def watches(self, program: Program, context: PassContext) -> Iterator[tuple[fx.Node, str]]:
        """The inputs of the selected sites."""
        grams = gram_watches(program, context) if self.needs else ()
        return chain(grams, input_moments(program, context) if self.refine else ())

    def run(self, program: Program, context: PassContext) -> None:
        """Prune every selected site."""
        if self.allocation == "sensitivity" and "densities" not in context.memory:
            context.memory["densities"] = self._densities(program, context)
        for site in context.sites(program):
            if self._is_pruned(program, site):
                continue
            why = self._unsuitable(program, site)
            if why:
                context.skip(site.weight, why, site.location)
            elif context.edit():
                self._prune(program, site, context)

    def _prune(self, program: Program, site: Site, context: PassContext) -> None:
        weight = program.weights[site.weight]
        pattern = self.pattern.around(Dense(_DTYPES[weight.dtype]))
        density = context.memory.get("densities", {}).get(site.weight, self.density)
        pruning = Pruning(site.view.to_matrix(weight), pattern, 1.0 if density is None else density)
        pruned = self._calibrated(program, site, context, pruning) if self.needs else pruning.by_magnitude()
        grid = replace(pattern.fit_masked(pruned.weight, pruned.mask), view=str(site.view))
        changed = site.view.from_matrix(pruned.weight, weight.shape)
        program.set_weight(site.weight, round_weight(changed, grid), grid)

    def _calibrated(self, program: Program, site: Site, context: PassContext, pruning: Pruning) -> Pruned:
        """By the method, where its data say that this is better than by magnitude."""
        plain = pruning.by_magnitude()
        gram = site_gram(program, site, context)
        if gram is None:
            why = "no calibration data says what it is multiplied with"
            what = f"{site.weight} was pruned by magnitude"
            context.diagnostics.remark(codes.NOT_MATCHED, what, where=site.location, why=why)
            return plain
        prepared = factor(gram, self.damping) if self.method == "sparsegpt" else None
        squares = pruning.spread_columns(gram.diagonal(dim1=-2, dim2=-1))
        match self.method:
            case "wanda":
                found = pruning.by_wanda(squares)
            case "wanda_variant":
                found = pruning.by_mass(squares)
            case "sparsegpt" if prepared is not None:
                found = pruning.by_sweep(gram, prepared, self.criterion)
            case _:
                found = plain
        if self.refine:
            means, squares = (
                get(program, site, context).expand(pruning.matrix.shape)  # type: ignore[union-attr]
                for get in (column_means, column_importance)
            )
            kept = self._refined(pruning.matrix, found.mask, means, squares)
            refined = pruning.masked(kept) if prepared is None else pruning.compensated(kept, prepared)
            found = pruning.better(found, refined, gram, by_row=True)
        return pruning.better(found, plain, gram, by_row=isinstance(self.pattern, NM))

    def _refined(self, matrix: Tensor, mask: Tensor, means: Tensor, squares: Tensor) -> Tensor:
        weight, kept, mean, square = (each.reshape(-1, matrix.shape[-1]) for each in (matrix, mask, means, squares))
        m = self.pattern.m if isinstance(self.pattern, NM) else None
        return refine_mask(weight, kept, mean, square, m).reshape(mask.shape)

    def _densities(self, program: Program, context: PassContext) -> dict[str, float]:
        """The density of each site of all blocks; none, with a remark, where gradients cannot be taken."""
        names, sizes = [], []
        for site in find_sites(program)[0]:
            chosen = not site.encoded and context.selects(site) and not self._is_pruned(program, site)
            if chosen and not self._unsuitable(program, site):
                names.append(site.weight)
                sizes.append(program.weights[site.weight].numel())
        try:
            found = mean_curvatures(program, names, context.example)
        except RuntimeError as error:  # torch's, for an operator without a derivative
            why = f"gradients cannot be taken: {str(error).splitlines()[0][:200]}"
            context.diagnostics.remark(codes.NOT_MATCHED, "every matrix keeps the same density", why=why)
            return {}
        if self.density is None or not names:
            return {}
        if not any(found.values()) or not all(map(math.isfinite, found.values())):
            why = "no floating output depends on a site" if not any(found.values()) else "gradients are not finite"
            context.diagnostics.remark(codes.NOT_MATCHED, "every matrix keeps the same density", why=why)
        shares = allocate([found[name] for name in names], sizes, self.density, self.spread)
        return dict(zip(names, shares, strict=True))

    def _is_pruned(self, program: Program, site: Site) -> bool:
        grid = program.grid(site.weight)
        return grid is not None and self.pattern.same_pattern(grid.spec)

    def _unsuitable(self, program: Program, site: Site) -> str | None:
        weight = program.weights[site.weight]
        if weight.dtype not in _DTYPES:
            return f"its dtype is {str(weight.dtype).removeprefix('torch.')}"
        return why_not_masked(program, site) or self.pattern.accepts(site.view.matrix_shape(weight.shape))


def _refused(what: str, hint: str) -> PassError:
    return PassError(codes.BAD_OPTION, what, hint=hint)
