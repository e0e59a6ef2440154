"""Float minima apart from codes, so that the codes can meet quantized activations."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from sparc.analysis.sites import Site
from sparc.contract import Approximate
from sparc.encoding.grid import Grid
from sparc.encoding.int_grid import IntGrid
from sparc.pass_base import Pass, PassContext, Stage
from sparc.passes.activation.dynamic import PRODUCT_GROUPS, is_product
from sparc.pattern import normalized_arguments
from sparc.program import Entry, Program

aten = torch.ops.aten


@dataclass(frozen=True)
class SplitMinimum(Pass):
    """linear(x, s * c + m) => linear(x, s * c) + linear(sums of x over groups, m): a weight whose grid has a float
    minimum per group, in entries with a cache.

    Codes and scales stay; the minima become a matrix of their own, `[out, groups]`. So x can be quantized where it
    meets codes and stays exact where it meets minima. Products of one x share the sums.
    """

    name: ClassVar[str] = "split_minimum"
    stage: ClassVar[Stage] = Stage.ACTIVATION

    @property
    def contract(self) -> Approximate:
        """The sum of two float32 products is rounded elsewhere than their weight was: measured."""
        return Approximate("snr_db", None)

    def run(self, program: Program, context: PassContext) -> None:
        """Split every selected weight."""
        sums: dict[tuple[str, fx.Node], fx.Node] = {}
        for site in context.sites(program):
            grid = program.grid(site.weight) if not site.encoded else None
            if (
                grid is None
                or not _has_minima(grid)
                or any(program.entries[use.entry].cache is None for use in site.uses)
            ):
                continue
            why = _why_not(program, site, grid)
            if why:
                context.skip(site.weight, why, site.location)
            elif context.edit():
                _split(program, site, grid, sums)


def _has_minima(grid: Grid) -> bool:
    return isinstance(grid.spec, IntGrid) and "minimum" in grid.tensors


def _why_not(program: Program, site: Site, grid: Grid) -> str:
    spec: Any = grid.spec
    columns = program.weights[site.weight].shape[-1]
    if not all(is_product(use) and use.node.target is aten.linear.default for use in site.uses):
        return "it is not only multiplied"
    if spec.bits not in (4, 8) or spec.group not in PRODUCT_GROUPS or columns % spec.group:
        return f"no integer product exists for {spec}"
    return ""


def _split(program: Program, site: Site, grid: Grid, sums: dict[tuple[str, fx.Node], fx.Node]) -> None:
    old: Any = grid.spec
    spec = IntGrid(old.bits, old.group, symmetric=False, scale_dtype=old.scale_dtype)
    scale, minimum = grid.tensors["scale"], grid.tensors["minimum"]
    tensors = {"scale": scale, "zero": torch.zeros_like(scale, dtype=torch.uint8)}
    weight = program.weights[site.weight]
    codes = old.codes(site.view.to_matrix(weight), grid.tensors)
    program.set_weight(site.weight, spec.values(codes, tensors, weight.dtype), Grid(spec, tensors, grid.view))
    minima = program.add_weight(f"{site.weight}_minimum", minimum.to(weight.dtype), like=site.uses[0].node)
    for use in site.uses:
        entry, x = program.entries[use.entry], use.input
        key = use.entry, x
        if key not in sums:
            sums[key] = _group_sums(entry, x, old.group, use.node)
        own = program.weight_node(entry, str(minima.target))
        _add(entry, use.node, sums[key], own)


def _group_sums(entry: Entry, x: fx.Node, group: int, before: fx.Node) -> fx.Node:
    groups = x.meta["val"].shape[-1] // group
    apart = entry.call(aten.unflatten.int, x, -1, [groups, group], before=before, like=before)
    return entry.call(aten.sum.dim_IntList, apart, [-1], before=before, like=before)


def _add(entry: Entry, product: fx.Node, sums: fx.Node, minima: fx.Node) -> None:
    """Make a product its sum with the product of minima, which takes its bias along."""
    given = normalized_arguments(product)
    rest = entry.call(aten.linear.default, sums, minima, given["bias"], before=product, like=product)
    codes = entry.call(aten.linear.default, given["input"], given["weight"], before=product, like=product)
    product.target, product.args, product.kwargs = aten.add.Tensor, (codes, rest), {}
