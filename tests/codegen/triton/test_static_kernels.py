"""Kernels that multiply the codes of activations on 8-bit grids with one scale, against exact sums of integers."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparc.codegen.triton.accept import fits
from sparc.codegen.triton.cubin import report, violations
from sparc.codegen.triton.generate import generate
from sparc.codegen.triton.kernel import Kernel
from sparc.codegen.triton.launch import interpret_problem
from sparc.codegen.triton.lowerings import find_lowering
from sparc.codegen.triton.prior import candidates
from sparc.codegen.triton.problem import Access, Configuration, Epilogue, EpilogueInput, Problem, Prologue, Window
from sparc.codegen.triton.tiles import WeightLowering
from sparc.codegen.triton.weights.integer import IntegerWeight
from sparc.cost import device_of
from sparc.encoding.blocks import Blocks
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.mask import MaskEncoding
from sparc.encoding.nm import NM
from tests.codegen.triton.running import TOLERANCE, Case, fitting, make_case, relative
from tests.codegen.triton.test_products import REGIMES

SCALE, ZERO = 0.037, 77
UNSIGNED = Prologue(dtype="float32", quantized="int8", codes="uint8")
SIGNED = Prologue(dtype="float32", quantized="int8", codes="int8")


# kernels ----------------------------------------------------------------------------------------------------------
def random_codes(shape: tuple[int, ...], prologue: Prologue) -> Tensor:
    limits = torch.iinfo(getattr(torch, prologue.codes))
    generator = torch.Generator().manual_seed(1)
    return torch.randint(limits.min, limits.max + 1, shape, generator=generator).to(getattr(torch, prologue.codes))


def meaning(codes: Tensor) -> Tensor:
    """What codes stand for, in float64."""
    zero = ZERO if codes.dtype == torch.uint8 else 0
    return (codes.double() - zero) * torch.tensor(SCALE).double()


def run(case: Case, problem: Problem, configuration: Configuration, codes: Tensor, y: Tensor, tokens: int) -> None:
    laid = case.lowering.layout(case.parts)
    held = [laid[buffer.name] for buffer in case.lowering.buffers]
    given = [torch.tensor(SCALE)]
    if problem.prologue.codes == "uint8":
        held.append(case.lowering.row_sums())
        given.append(torch.tensor(ZERO, dtype=torch.uint8))
    interpret_problem(problem, fitting(case, configuration), [codes, *held, *given], y, tokens)


def product(case: Case, prologue: Prologue, regime: str) -> tuple[Tensor, Tensor]:
    """The kernel's result and the exact one, of codes in rows."""
    configuration, tokens = REGIMES[regime]
    codes = random_codes((tokens, case.lowering.columns), prologue)
    y = torch.full((tokens, case.lowering.rows), torch.nan)
    problem = Problem((case.lowering,), "float32", prologue, Epilogue(dtype="float32"))
    run(case, problem, configuration, codes, y, tokens)
    return y.double(), meaning(codes) @ case.dense.T


@pytest.mark.parametrize("regime", ["gemv split", "skinny", "skinny split", "gemm"])
@pytest.mark.parametrize("prologue", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
def test_codes_in_rows_are_multiplied_exactly(prologue: Prologue, regime: str) -> None:
    found, exact = product(make_case(IntGrid(8), IntegerWeight, 45, 456), prologue, regime)
    assert relative(found, exact) < 1e-6


@pytest.mark.parametrize("regime", ["skinny split", "gemm"])
@pytest.mark.parametrize(
    "grid",
    [IntGrid(8, group="tensor"), IntGrid(8, group=64), IntGrid(4, symmetric=False), IntGrid(4, group=64)],
    ids=str,
)
def test_a_zero_point_is_taken_off_under_every_scale(grid: IntGrid, regime: str) -> None:
    found, exact = product(make_case(grid, IntegerWeight, 45, 200), UNSIGNED, regime)
    assert relative(found, exact) < TOLERANCE["float32"]


@pytest.mark.parametrize("encoding", [Blocks(size=(32, 64), of=IntGrid(8)), NM(2, 4, of=IntGrid(8))], ids=str)
def test_a_zero_point_is_taken_off_under_masks(encoding: MaskEncoding) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(70, 256, generator=generator)
    if isinstance(encoding, NM):
        mask = (torch.rand(70, 64, 4, generator=generator).argsort(-1) < 2).reshape(70, 256)
    else:
        mask = torch.rand(3, 4, generator=generator) < 0.5
    grid = encoding.fit_masked(weight, mask)
    parts = encoding.encode(encoding.round(weight, grid), grid)
    lowering = find_lowering(encoding, (70, 256), parts)
    assert isinstance(lowering, WeightLowering), lowering
    case = Case(encoding, lowering, encoding.decode(parts, (70, 256), torch.float32).double(), parts)
    found, exact = product(case, UNSIGNED, "skinny split")
    assert relative(found, exact) < TOLERANCE["float32"]


@pytest.mark.parametrize("prologue", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "padding"),
    [(6, (3, 3), 1, (1, 1)), (6, (3, 3), 2, (1, 1)), (16, (2, 2), 1, (1, 0)), (20, (1, 1), 1, (0, 0))],
)
def test_codes_of_images_are_multiplied_exactly(
    channels: int, kernel: tuple[int, int], stride: int, padding: tuple[int, int], prologue: Prologue
) -> None:
    """Around an image lies what stands for zero; columns that only the layout has, count for nothing."""
    columns = channels * kernel[0] * kernel[1]
    case = make_case(IntGrid(8), IntegerWeight, 20, columns)
    codes = random_codes((2, channels, 9, 11), prologue)
    exact = F.conv2d(meaning(codes), case.dense.view(20, channels, *kernel), None, stride, padding)
    output = (int(exact.shape[2]), int(exact.shape[3]))
    positions = output[0] * output[1]
    window = Window(channels, (9, 11), output, kernel, (stride, stride), padding)
    access = Access("channels", positions) if kernel == (1, 1) else Access("window", positions, window)
    problem = Problem((case.lowering,), "float32", prologue, Epilogue(dtype="float32"), access)
    y = torch.full(exact.shape, torch.nan)
    run(case, problem, Configuration(16, 32), codes, y, 2 * positions)
    assert relative(y.double(), exact) < 1e-6


# machine code -----------------------------------------------------------------------------------------------------
QUANTIZED = Epilogue(
    (EpilogueInput("s", "float32", "scalar"), EpilogueInput("z", "uint8", "scalar")),
    ("a = tl.div_rn(product, s_value) + 12582912.0 - 12582912.0 + z_value",),
    "tl.minimum(tl.maximum(a, 0.0), 255.0)",
    "uint8",
)


def first(problem: Problem, tokens: int, capability: int) -> Kernel:
    kernels = (generate(problem, each.configuration) for each in candidates(problem, device_of(capability), tokens))
    return next(kernel for kernel in kernels if fits(kernel, capability))


@pytest.mark.parametrize(("capability", "instruction"), [(80, "IMMA"), (90, "IGMMA")])
@pytest.mark.parametrize("access", ["rows", "window"])
def test_integers_are_multiplied_on_tensor_cores(access: str, capability: int, instruction: str) -> None:
    window = Window(128, (14, 14), (14, 14), (3, 3), (1, 1), (1, 1))
    where = Access() if access == "rows" else Access("window", 196, window)
    weight = make_case(IntGrid(8), IntegerWeight, 128, 1152 if access == "window" else 4096).lowering
    kernel = first(Problem((weight,), "float32", UNSIGNED, QUANTIZED, where), 64, capability)
    found = report(kernel, capability)
    assert found.tensor_core[instruction] > 0
    assert not any(name.startswith(("I2F", "F2I")) for name in found.instructions)
    assert violations(kernel, found) == []


@pytest.mark.parametrize("columns", [16, 27, 144])
def test_few_columns_fill_products_of_integers(columns: int) -> None:
    weight = make_case(IntGrid(8), IntegerWeight, 20, columns).lowering
    assert first(Problem((weight,), "float32", UNSIGNED, QUANTIZED), 16, 90)
