"""Products with a batch of matrices, in Triton's interpreter, against float64; sizes are odd, so there are tails."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import sparc
from sparc.artifact import Artifact
from sparc.codegen.triton.checking import random_operand, random_value
from sparc.codegen.triton.choice import ByCost
from sparc.codegen.triton.cubin import report, violations
from sparc.codegen.triton.decoding import decoding_grid, generate_decoding
from sparc.codegen.triton.generate import generate
from sparc.codegen.triton.interpret import interpret
from sparc.codegen.triton.launch import interpret_problem, make_scratch, scratch_sizes
from sparc.codegen.triton.lowerings import find_lowering
from sparc.codegen.triton.operator import SiteTensors
from sparc.codegen.triton.operators import launch
from sparc.codegen.triton.prior import at, candidates, seconds
from sparc.codegen.triton.problem import Access, Configuration, Epilogue, EpilogueInput, Problem, Prologue
from sparc.codegen.triton.regimes import regimes
from sparc.codegen.triton.site_weight import SiteWeight
from sparc.codegen.triton.sites import Site
from sparc.codegen.triton.sites import buffers as site_buffers
from sparc.codegen.triton.tiles import WeightLowering
from sparc.codegen.triton.tuning import Tuner, TuningCache
from sparc.codegen.triton.weights.integer import IntegerWeight
from sparc.cost import device_of
from sparc.diag import Diagnostics, SparcError
from sparc.encoding.base import Encoding
from sparc.encoding.binary_code import BinaryCode
from sparc.encoding.blocks import Blocks
from sparc.encoding.codebook import Codebook
from sparc.encoding.dense import Dense
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.microscaling import MXFP4, NVFP4
from sparc.encoding.nm import NM
from sparc.encoding.view import WeightView
from sparc.passes.activation.dynamic import QuantizeActivations
from sparc.passes.encode import Encode
from sparc.passes.recipes import prepare
from sparc.passes.round import Round
from tests.codegen.triton.models import Experts
from tests.codegen.triton.running import TOLERANCE, Case, fitting, quantized, relative
from tests.codegen.triton.test_target import QUICK, compiled, emission, sites
from tests.codegen.triton.test_target import agrees as agrees_with_program

BATCH, ROWS, COLUMNS = 3, 45, 200
SLOW = pytest.mark.slow
ENCODINGS: list[Encoding] = [
    Dense("float16"),
    IntGrid(4, group=32, symmetric=False),
    IntGrid(8),
    IntGrid(8, group="tensor"),
    IntGrid(3, group=64),
    Codebook("nf4"),
    Codebook("kmeans", 3, 48),
    MXFP4(),
    NVFP4(),
    BinaryCode(2, 48),
    NM(2, 4, of=IntGrid(4, group=64)),
    NM(2, 4, of=BinaryCode(2, 64)),
    Blocks(size=(32, 64), of=IntGrid(8)),
]
REGIMES = {
    "gemv": (Configuration(1, 16), 1),
    "gemv split": (Configuration(1, 16, split=3), 1),
    "skinny": (Configuration(16, 32), 3),
    "skinny split": (Configuration(16, 32, split=2), 17),
    "gemm": (Configuration(64, 32), 70),
}
QUICKLY = {
    **{str(encoding): ("gemv split", "skinny split", "gemm") for encoding in ENCODINGS},
    **{str(encoding): tuple(REGIMES) for encoding in ENCODINGS[:2]},  # whole sums beside those that are split
    str(BinaryCode(2, 48)): ("skinny split",),  # the interpreter is slow at these
    str(NM(2, 4, of=BinaryCode(2, 64))): ("gemv split",),
}
CASES = [
    pytest.param(encoding, regime, id=f"{encoding}-{regime}", marks=() if regime in QUICKLY[str(encoding)] else SLOW)
    for encoding in ENCODINGS
    for regime in REGIMES
]


@functools.cache
def make_batch(encoding: Encoding, seed: int = 0) -> Case:
    """Random matrices `[BATCH, ROWS, COLUMNS]` of different sizes, rounded and encoded; the case's parts are those of
    one matrix, its dense weight is the batch.
    """
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor([1.0, 0.1, 3.0]).reshape(BATCH, 1, 1)
    weight = size * torch.randn(BATCH, ROWS, COLUMNS, generator=generator)
    grid = encoding.fit(weight)
    parts = encoding.encode(encoding.round(weight, grid), grid)
    source = fx.Graph().placeholder("weight")
    site = SiteWeight(("weight",), encoding, (BATCH, ROWS, COLUMNS), parts, source, WeightView("transposed"))
    lowering = find_lowering(encoding, site.matrix_shape, site.matrix_parts)
    assert isinstance(lowering, WeightLowering), lowering
    dense = encoding.decode(parts, (BATCH, ROWS, COLUMNS), torch.float32).double()
    return Case(encoding, lowering, dense, site.matrix_parts)


def buffers(case: Case) -> list[Tensor]:
    laid = case.lowering.layout(case.parts)
    return [laid[buffer.name] for buffer in case.lowering.buffers]


def run(cases: list[Case], configuration: Configuration, problem: Problem, x: Tensor, *operands: Tensor) -> Tensor:
    """The kernel's result `[BATCH, tokens, ROWS]`; what it leaves unwritten is NaN."""
    y = torch.full((BATCH, x.shape[-2], ROWS), torch.nan, dtype=torch.float16)
    tensors = [x, *(buffer for case in cases for buffer in buffers(case)), *operands]
    interpret_problem(problem, fitting(cases[0], configuration), tensors, y, x.shape[-2])
    return y.double()


def activation(tokens: int, *, shared: bool = False) -> Tensor:
    shape = (tokens, COLUMNS) if shared else (BATCH, tokens, COLUMNS)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).half()


def agrees(found: Tensor, exact: Tensor, tolerance: float = TOLERANCE["float16"]) -> bool:
    """Matrix by matrix, since their sizes differ."""
    return all(relative(a, b) < tolerance for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize(("encoding", "regime"), CASES)
def test_products_are_right(encoding: Encoding, regime: str) -> None:
    (configuration, tokens), case = REGIMES[regime], make_batch(encoding)
    x = activation(tokens)
    found = run([case], configuration, Problem((case.lowering,), "float16", access=Access("batched", batch=BATCH)), x)
    assert agrees(found, x.double() @ case.dense.mT)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_decoded_weights_are_right(encoding: Encoding) -> None:
    case = make_batch(encoding)
    dense = torch.zeros(BATCH * ROWS, COLUMNS, dtype=torch.float32)
    kernel = generate_decoding(case.lowering, "float32", BATCH)
    interpret(kernel, decoding_grid(case.lowering, BATCH), [*buffers(case), dense])
    assert agrees(dense.view(BATCH, ROWS, COLUMNS).double(), case.dense, 1e-5)


def test_blocks_as_many_and_as_high_as_matrices_stay_blocks() -> None:
    encoding = Blocks(size=(32, 64), of=IntGrid(8))
    weight = torch.randn(BATCH, 32, 64, generator=torch.Generator().manual_seed(0))
    grid = encoding.fit_masked(weight, torch.ones(BATCH, 1, 1, dtype=torch.bool))
    parts = encoding.encode(encoding.round(weight, grid), grid)
    assert parts["codes"].shape == (BATCH, 32, 64)
    site = SiteWeight(("w",), encoding, (BATCH, 32, 64), parts, fx.Graph().placeholder("w"), WeightView("transposed"))
    assert site.matrix_parts["codes"].shape == (BATCH, 32, 64)
    assert site.matrix_parts["scale"].shape == (BATCH * 32, 1)


def test_a_batch_may_share_one_activation() -> None:
    case, x = make_batch(IntGrid(4, group=32)), activation(17, shared=True)
    problem = Problem((case.lowering,), "float16", access=Access("batched", batch=BATCH, shared=True))
    for configuration, tokens in (REGIMES["gemv"], REGIMES["skinny split"], REGIMES["gemm"]):
        x = activation(tokens, shared=True)
        assert agrees(run([case], configuration, problem, x), x.double() @ case.dense.mT)


def test_split_sums_are_added_with_atomics() -> None:
    case, x = make_batch(IntGrid(8)), activation(17)
    problem = Problem((case.lowering,), "float16", access=Access("batched", batch=BATCH))
    found = run([case], Configuration(16, 32, split=2, deterministic=False), problem, x)
    assert agrees(found, x.double() @ case.dense.mT)


OPERANDS: dict[Any, tuple[int, ...]] = {"feature": (BATCH, 1, ROWS), "token": (BATCH, -1, 1), "full": (BATCH, -1, ROWS)}
AFTER: dict[Any, Callable[..., Tensor]] = {
    "feature": lambda y, other, value: y + value,
    "token": lambda y, other, value: y * value + other,
    "full": lambda y, other, value: y * other + value,
}
LINES = {
    "feature": "product + v_value",
    "token": "product * v_value + product_1",
    "full": "product * product_1 + v_value",
}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("regime", ["gemv split", "skinny split", "gemm"])
@pytest.mark.parametrize("kind", OPERANDS)
def test_epilogues_are_right(kind: Any, regime: str, shared: bool) -> None:
    (configuration, tokens), cases = REGIMES[regime], [make_batch(IntGrid(8), seed) for seed in (0, 1)]
    x = activation(tokens, shared=shared)
    shape = [tokens if size == -1 else size for size in OPERANDS[kind]]
    value = torch.randn(shape, generator=torch.Generator().manual_seed(2)).half()
    after = Epilogue((EpilogueInput("v", "float16", kind),), (), LINES[kind])
    access = Access("batched", batch=BATCH, shared=shared)
    problem = Problem(tuple(case.lowering for case in cases), "float16", epilogue=after, access=access)
    exact = AFTER[kind](*(x.double() @ case.dense.mT for case in cases), value.double())
    assert agrees(run(cases, configuration, problem, x, value), exact)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("regime", ["skinny split", "gemm"])
def test_activations_are_quantized_token_by_token(regime: str, shared: bool) -> None:
    (configuration, tokens), case = REGIMES[regime], make_batch(IntGrid(8))
    x = activation(tokens, shared=shared)
    access = Access("batched", batch=BATCH, shared=shared)
    problem = Problem((case.lowering,), "float16", Prologue(quantized="int8"), access=access)
    found = run([case], configuration, problem, x)
    assert agrees(found, quantized(x, "int8") @ case.dense.mT)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("regime", ["gemv split", "skinny split"])
def test_a_normalisation_reads_its_own_tokens(regime: str, shared: bool) -> None:
    (configuration, tokens), case = REGIMES[regime], make_batch(IntGrid(8))
    x = activation(tokens, shared=shared) * torch.arange(1, tokens + 1).unsqueeze(-1)
    access = Access("batched", batch=BATCH, shared=shared)
    problem = Problem((case.lowering,), "float16", Prologue("rms_norm", 1e-3), access=access)
    normalised = nn.functional.rms_norm(x.double(), (COLUMNS,), eps=1e-3).half().double()
    assert agrees(run([case], configuration, problem, x), normalised @ case.dense.mT)


# experts of a model ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def experts() -> Artifact:
    return compiled(Experts)


def test_stacked_experts_are_two_kernels_with_all_that_surrounds_them(experts: Artifact) -> None:
    found = sites(experts)
    assert list(found) == ["router", "gate+up", "down"]
    assert [each.problem.access.shared for each in found.values()] == [False, True, False]
    assert found["gate+up"].result.target is found["down"].result.target is torch.ops.aten.mul.Tensor
    kinds = [each.kind for each in found["down"].problem.epilogue.inputs]
    assert kinds == ["feature", "token"]
    uses = [emission(experts).kernels[name] for name in ("gate", "up", "down")]
    assert all(use.operator.startswith("product") for use in uses)
    half_precision = 2 * 3 * 3 * 48 * 40
    assert sum(use.resident_bytes for use in uses) < half_precision / 2


@pytest.mark.parametrize("length", [1, 2, 19])
def test_stacked_experts_compute_what_their_program_computes(experts: Artifact, length: int) -> None:
    agrees_with_program(experts, torch.randn(2, length, 48).half())


def test_stacked_experts_with_activations_in_8_bits() -> None:
    steps = (*prepare(), Round(IntGrid(8)), QuantizeActivations(mode="token"), Encode())
    artifact = compiled(Experts, steps)
    assert [each.problem.access.shared for each in sites(artifact).values()] == [False, True, False]
    assert all(each.problem.product == "int8" for each in sites(artifact).values())
    agrees_with_program(artifact, torch.randn(2, 9, 48).half(), tolerance=2e-2)  # a flipped rounding


def test_many_tokens_are_left_to_torch_with_decoded_weights(experts: Artifact) -> None:
    operators = emission(experts).lowered["forward"].operators
    for operator in operators.values():
        assert operator.regimes[-1].configuration is None
        x = random_value(operator.site.x, torch.Generator().manual_seed(0), 7)
        operands = [random_operand(each, torch.Generator(), x, operator) for each in operator.site.operands]
        given = SiteTensors(site_buffers(operator.site), operands)
        scratch = make_scratch(operator.scratch_sizes(7))
        by_kernel, by_torch = (operator.run(x, given, scratch, launch, index) for index in (0, -1))
        assert relative(by_kernel.double(), by_torch.double()) < TOLERANCE["float16"]


class Product(nn.Module):
    """A product with a batch of matrices, and what is done to it."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.w, self.b = nn.Parameter(torch.randn(3, 48, 40)), nn.Parameter(torch.randn(40))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.w, self.b)


def compile_product(function: Callable[..., Tensor], x: Tensor) -> Artifact:
    torch.manual_seed(0)
    model = Product(function).half().eval()
    artifact = sparc.compile(model, (x,), recipe="w8", target="cuda:sm_90", options=QUICK)
    agrees_with_program(artifact, x)
    return artifact


def test_a_bias_of_all_matrices_is_added_by_torch() -> None:
    """What an epilogue reads for features belongs to one matrix."""
    artifact = compile_product(lambda x, w, b: torch.bmm(x, w) + b, torch.randn(3, 5, 48).half())
    assert sites(artifact)["w"].problem.epilogue.inputs == ()


@pytest.mark.parametrize("shape", [(5, 48), (1, 5, 48), (3, 5, 48)])
def test_a_product_broadcasts_its_activation(shape: tuple[int, ...]) -> None:
    artifact = compile_product(lambda x, w, b: torch.matmul(x, w), torch.randn(shape).half())
    assert sites(artifact)["w"].problem.access.shared == (shape != (3, 5, 48))


@pytest.mark.parametrize("shape", [(2, 1, 5, 48), (48,)])
def test_other_axes_are_left_to_torch(shape: tuple[int, ...]) -> None:
    artifact = compile_product(lambda x, w, b: torch.matmul(x, w), torch.randn(shape).half())
    assert sites(artifact) == {}
    assert "other axes than a batch of matrices" in emission(artifact).kernels["w"].note


def test_outputs_beyond_32_bit_indices_are_refused(experts: Artifact) -> None:
    operator = emission(experts).lowered["forward"].operators["mul"]
    huge = torch.empty(1, device="meta", dtype=torch.float16).expand(1 << 25, 48)
    with pytest.raises(SparcError) as error:
        operator.run(huge, SiteTensors((), ()), make_scratch((0, 0)), lambda *_: pytest.fail("it was launched"), 0)
    assert error.value.code == "SPARC412"


def test_an_artifact_with_stacked_experts_is_saved_and_loaded(experts: Artifact, tmp_path: Path) -> None:
    experts.save(tmp_path / "saved")
    loaded = sparc.load(tmp_path / "saved")
    x = torch.randn(2, 5, 48).half()
    assert torch.equal(loaded(x), experts(x))
    assert loaded.sources == experts.sources


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("tokens", [1, 16])
def test_a_batch_costs_no_registers_or_instructions(tokens: int, capability: int) -> None:
    encoding = IntGrid(4, group=128, scale_dtype="float16")
    weight = torch.randn(512, 2048, generator=torch.Generator().manual_seed(0))
    grid = encoding.fit(weight)
    lowering = IntegerWeight(encoding, (512, 2048), encoding.encode(encoding.round(weight, grid), grid))
    problem = Problem((lowering,), "float16", access=Access("batched", batch=4))
    chosen = candidates(problem, device_of(capability), tokens)[0].configuration
    kernel = generate(problem, chosen)
    assert violations(kernel, report(kernel, capability)) == []


def test_the_model_counts_every_matrix() -> None:
    """A batch takes the time of one matrix with all its rows, but for the activation."""
    case, device = make_batch(IntGrid(8)), device_of(90)
    own, shared = (Problem((case.lowering,), "float16", access=Access("batched", batch=BATCH, shared=each))
                   for each in (False, True))  # fmt: skip
    one = replace(own, access=Access())
    configuration = Configuration(16, 64, 64)
    times = [at(seconds(each, configuration, device), 1 << 14) for each in (one, shared, own)]
    assert times[0] <= times[1] < times[2]
    assert own.tiles_of_rows(32) == 6
    assert one.tiles_of_rows(32) == 5


def test_workspaces_of_a_batch_stay_within_bounds() -> None:
    rows, columns, batch = 64, 512, 16
    encoding = IntGrid(8)
    grid = encoding.fit(torch.ones(batch * rows, columns))
    parts = encoding.encode(torch.ones(batch * rows, columns), grid)
    lowering = IntegerWeight(encoding, (batch * rows, columns), parts)
    problem = Problem((lowering,), "float16", access=Access("batched", batch=batch))

    def measure(configuration: Configuration | None, tokens: int) -> float:
        return 1e-6 if configuration is not None and configuration.split > 1 else 1.0

    found = regimes(problem, device_of(90), measure=measure)
    bounded = [each for each in found if each.configuration is not None]
    assert any(each.configuration.split > 1 for each in bounded)  # type: ignore[union-attr]
    for each in bounded:
        assert each.limit is not None
        assert scratch_sizes(problem, each.configuration, each.limit)[0] <= 1 << 26  # type: ignore[arg-type]


def test_candidates_for_a_batch_are_timed(experts: Artifact) -> None:
    asked = []

    class Watched(Tuner):
        def seconds(self, site: Site, configuration: Configuration | None, tokens: int) -> float:
            asked.append(site.names)
            return 1.0

    tuner = Watched(TuningCache(Path(), "none"), Diagnostics())
    ByCost(device_of(90), tuner=tuner)(sites(experts)["down"], 1, 64)
    assert ("down",) in asked
