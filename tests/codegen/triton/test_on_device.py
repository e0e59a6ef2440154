"""What only a GPU can show; `make test-gpu` runs it there."""

from dataclasses import replace

import pytest
import torch

import sparc
from sparc.codegen.triton.generate import generate
from sparc.codegen.triton.launch import arguments, grid, make_scratch, scratch_sizes
from sparc.codegen.triton.operators import launch
from sparc.codegen.triton.problem import Configuration, Epilogue, Problem
from sparc.verify import relative_error
from tests.codegen.triton.models import Convolutions, Encoder, LanguageModel, build, example
from tests.codegen.triton.running import TOLERANCE, Case, fitting, make_case, relative
from tests.codegen.triton.test_products import ENCODINGS, REGIMES, LoweringType
from tests.codegen.triton.test_target import DYNAMIC

pytestmark = pytest.mark.gpu


def on_device(case: Case, configuration: Configuration, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's result on the GPU, of its second launch, and the exact one."""
    chosen = fitting(case, configuration)
    problem = Problem((case.lowering,), "float16", epilogue=Epilogue())
    x = torch.randn(tokens, case.lowering.columns, generator=torch.Generator().manual_seed(1)).half()
    y = torch.full((tokens, case.lowering.rows), torch.nan, dtype=torch.float16, device="cuda")
    laid = case.lowering.layout(case.parts)
    tensors = [x.cuda(), *(laid[buffer.name].cuda() for buffer in case.lowering.buffers)]
    scratch = make_scratch(scratch_sizes(problem, chosen, tokens), "cuda")
    for _ in range(2):
        launch(generate(problem, chosen), grid(problem, chosen, tokens), arguments(chosen, tensors, y, tokens, scratch))
    assert not scratch.counters.any()
    return y.double().cpu(), x.double() @ case.dense.T


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize(("encoding", "lowering"), ENCODINGS, ids=[str(each[0]) for each in ENCODINGS])
def test_products(encoding: object, lowering: LoweringType, regime: str) -> None:
    configuration, tokens = REGIMES[regime]
    found, exact = on_device(make_case(encoding, lowering, 45, 200), configuration, tokens)  # type: ignore[arg-type]
    assert relative(found, exact) < TOLERANCE["float16"]


@pytest.mark.parametrize("regime", ["gemv split", "skinny split"])
def test_split_sums_are_the_same_every_time(regime: str) -> None:
    encoding, lowering = ENCODINGS[2]
    configuration, tokens = REGIMES[regime]
    case = make_case(encoding, lowering, 1024, 4096)
    results = [on_device(case, replace(configuration, block_rows=64), tokens)[0] for _ in range(5)]
    assert all(torch.equal(results[0], each) for each in results[1:])


@pytest.mark.parametrize("kind", [LanguageModel, Encoder, Convolutions])
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_models(kind: type[torch.nn.Module], dynamic: bool) -> None:
    model = build(kind)
    inputs = example(model)
    artifact = sparc.compile(model, inputs, recipe="w4", target="cuda", dynamic=DYNAMIC[kind] if dynamic else None)
    expected = artifact.program.run_flat(list(inputs))[0]
    for _ in range(2):
        found = artifact.run_flat([tensor.cuda() for tensor in inputs])[0]
        assert relative_error(expected, found.cpu()) < 5e-3


def test_inputs_on_the_cpu_are_refused() -> None:
    model = build(Encoder)
    artifact = sparc.compile(model, example(model), recipe="w8", target="cuda", measure=False)
    with pytest.raises(sparc.diag.SparcError) as error:
        artifact(*example(model))
    assert error.value.code == "SPARC506"
