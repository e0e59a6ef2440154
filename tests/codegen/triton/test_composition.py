"""Weights that pruning and rounding made together, in interpreted kernels, against the program's values."""

import pytest
import torch
from torch import nn

from sparc.capture import capture
from sparc.codegen.triton.lowerings import find_lowering
from sparc.codegen.triton.tiles import WeightLowering
from sparc.driver import Driver
from sparc.encoding.blocks import Blocks
from sparc.encoding.grid import Grid
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.nm import NM
from sparc.encoding.unstructured import Unstructured
from sparc.pass_base import Pass, Samples
from sparc.passes.equalize.awq import Awq
from sparc.passes.prune import Prune
from sparc.passes.round import Compensate, Round
from tests.codegen.triton.running import TOLERANCE, Case, relative, run_product
from tests.codegen.triton.test_products import REGIMES

GROUPS = IntGrid(4, group=16)
MINIMUM = IntGrid(4, group=16, symmetric=False, zero="minimum")
ROWS, COLUMNS = 64, 128

SERVED: dict[str, list[Pass]] = {
    "a mask and codes in one sweep": [Round(NM(2, 4, of=GROUPS), method="gptq")],
    "a swept mask, compensated codes": [Prune(NM(2, 4), method="sparsegpt"), Round(GROUPS), Compensate()],
    "a mask of one half, asymmetric codes": [Prune(NM(2, 4)), Round(IntGrid(4, group=16, symmetric=False))],
    "blocks and swept codes": [Prune(Blocks((16, 64)), density=0.5), Round(IntGrid(8), method="gptq")],
    "scales and minima": [Awq(MINIMUM), Round(MINIMUM, method="gptq")],
}
DENSE: dict[str, list[Pass]] = {
    "any elements": [Prune(Unstructured(), density=0.5), Round(GROUPS)],
    "whole rows": [Prune(Blocks((1, "all")), density=0.5, method="sparsegpt"), Round(IntGrid(8))],
}


def compressed(steps: list[Pass]) -> tuple[torch.Tensor, Grid]:
    """A weight `[64, 128]` in half precision, and the grid that it lies on."""
    torch.manual_seed(0)
    given = [[torch.randn(64, COLUMNS).half()] for _ in range(2)]
    program = capture(nn.Linear(COLUMNS, ROWS).half(), tuple(given[0]))
    driver = Driver(program, Samples({"forward": given[:1]}, {"forward": given[1:]}), verify="types")
    for step in steps:
        driver.run(step)
    grid = driver.program.grid("weight")
    assert grid is not None
    return driver.program.weights["weight"], grid


@pytest.mark.parametrize("name", SERVED)
def test_kernels_multiply_what_two_passes_made(name: str) -> None:
    weight, grid = compressed(SERVED[name])
    parts = grid.spec.encode(weight, grid)
    lowering = find_lowering(grid.spec, (ROWS, COLUMNS), parts)
    assert isinstance(lowering, WeightLowering), lowering
    assert lowering.accepts("float16") is None
    configuration, tokens = next(iter(REGIMES.values()))
    found, exact, _ = run_product(Case(grid.spec, lowering, weight.double(), parts), configuration, tokens)
    assert relative(found, exact) < TOLERANCE["float16"]


@pytest.mark.parametrize("name", DENSE)
def test_masks_that_no_kernel_skips_say_why(name: str) -> None:
    weight, grid = compressed(DENSE[name])
    found = find_lowering(grid.spec, (ROWS, COLUMNS), grid.spec.encode(weight, grid))
    assert found if isinstance(found, str) else found.accepts("float16")
