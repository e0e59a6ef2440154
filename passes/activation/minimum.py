"""Float minima as further columns of codes, so that a whole weight can meet quantized activations."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from sparc.analysis.sites import Site
from sparc.contract import Approximate
from sparc.encoding.grid import Grid
from sparc.encoding.int_grid import IntGrid
from sparc.pass_base import Pass, PassContext, Stage
from sparc.passes.activation.dynamic import PRODUCT_GROUPS, is_product
from sparc.program import Entry, Program

aten = torch.ops.aten

_DIGITS = {4: 3, 8: 2}  # that hold a remainder to 1 / 3000 of its row's largest, or better
_Key = tuple[str, fx.Node, int, int]


@dataclass(frozen=True)
class SplitMinimum(Pass):
    """linear(x, s * c + m) => linear([x, sums of x over groups], [s * (c - z), m + s * z]): a weight whose grid has a
    float minimum per group, in entries with a cache.

    Codes and scales stay; z is the integer zero point next to the minimum, so that what rounding x changes is not
    multiplied by more than it must be. What is left of the minimum, half a scale at most as a rule, is written as codes
    too: digits in further columns. So one product of integers does it all. Products of one x share the sums.
    """

    name: ClassVar[str] = "split_minimum"
    stage: ClassVar[Stage] = Stage.ACTIVATION

    @property
    def contract(self) -> Approximate:
        """Remainders are rounded to their last digit: measured."""
        return Approximate("snr_db", None)

    def run(self, program: Program, context: PassContext) -> None:
        """Split every selected weight."""
        longer: dict[_Key, fx.Node] = {}
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
                _split(program, site, grid, longer)


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


def _split(program: Program, site: Site, grid: Grid, longer: dict[_Key, fx.Node]) -> None:
    old: Any = grid.spec
    spec = IntGrid(old.bits, old.group, symmetric=False, scale_dtype=old.scale_dtype)
    scale, minimum = grid.tensors["scale"], grid.tensors["minimum"]
    weight = program.weights[site.weight]
    codes = old.codes(site.view.to_matrix(weight), grid.tensors)
    zero = spec.stored_zero(-minimum.float() / scale.float())
    behind = write_digits(minimum.double() + scale.double() * zero.double(), spec)
    tensors = {
        "scale": torch.cat([scale, behind.scale], dim=1),
        "zero": torch.cat([zero, torch.full_like(behind.scale, behind.zero, dtype=zero.dtype)], dim=1),
    }
    values = spec.values(torch.cat([codes, behind.codes], dim=1), tensors, weight.dtype)
    program.set_weight(site.weight, values, Grid(spec, tensors, grid.view))
    for use in site.uses:
        key = use.entry, use.input, spec.bits, int(old.group)
        if key not in longer:
            longer[key] = _with_sums(program, program.entries[use.entry], use.input, behind.factors, spec)
        use.node.update_arg(0, longer[key])


def _with_sums(program: Program, entry: Entry, x: fx.Node, factors: Tensor, spec: IntGrid) -> fx.Node:
    """`[x, factors @ sums of x over groups]`."""
    before = next(node for node in entry.graph.nodes if node in x.users)
    columns, groups = factors.shape
    apart = entry.call(aten.unflatten.int, x, -1, [groups, spec.group], before=before)
    sums = entry.call(aten.sum.dim_IntList, apart, [-1], before=before)
    name = f"digits_{spec.bits}_{groups}x{columns}"  # the same for every weight of these sizes
    if name not in program.weights:
        program.add_weight(name, factors, like=before)
    spread = entry.call(aten.linear.default, sums, program.weight_node(entry, name), before=before)
    return entry.call(aten.cat.default, [x, spread], -1, before=before)


@dataclass(frozen=True)
class Digits:
    """Numbers `[out, groups]` as codes `(code - zero) * scale`: `decode @ factors` gives them back.

    Args:
        codes: `[out, columns]`, uint8, the most significant digits of all groups first.
        scale: `[out, columns / group]`.
        zero: the code of 0.
        factors: float32 `[columns, groups]`. Columns that share a scale, that of the first of them, may hold digits of
            two places: the factor makes up for it.
    """

    codes: Tensor
    scale: Tensor
    zero: int
    factors: Tensor


def write_digits(numbers: Tensor, spec: IntGrid) -> Digits:
    """Write numbers, float64 `[out, groups]`, in as many digits as codes of so many bits need."""
    out, groups = numbers.shape
    group, base, digits = int(spec.group), spec.high, _DIGITS[spec.bits]
    zero = (base + 1) // 2
    columns = -(-groups * digits // group) * group
    digit = torch.arange(columns) // groups
    first = digit[::group]
    largest = numbers.abs().amax(1, keepdim=True)
    scale = spec.stored_scale(2 * largest / base * float(base) ** -first)  # digits reach half a base to either side
    factor = float(base) ** (first.repeat_interleave(group) - digit)
    factors = torch.zeros(columns, groups)
    codes = torch.full((out, columns), zero, dtype=spec.code_dtype)
    for start in range(0, groups * digits, groups):
        held = torch.arange(start, start + groups)
        unit = scale.double()[:, held // group] * factor[held]
        written = (numbers / unit).round().clamp(-zero, base - zero)
        codes[:, held] = (written + zero).to(codes.dtype)
        factors[held] = torch.diag(factor[held])
        numbers = numbers - written * unit
    return Digits(codes, scale, zero, factors)
