"""Dynamic activation quantization: scales are taken from each activation as it comes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, fx

from sparc.analysis.sites import Site, Use, find_sites
from sparc.contract import Approximate
from sparc.encoding.int_grid import IntGrid
from sparc.pass_base import Pass, PassContext, Stage
from sparc.passes.activation.choose import output_errors, wants_token
from sparc.passes.activation.insert import PER_TENSOR, PER_TOKEN, insert_dynamic, insert_split, is_quantized
from sparc.program import Program

Mode = Literal["auto", "tensor", "token", "split", "block", "fine"]
_BLOCKS = (128, 64, 32, 16)
PRODUCT_GROUPS = (256, *_BLOCKS)  # of columns, that integer products of weights in groups have


@dataclass(frozen=True)
class QuantizeActivations(Pass):
    """linear(x, w) => linear(decode(quantize(x)), w), where w is rounded to 8-bit integers.

    Products that read the same x share one `quantize`.

    Args:
        mode: `tensor` (one scale, asymmetric), `token` (a scale for each row, symmetric), `split` (per tensor, or as
            `block` for 8-bit weights in groups, and the remainder quantized once more: 16 bits on two 8-bit products),
            `block` (a scale for each row and each group of the weight's columns, or block of up to 128 columns where it
            has none, symmetric; for weights of any width), `fine` (`block` in entries with a cache, whose calls have
            one row for the most part, `split` elsewhere), or `auto`: `tensor` or `token`, whichever calibration finds
            worth it.
        price: for `auto`, the noise-to-signal ratio in a product's output that one per cent of all products' time is
            worth.
        floor: a product whose signal-to-noise ratio in decibels falls below gets its own x back, with a remark.
    """

    name: ClassVar[str] = "quantize_activations"
    stage: ClassVar[Stage] = Stage.ACTIVATION

    mode: Mode = "auto"
    price: float = 3e-3
    floor: float | None = None

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Whole values of the inputs, to choose by."""
        return frozenset({"batches"}) if self.mode == "auto" else frozenset()

    @property
    def contract(self) -> Approximate:
        """Every product's signal-to-noise ratio is measured, and held to the floor."""
        return Approximate("snr_db", self.floor)

    def watches(self, program: Program, context: PassContext) -> Iterator[tuple[fx.Node, str]]:
        """The whole inputs of the products that will be quantized."""
        for group in self._groups(program, context):
            yield group.x, "batches"

    def run(self, program: Program, context: PassContext) -> None:
        """Quantize the inputs of every selected site."""
        sites = find_sites(program)[0] if self.mode == "auto" else []
        total = sum(site_work(site) for site in sites if _why_not(program, site, "auto") is None)
        for group in self._groups(program, context):
            if not context.edit():
                return
            entry = program.entries[group.entry]
            before = next(node for node in entry.graph.nodes if node in group.nodes)
            mode = self._choose(program, context, group, total) if self.mode == "auto" else group.mode
            if mode == "split":
                columns = group.columns or None
                quantized = insert_split(entry, group.x, before, symmetric=group.stacks, group=columns)
            else:
                spec = {"tensor": PER_TENSOR, "token": PER_TOKEN}.get(mode) or IntGrid(8, group.columns, symmetric=True)
                quantized = insert_dynamic(entry, group.x, spec, before)
            for node in group.nodes:
                node.replace_input_with(group.x, quantized)

    def _choose(self, program: Program, context: PassContext, group: "Group", total: float) -> Mode:
        batches = context.statistics(group.x, "batches") if context.statistics is not None else None
        if not batches:
            return "token"
        matrices = [site.view.to_matrix(program.weights[site.weight]).flatten(0, -2) for site in group.sites]
        share = sum(site_work(site) for site in group.sites) / total
        return "token" if wants_token(output_errors(batches, matrices), share, self.price) else "tensor"

    def _mode(self, program: Program, use: Use) -> Mode:
        if self.mode != "fine":
            return self.mode
        return "split" if program.entries[use.entry].cache is None else "block"

    def _groups(self, program: Program, context: PassContext) -> list["Group"]:
        groups: dict[tuple[str, str, int], Group] = {}
        for site in context.sites(program):
            modes = {self._mode(program, use) for use in site.uses}
            reasons = {mode: _why_not(program, site, mode, fine=self.mode == "fine") for mode in modes}
            for why in filter(None, reasons.values()):
                context.skip(site.weight, why, site.location)
            for use in site.uses:
                x, mode = use.input, self._mode(program, use)
                if not is_product(use) or not isinstance(x, fx.Node) or x.op == "get_attr" or is_quantized(x):
                    continue
                if reasons[mode]:
                    continue
                columns = _columns(program, site, mode)
                group = groups.setdefault((use.entry, x.name, columns), Group(use.entry, x, mode, columns, [], []))
                group.nodes.append(use.node)
                group.sites.append(site)
        return list(groups.values())


def _columns(program: Program, site: Site, mode: Mode) -> int:
    """How many columns share a scale of x: a group of the weight, else the largest block that divides its rows; 0 where
    no columns share one.
    """
    group = program.grid(site.weight).spec.group  # type: ignore[union-attr]
    if mode not in ("block", "split"):
        return 0
    if isinstance(group, int):
        return group
    if mode == "split":
        return 0
    reduce = site.view.to_matrix(program.weights[site.weight]).shape[-1]
    return next((block for block in _BLOCKS if reduce % block == 0), 32)


def _why_not(program: Program, site: Site, mode: Mode, *, fine: bool = False) -> str | None:
    """Why no integer product of a mode exists for a weight; `fine` wants one that multiplies codes of blocks."""
    if not any(is_product(use) for use in site.uses):
        return f"no dynamic integer product exists for {site.operator}"
    grid = program.grid(site.weight)
    spec = grid.spec if grid is not None else None
    if not isinstance(spec, IntGrid):
        return "its weight is not rounded to integers"
    if mode == "block":
        return f"no product of blocks exists for {spec}" if fine and not _multiplies_blocks(spec) else None
    if mode == "split" and isinstance(spec.group, int) and spec.bits == 8:
        return None if spec.group in PRODUCT_GROUPS else f"no integer product has groups of {spec.group} columns"
    if isinstance(spec.group, int) or spec.bits != 8 or spec.zero != "integer":
        return f"integer products need 8-bit weights with a scale per row at most, and its grid is {spec}"
    return None


def _multiplies_blocks(spec: IntGrid) -> bool:
    blocks = not isinstance(spec.group, int) or spec.group in PRODUCT_GROUPS
    return blocks and spec.zero == "integer" and spec.bits in (4, 8)


@dataclass
class Group:
    """The products that read one activation.

    Args:
        entry: the entry's name.
        x: the activation.
        mode: how it is quantized.
        columns: how many columns share a scale; 0 where none do.
        nodes: the products.
        sites: their weights.
    """

    entry: str
    x: fx.Node
    mode: Mode
    columns: int
    nodes: list[fx.Node]
    sites: list[Site]

    @property
    def stacks(self) -> bool:
        """Whether the two halves of a split should share a zero point.

        The matrix of a head that is also an embedding is best read as it is stored, and then each product reads it all:
        one product on stacked halves reads it once.
        """
        value = self.x.meta["val"]
        looked_up = any(not is_product(use) for site in self.sites for use in site.uses)
        return looked_up and isinstance(value, Tensor) and value.ndim > 1


def is_product(use: Use) -> bool:
    """Whether a use is a matrix product; an embedding of the same weight only looks rows up."""
    return use.operator in ("linear", "matmul")


def site_work(site: Site) -> float:
    """Multiply-adds of a site for one row of its input."""
    return float(site.source.meta["val"].numel())
