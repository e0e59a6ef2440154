"""Weights of low rank, alone or beside a rounded or sparse weight."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from sparc import codes
from sparc.analysis.sites import Site, find_sites
from sparc.contract import Approximate
from sparc.diag import PassError
from sparc.encoding.base import Encoding
from sparc.encoding.blocks import Blocks
from sparc.encoding.dense import Dense
from sparc.encoding.grid import Grid
from sparc.encoding.mask import MaskEncoding
from sparc.pass_base import Pass, PassContext, Stage
from sparc.passes.low_rank.decompose import Decomposition, decompose
from sparc.passes.low_rank.split import (
    OPERATORS,
    from_spatial,
    product_bias,
    spatial_matrix,
    split_product,
    split_spatially,
    why_not_spatially,
)
from sparc.passes.round.fit import Fit, check_fit, fit_grid
from sparc.passes.round.importance import damped
from sparc.passes.second_order.factor import DAMPING, Factor, factor
from sparc.passes.second_order.gram import gram_watches, site_gram
from sparc.pattern import normalized_arguments
from sparc.program import Program

_FLOATS = {torch.float64: "float64", torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class LowRank(Pass):
    """linear(x, w) => linear(linear(x, a), b), where b a is the best matrix of its rank, if that is smaller.

    With `beside`, linear(x, w) => linear(x, s) + linear(linear(x, a), b), where s is rounded to an encoding and b a is
    what it misses: the error of rounding (LoftQ, Li et al. 2023, algorithm 1; for one iteration LoRC, Yao et al. 2023),
    or what a mask drops. s keeps its grid, and rounding inside a mask its mask.

    Convolutions become one of the same kernel to fewer channels, then one of size 1; or with `spatial`, one along each
    axis of the image. Factors are ordinary weights, which later steps round.

    Args:
        share: of the parameters that a weight had, what its factors may have; where neither rank nor energy is given.
        rank: of every weight.
        energy: keep the least rank that has this share of the sum of squares of the weight, or with `whitened`, of its
            products on calibration data.
        method: `svd` is nearest to the weight; `whitened` has the nearest products on calibration data (SVD-LLM, Wang
            et al. 2024).
        damping: of the inputs' Gram matrix, as a part of its diagonal's mean.
        beside: what the rest is rounded to, such as `IntGrid(4, 32)` or `NM(2, 4)`; nothing by default.
        iterations: with `beside`, how often rounding and decomposition alternate; the best is kept.
        fit: of the grids of `beside`, as in `round`.
        spatial: split convolutions of images along their axes.
        floor: a site whose signal-to-noise ratio falls below so many decibels is restored, with a remark.

    Raises:
        PassError: SPARC209 for options out of range, for both rank and energy, for `spatial` with `whitened`, or for
            blocks, whose density no encoding says.
    """

    name: ClassVar[str] = "low_rank"
    stage: ClassVar[Stage] = Stage.LOW_RANK

    share: float = 0.5
    rank: int | None = None
    energy: float | None = None
    method: Literal["svd", "whitened"] = "svd"
    damping: float = DAMPING
    beside: Encoding | None = None
    iterations: int = 1
    fit: Fit = "range"
    spatial: bool = False
    floor: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fit("low_rank", self.fit, self.beside)
        energy, rank = (1 if each is None else each for each in (self.energy, self.rank))
        if not 0 < self.share < 1 or rank < 1 or not 0 < energy <= 1:
            raise _refused("a share and an energy are between 0 and 1, a rank is at least 1")
        if self.rank is not None and self.energy is not None:
            raise _refused("rank and energy each choose the rank: give one")
        if self.iterations < 1 or not 0 <= self.damping < math.inf:
            raise _refused("iterations are at least 1, damping is not negative")
        if self.spatial and self.method == "whitened":
            raise _refused("factors along axes have no common input: spatial goes with method='svd'")
        if isinstance(self.beside, Blocks):
            raise _refused("blocks say no density: use NM(n, m) beside, or prune after")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Gram matrices of the inputs, for `whitened`."""
        return frozenset({"gram"}) if self.method == "whitened" else frozenset()

    @property
    def contract(self) -> Approximate:
        """Every site's signal-to-noise ratio is measured, and held to the floor."""
        return Approximate("snr_db", self.floor)

    def watches(self, program: Program, context: PassContext) -> Iterator[tuple[fx.Node, str]]:
        """The inputs of the selected sites."""
        return gram_watches(program, context) if self.needs else iter(())

    def run(self, program: Program, context: PassContext) -> None:
        """Split every selected site that gets smaller."""
        products = {use.node: site for site in find_sites(program)[0] for use in site.uses}
        for site in list(context.sites(program)):
            why = self._unsuitable(program, site, products)
            if why:
                context.skip(site.weight, why, site.location)
                continue
            split = self._split(program, site, context)
            if isinstance(split, str):
                context.skip(site.weight, split, site.location)
            elif context.edit():
                self._apply(program, site, split)

    def _unsuitable(self, program: Program, site: Site, products: dict[fx.Node, Site]) -> str:
        use = site.uses[0]
        if len(site.uses) > 1:
            return f"it is read {len(site.uses)} times"
        if use.operator not in OPERATORS:
            return f"{use.operator} is not split"
        if use.node.kwargs:
            return f"its product has {', '.join(use.node.kwargs)} as options"
        if program.weights[site.weight].dtype not in _FLOATS:
            return f"its dtype is {str(program.weights[site.weight].dtype).removeprefix('torch.')}"
        if program.grid(site.weight) is not None:
            return "it is rounded already"
        if is_factor(program, site, products):
            return "it is a factor of low rank"
        if self.spatial and (why := why_not_spatially(use)):
            return why
        shape = site.view.matrix_shape(program.weights[site.weight].shape)
        return (self._encoding(program, site).accepts(shape) or "") if self.beside is not None else ""

    def _split(self, program: Program, site: Site, context: PassContext) -> "_Split | str":
        """The factors, and the weight beside them; or why the site stays as it is."""
        weight = program.weights[site.weight]
        measure, importance = self._measure(program, site, context)
        matrix = site.view.to_matrix(weight)
        groups = _groups(site, matrix)
        runs = spatial_matrix(weight) if self.spatial else matrix.reshape(groups, -1, matrix.shape[-1])
        kept, left = None, weight.nbytes
        found = decompose(runs, measure) if self.beside is None or self.energy is not None else None
        rank = self._rank(runs.shape, found)
        if self.beside is not None:
            costs = None if importance is None else damped(importance.float())
            if costs is not None:
                costs = costs.unsqueeze(1).expand(runs.shape).reshape(matrix.shape)
            kept, up, down = self._alternate(program, site, runs, rank, measure, costs)
            left -= int(kept[1].spec.bytes_on(kept[1], matrix.shape))
        elif found is not None:
            up, down = found.factors(rank)
        size = (up.numel() + down.numel()) * weight.element_size()
        if size >= left:
            return (
                f"it takes {weight.nbytes} bytes as it is and {weight.nbytes - left + size} with factors of rank {rank}"
            )
        return _Split(up, down, kept)

    def _measure(self, program: Program, site: Site, context: PassContext) -> tuple[Factor | None, Tensor | None]:
        """What errors cost: the factored Gram matrix, and its diagonal `[groups, reduce]`."""
        gram = site_gram(program, site, context) if self.needs else None
        if gram is not None:
            return factor(gram, self.damping), gram.diagonal(dim1=-2, dim2=-1)
        if self.needs:
            why = "no calibration data says what it is multiplied with"
            context.diagnostics.remark(
                codes.NOT_MATCHED, f"{site.weight} was approximated for its own sake", where=site.location, why=why
            )
        return None, None

    def _rank(self, shape: torch.Size, found: Decomposition | None) -> int:
        rows, columns = shape[-2:]
        if self.energy is not None and found is not None:
            return found.rank_for(self.energy)
        wished = int(self.share * rows * columns / (rows + columns)) if self.rank is None else self.rank
        return max(1, min(wished, rows, columns))

    def _encoding(self, program: Program, site: Site) -> Encoding:
        encoding = self.beside
        assert encoding is not None
        if isinstance(encoding, MaskEncoding) and isinstance(encoding.of, Dense):
            return encoding.around(Dense(_FLOATS[program.weights[site.weight].dtype]))  # type: ignore[arg-type]
        return encoding

    def _alternate(
        self, program: Program, site: Site, runs: Tensor, rank: int, measure: Factor | None, costs: Tensor | None
    ) -> tuple[tuple[Tensor, Grid], Tensor, Tensor]:
        """The rounded weight, its grid, and the factors of what it misses."""
        weight, encoding = program.weights[site.weight], self._encoding(program, site)
        low = torch.zeros_like(runs, dtype=torch.float64)
        best, least = None, math.inf
        for _ in range(self.iterations):
            rest = (runs.double() - low).to(weight.dtype)
            matrix = site.view.to_matrix(from_spatial(rest, weight.shape)) if self.spatial else rest
            matrix = matrix.reshape(site.view.matrix_shape(weight.shape))
            grid = fit_grid(None, matrix, encoding, self.fit, costs)
            rounded = site.view.from_matrix(encoding.round(matrix, grid), weight.shape)
            seen = spatial_matrix(rounded) if self.spatial else site.view.to_matrix(rounded).reshape(runs.shape)
            found = decompose(runs.double() - seen.double(), measure)
            up, down = found.factors(rank)
            low = up @ down
            error = float(found.singular[:, rank:].square().sum())
            if error < least or best is None:
                best, least = ((rounded, replace(grid, view=str(site.view))), up, down), error
        assert best is not None
        return best

    def _apply(self, program: Program, site: Site, split: "_Split") -> None:
        edit = split_spatially if self.spatial else split_product
        edit(program, site, split.up, split.down, beside=split.kept is not None)
        if split.kept is not None:
            program.set_weight(site.weight, *split.kept)


@dataclass(frozen=True)
class _Split:
    up: Tensor
    down: Tensor
    kept: tuple[Tensor, Grid] | None


def _groups(site: Site, matrix: Tensor) -> int:
    """How many matrices of one site are decomposed each by itself."""
    if site.operator == "conv":
        return int(normalized_arguments(site.uses[0].node).get("groups") or 1)
    return math.prod(matrix.shape[:-2])


def is_factor(program: Program, site: Site, products: dict[fx.Node, Site]) -> bool:
    """Whether a weight is one of two between which there is nothing but a narrower value."""
    node, x = site.uses[0].node, site.uses[0].input
    pairs = [(x, node)] if x in products and len(x.users) == 1 else []
    users = [user for user in node.users if user in products]
    pairs += [(node, user) for user in users if len(node.users) == 1 and products[user].uses[0].input is node]
    for inner, outer in pairs:
        first, second = (products[each] for each in (inner, outer))
        rank, width = first.view.matrix_shape(program.weights[first.weight].shape)[-2:]
        rows = second.view.matrix_shape(program.weights[second.weight].shape)[-2]
        if rank < min(width, rows) and product_bias(first.uses[0]) is None:
            return True
    return False


def _refused(why: str) -> PassError:
    return PassError(codes.BAD_OPTION, "low_rank cannot have these options", why=why)
