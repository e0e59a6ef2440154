"""Smoothing: where no writer can take the factors of a value's channels, the value is multiplied by them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, fx

from sparc import codes
from sparc.analysis.sites import Site
from sparc.contract import Bounded
from sparc.diag import PassError
from sparc.encoding.int_grid import IntGrid
from sparc.pass_base import Pass, PassContext, Stage
from sparc.passes.activation.insert import PER_TENSOR
from sparc.passes.activation.noise import Rows, product_noise
from sparc.passes.equalize.equalize import factors
from sparc.passes.rotate.weights import Store
from sparc.program import Program

aten = torch.ops.aten

_WEIGHTS = IntGrid(8)


@dataclass(frozen=True)
class Smooth(Pass):
    """linear(x, w) => linear(x * s, w / s), where x will be quantized with one scale for all channels.

    The factor of a channel is `s = column^(1 - strength) / range^strength`, where `column` is the largest weight that
    reads the channel and `range` the channel's largest magnitude. (SmoothQuant, Xiao et al. 2023, equation 4, with the
    factors in a multiplication of their own: behind a norm that a residual stream also reads, or behind an activation
    function, nothing that writes x can take them.)

    Args:
        strength: 0 makes the weight's columns alike, 1 the ranges of the channels. Near 1, channels that calibration
            saw too small take up the range of the others.
        gain: the multiplication is inserted where it lowers the noise-to-signal ratio of the products of 8-bit values
            and 8-bit weights by so much.
    """

    name: ClassVar[str] = "smooth"
    stage: ClassVar[Stage] = Stage.EQUALIZE
    needs: ClassVar[frozenset[str]] = frozenset({"absmax", "batches"})

    strength: float = 0.8
    gain: float = 8e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.strength <= 1:
            raise PassError(codes.BAD_OPTION, f"strength={self.strength!r}", hint="a number from 0 to 1")

    @property
    def contract(self) -> Bounded:
        """The function stays the same."""
        return Bounded(1e-4)

    def watches(self, program: Program, context: PassContext) -> Iterator[tuple[fx.Node, str]]:
        """The inputs of the selected products: the channels' ranges, and some whole values to measure noise on."""
        for group in input_groups(program, context):
            yield group.x, "absmax"
            yield group.x, "batches"

    def run(self, program: Program, context: PassContext) -> None:
        """Smooth every value where that is worth a multiplication."""
        for group in input_groups(program, context):
            extent = None if context.statistics is None else context.statistics(group.x, "absmax")
            if context.statistics is None or extent is None:
                context.skip(group.x, "no calibration data reached it")
                continue
            x, matrix = Rows(context.statistics(group.x, "batches")), group.matrix(program)
            factor = factors(extent, matrix.abs().amax(0), self.strength).float()
            plain, smoothed = (product_noise(x, matrix, PER_TENSOR, each, _WEIGHTS) for each in (None, factor))
            if plain - smoothed < self.gain:
                why = f"smoothing gains {plain - smoothed:.2g} of the power of what reads it, less than {self.gain:g}"
                context.skip(group.sites[0].weight, why, group.sites[0].location)
            elif context.edit():
                multiply(Store(program, context), group, factor)


@dataclass
class InputGroup:
    """The products that read one value.

    Args:
        entry: the entry's name.
        x: the value, `[..., channels]`.
        nodes: the products.
        sites: their weights, which nothing else reads.
    """

    entry: str
    x: fx.Node
    nodes: list[fx.Node] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)

    def matrix(self, program: Program) -> Tensor:
        """`[out, channels]` float32: the weights below each other."""
        return torch.cat([site.view.to_matrix(program.weights[site.weight]).float() for site in self.sites])


def input_groups(program: Program, context: PassContext) -> list[InputGroup]:
    """The selected products by what they read; skipped products go on reading the value as it is."""
    groups: dict[tuple[str, str], InputGroup] = {}
    for site in context.sites(program):
        inputs = {(use.entry, use.input.name) for use in site.uses if isinstance(use.input, fx.Node)}
        why = ""
        if any(use.operator not in ("linear", "matmul") for use in site.uses) or program.weights[site.weight].ndim != 2:
            why = "only matrix products are smoothed"
        elif len(inputs) != 1:
            why = "its weight meets several values"
        elif program.grid(site.weight) is not None:
            why = "its weight is rounded already"
        if why:
            context.skip(site.weight, why, site.location)
            continue
        use = site.uses[0]
        group = groups.setdefault(inputs.pop(), InputGroup(use.entry, use.input))
        group.nodes += [use.node for use in site.uses]
        group.sites.append(site)
    return list(groups.values())


def multiply(store: Store, group: InputGroup, factor: Tensor) -> None:
    """Multiply the value by the factors where the group's products read it, and divide their columns.

    Args:
        store: the program's weights; the program is edited.
        group: the products.
        factor: `[channels]`, positive.
    """
    program, wide = store.program, factor.double()
    first = next(node for node in program.entries[group.entry].graph.nodes if node in group.nodes)
    name = group.sites[0].weight.removesuffix(".weight") + "_smoothing"
    stored = program.add_weight(name, wide.to(group.x.meta["val"].dtype), first)
    store.context.wide[str(stored.target)] = wide
    smoothed = program.entries[group.entry].call(aten.mul.Tensor, group.x, stored, before=first)
    for node in group.nodes:
        node.replace_input_with(group.x, smoothed)
    for site in group.sites:
        old = store[site.weight]
        store.put(site.weight, site.view.from_matrix(site.view.to_matrix(old) / wide, old.shape))
