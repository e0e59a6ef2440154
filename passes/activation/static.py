"""Static activation quantization: scales and zero points are fixed from calibration data."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import fx

from sparc import codes
from sparc.analysis.sites import Use, find_sites
from sparc.contract import Approximate
from sparc.diag import PassError
from sparc.encoding.int_grid import IntGrid
from sparc.pass_base import Pass, PassContext, Stage
from sparc.passes.activation.bias import fit_bias_step
from sparc.passes.activation.insert import PER_TENSOR, add_params, insert_static
from sparc.passes.activation.ranges import Range, entropy_range, mse_range, percentile_range
from sparc.passes.activation.regions import values_to_quantize
from sparc.program import Program

Method = Literal["minmax", "percentile", "entropy", "mse"]


@dataclass(frozen=True)
class CalibrateActivations(Pass):
    """x => decode(quantize(x, [scale, zero])), 8 bits, one constant scale and zero point for each value x.

    What is quantized: the inputs of products (convolutions, linears) whose weights are rounded to 8 bits, the outputs
    of such convolutions, and what adds, poolings, concatenations and the like between them write, so that the whole
    stretch runs on integers (`sparc.passes.activation.regions`). Each value is quantized once, before reshapes,
    max-poolings, zero padding and what else only moves elements: quantizing again behind them would change nothing.

    Args:
        method: how the range is chosen: `minmax` (all values seen), `percentile`, `entropy` (least divergence of the
            histogram) or `mse` (least squared error of rounding and clipping).
        percentile: the share of values inside the range, in per cent.
        floor: a product whose signal-to-noise ratio in decibels falls below gets its own input back, with a remark.
    """

    name: ClassVar[str] = "calibrate_activations"
    stage: ClassVar[Stage] = Stage.ACTIVATION
    needs: ClassVar[frozenset[str]] = frozenset({"histogram"})

    method: Method = "mse"
    percentile: float = 99.99
    floor: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 50 <= self.percentile <= 100:
            raise PassError(codes.BAD_OPTION, f"percentile={self.percentile!r}", hint="a number from 50 to 100")

    @property
    def contract(self) -> Approximate:
        """The signal-to-noise ratio of everything that reads a quantized value is measured, and held to the floor."""
        return Approximate("snr_db", self.floor)

    def watches(self, program: Program, context: PassContext) -> Iterator[tuple[fx.Node, str]]:
        """Histograms of the values of this block that will be quantized."""
        for _, value in self._values(program, context):
            yield value, "histogram"

    def run(self, program: Program, context: PassContext) -> None:
        """Quantize the values of this block."""
        for name, value in self._values(program, context):
            found = self._range(value, context)
            if found is None:
                context.skip(value, "no calibration data reached it")
            elif context.edit():
                _quantize(program, name, value, found)
        for use in self._products(program, context):
            if context.block is None or use.node.meta.get("block", 0) == context.block:
                fit_bias_step(program, use)

    def _range(self, value: fx.Node, context: PassContext) -> Range | None:
        seen = context.statistics(value, "histogram") if context.statistics is not None else None
        if seen is None:
            return None
        low, high = min(0.0, seen.least), max(0.0, seen.greatest)
        if self.method == "minmax":
            return low, high
        if self.method == "percentile":
            chosen = percentile_range(seen.counts, seen.low, seen.high, self.percentile)
        else:
            chosen = (mse_range if self.method == "mse" else entropy_range)(seen.counts, seen.low, seen.high)
        return max(low, chosen[0]), min(high, chosen[1])

    def _values(self, program: Program, context: PassContext) -> Iterator[tuple[str, fx.Node]]:
        products = self._products(program, context)
        for name, entry in program.entries.items():
            chosen = {use.node for use in products if use.entry == name}
            for value in values_to_quantize(entry.graph, chosen):
                if context.block is None or value.meta.get("block", 0) == context.block:
                    yield name, value

    def _products(self, program: Program, context: PassContext) -> list[Use]:
        """Every use of the selected weights, in whatever block."""
        found: list[Use] = []
        for site in find_sites(program)[0]:
            if site.encoded or not context.selects(site) or site.operator == "embedding":
                continue
            why = why_no_integer_product(program, site.weight, site.operator)
            if why:
                context.skip(site.weight, why, site.location)
                continue
            found += [use for use in site.uses if isinstance(use.input, fx.Node) and use.input.op != "get_attr"]
        return found


def why_no_integer_product(program: Program, weight: str, kind: str) -> str | None:
    """Why a weight cannot be multiplied with 8-bit activations in integers; None when it can.

    Args:
        program: the program.
        weight: the weight's name.
        kind: the operator type of its site.
    """
    if kind not in ("linear", "matmul", "conv"):
        return f"no integer product exists for {kind}"
    grid = program.grid(weight)
    spec = grid.spec if grid is not None else None
    if not isinstance(spec, IntGrid):
        return "its weight is not rounded to integers"
    if isinstance(spec.group, int) or spec.bits != 8 or spec.zero != "integer":
        return f"integer products need 8-bit weights with a scale per row at most, and its grid is {spec}"
    if kind == "conv" and not spec.symmetric:
        return f"integer convolutions need a symmetric grid, and its grid is {spec}"
    return None


def static_params(bounds: Range) -> tuple[float, int]:
    """Scale and zero point of the 8-bit grid over a range; 1 and 0 where calibration saw nothing but zeros."""
    if bounds[0] == bounds[1] == 0:
        return 1.0, 0
    low, high = (torch.tensor([bound], dtype=torch.float32) for bound in bounds)
    tensors = PER_TENSOR.from_range(low, high).tensors
    return float(tensors["scale"]), int(tensors["zero"])


def _quantize(program: Program, name: str, value: fx.Node, bounds: Range) -> None:
    entry = program.entries[name]
    users = list(value.users)
    scale, zero = static_params(bounds)
    module = value.meta.get("module", "")
    params = add_params(program, f"{module}.{value.name}" if module else value.name, scale, zero, value)
    positions = {node: index for index, node in enumerate(entry.graph.nodes)}
    before = min(users, key=positions.__getitem__)
    decoded = insert_static(entry, value, params, PER_TENSOR, before, like=value)
    for user in users:
        user.replace_input_with(value, decoded)
