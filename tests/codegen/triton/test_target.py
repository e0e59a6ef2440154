"""The target `cuda` as a user meets it, without a GPU: kernels are judged as machine code and run in the
interpreter.
"""

import gc
import json
import weakref
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparc
from sparc.artifact import Artifact
from sparc.capture import capture_entries
from sparc.codegen.triton import chips
from sparc.codegen.triton.emission import TritonEmission
from sparc.codegen.triton.launch import make_scratch
from sparc.codegen.triton.operator import SiteTensors
from sparc.codegen.triton.target import TritonTarget
from sparc.diag import Diagnostics, SparcError
from sparc.encoding.int_grid import IntGrid
from sparc.passes.activation.dynamic import QuantizeActivations
from sparc.passes.encode import Encode
from sparc.passes.recipes import prepare
from sparc.passes.round import Round
from sparc.target import EmitContext
from tests.codegen.triton.compiled import agrees, emission, sites
from tests.codegen.triton.models import Convolutions, Encoder, Experts, LanguageModel, build, example

QUICK = {"verify_kernels": False}  # test_cubin and test_code judge machine code
DYNAMIC: dict[type[nn.Module], Any] = {
    LanguageModel: {"ids": {1: "length"}},
    Encoder: {"x": {1: "length"}},
    Convolutions: {"image": {0: "batch"}},
    Experts: {"x": {1: "length"}},
}


def compiled(kind: type[nn.Module], recipe: Any = "w4", **options: Any) -> Artifact:
    model = build(kind)
    given = {"options": QUICK, "dynamic": DYNAMIC[kind], "target": "cuda:sm_90", **options}
    return sparc.compile(model, example(model), recipe=recipe, **given)


@pytest.fixture(scope="module")
def language_model() -> Artifact:
    return compiled(LanguageModel)


@pytest.mark.parametrize("length", [1, 2, 19])
def test_a_language_model_computes_what_its_program_computes(language_model: Artifact, length: int) -> None:
    agrees(language_model, torch.randint(0, 100, (1, length)))


def test_a_block_is_four_kernels(language_model: Artifact) -> None:
    found = sites(language_model)
    assert list(found) == ["block.q+block.k+block.v", "block.o", "block.gate+block.up", "block.down", "head"]
    kinds = [each.problem.prologue.kind for each in found.values()]
    assert kinds == ["rms_norm", "none", "rms_norm", "none", "rms_norm"]
    assert [each.result.name for each in found.values()][1:4] == ["add", "mul", "add_1"]
    assert len(found["block.gate+block.up"].weights) == 2
    assert found["block.q+block.k+block.v"].problem.rows == 128


def test_rows_of_an_encoded_embedding_are_gathered(language_model: Artifact) -> None:
    assert emission(language_model).kernels["embedding.weight"].operator == "gather_rows"
    assert "embedding.weight.dense" not in emission(language_model).lowered["forward"].tensors


def test_a_layer_norm_before_one_product_is_its_prologue() -> None:
    artifact = compiled(Encoder)
    found = sites(artifact)
    assert found["inner"].problem.prologue.kind == "layer_norm"
    assert found["inner"].result.target is torch.ops.aten.gelu.default
    assert found["outer"].result.target is torch.ops.aten.add.Tensor
    for length in (1, 40):
        agrees(artifact, torch.randn(2, length, 48).half())


def test_convolutions_are_products_of_windows() -> None:
    artifact = compiled(Convolutions, "w8")
    found = sites(artifact)
    assert found["window"].problem.access.kind == "window"
    assert found["pointwise"].problem.access.kind == "channels"
    assert found["pointwise"].result.target is torch.ops.aten.add.Tensor
    assert "grouped" in str(artifact.report)
    assert emission(artifact).kernels["grouped.weight"].note == "it is a grouped convolution"
    for batch in (2, 3):
        agrees(artifact, torch.randn(batch, 3, 11, 13).half())


def test_activations_are_quantized_on_the_way_in() -> None:
    steps = (*prepare(), Round(IntGrid(8)), QuantizeActivations(mode="token"), Encode())
    artifact = compiled(Encoder, steps)
    assert sites(artifact)["outer"].problem.product == "int8"
    assert sites(artifact)["inner"].problem.prologue.kind == "layer_norm"
    assert sites(artifact)["inner"].problem.prologue.quantized == "int8"
    agrees(artifact, torch.randn(2, 9, 48).half(), tolerance=2e-2)  # a flipped rounding is worth half a step


def test_no_tokens_give_no_results(language_model: Artifact) -> None:
    operator = next(iter(emission(language_model).lowered["forward"].operators.values()))
    assert operator.tokens(torch.empty(0, 64)) == 0
    assert operator.output(torch.empty(1, 0, 64)).shape == (1, 0, 128)


def test_estimates_are_said_to_be_estimates(language_model: Artifact) -> None:
    assert "unmeasured" in str(language_model.report)
    ratio = language_model.ledger.summary.latencies[0]
    assert ratio.pairs == 0
    assert 0.05 < ratio.median < 1


def test_an_estimate_is_of_one_entry() -> None:
    layer = nn.Linear(64, 64)
    given = {"one": (torch.randn(2, 64),), "two": (torch.randn(4, 8), torch.randn(4, 8, 64))}

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            return self.layer(x) if y is None else x[:, :, None] * self.layer(y)

    program = capture_entries(Two(), {name: {"example_inputs": each} for name, each in given.items()})
    made = TritonTarget(90).emit(program, EmitContext(Diagnostics(), QUICK))
    assert all(made.estimate(given[name], name).median > 0 for name in given)


def test_running_without_a_gpu_is_a_remark(language_model: Artifact) -> None:
    language_model(torch.randint(0, 100, (1, 3)))
    assert any(each.code.id == "SPARC413" for each in language_model.diagnostics)


def test_sources_name_the_sites_they_serve(language_model: Artifact) -> None:
    kernels = {name: text for name, text in language_model.sources.items() if name.startswith("product_")}
    assert any("- block.gate.weight, block.up.weight: 1 token" in text for text in kernels.values())
    assert all(text.startswith('"""product = ') for text in kernels.values())
    assert all(compile(text, name, "exec") for name, text in kernels.items())


def test_a_saved_artifact_generates_its_kernels_anew(language_model: Artifact, tmp_path: Path) -> None:
    language_model.save(tmp_path / "first")
    language_model.save(tmp_path / "second")
    loaded = sparc.load(tmp_path / "first")
    ids = torch.randint(0, 100, (1, 5))
    assert torch.equal(loaded(ids), language_model(ids))
    assert loaded.sources == language_model.sources
    files = [path.name for path in (tmp_path / "first").iterdir() if path.name != "timings.json"]
    assert all((tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes() for name in files)
    described = json.loads((tmp_path / "first" / "kernels.json").read_text())
    assert described["capability"] == 90
    assert {row["weights"][0] for row in described["sites"]} >= {"block.q.weight", "head.weight"}


def test_an_artifact_of_this_machines_gpu_is_read_without_it(language_model: Artifact) -> None:
    made = emission(language_model)
    files = made.files({})
    loaded = TritonTarget().load(language_model.program, files, made.stored, EmitContext())
    assert isinstance(loaded, TritonEmission)
    assert loaded.device == made.device
    assert loaded.sources == made.sources
    for broken in (b"{}", b'{"capability": 75, "chip": "a chip"}', b"[" * 10_000):
        with pytest.raises(SparcError) as error:
            TritonTarget().load(language_model.program, {**files, "kernels.json": broken}, made.stored, EmitContext())
        assert error.value.code == "SPARC503"


def altered(made: TritonEmission, change: Any) -> dict[str, bytes]:
    """The emission's files, with another `kernels.json`: `change` edits the regimes of the head."""
    files = dict(made.files({}))
    described = json.loads(files["kernels.json"])
    for row in described["sites"]:
        if row["weights"] == ["head.weight"]:
            change(row["regimes"])
    return {**files, "kernels.json": json.dumps(described).encode()}


def head(made: Any) -> Any:
    found = made.lowered["forward"].operators.values()
    return next(each for each in found if each.site.names == ("head.weight",))


def test_ranges_that_an_artifact_records_are_restored(language_model: Artifact) -> None:
    made = emission(language_model)

    def shorten(regimes: list[Any]) -> None:
        regimes[1]["limit"] = regimes[0]["limit"] + 3

    context = EmitContext()
    loaded = TritonTarget().load(language_model.program, altered(made, shorten), made.stored, context)
    limits = [each.limit for each in head(made).regimes]
    assert [each.limit for each in head(loaded).regimes] == [limits[0], limits[0] + 3, *limits[2:]]
    assert [each.configuration for each in head(loaded).regimes] == [each.configuration for each in head(made).regimes]
    assert "SPARC414" not in {each.code.id for each in context.diagnostics}


@pytest.mark.parametrize(
    "change",
    [
        lambda regimes: regimes[0]["configuration"].update(block_columns=1 << 20),
        lambda regimes: regimes[0].update(limit=7),  # a kernel of one token
        lambda regimes: regimes.reverse(),
        lambda regimes: regimes.clear(),
    ],
)
def test_ranges_that_would_not_be_chosen_are_chosen_anew(language_model: Artifact, change: Any) -> None:
    made, context = emission(language_model), EmitContext()
    loaded = TritonTarget().load(language_model.program, altered(made, change), made.stored, context)
    assert [each.limit for each in head(loaded).regimes] == [each.limit for each in head(made).regimes]
    assert [each.code.id for each in context.diagnostics if "head" in each.what] == ["SPARC414"]


def test_compiled_models_are_forgotten() -> None:
    artifact = compiled(Encoder)
    held = weakref.ref(next(iter(emission(artifact).lowered["forward"].operators.values())).site.weights[0])
    assert held() is not None
    del artifact
    gc.collect()
    assert held() is None


def test_an_altered_kernel_file_is_noticed_and_never_run(language_model: Artifact, tmp_path: Path) -> None:
    folder = language_model.save(tmp_path / "artifact")
    source = next(path for path in folder.iterdir() if path.name.startswith("product_"))
    source.write_text("raise SystemExit")
    with pytest.raises(SparcError) as error:
        sparc.load(folder)
    assert error.value.code == "SPARC502"


# bad input ------------------------------------------------------------------------------------------------------------
def refused(**given: Any) -> SparcError:
    with pytest.raises(SparcError) as error:
        compiled(Encoder, **given)
    return error.value


def test_without_a_gpu_a_chip_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    error = refused(target="cuda")
    assert error.code == "SPARC410"
    assert "cuda:sm_90" in str(error)


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    error = refused(target="cuda")
    assert error.code == "SPARC410"
    assert "7.5" in str(error)


def test_an_old_chip_is_no_target() -> None:
    assert refused(target="cuda:sm_70").code == "SPARC201"


@pytest.mark.parametrize(("version", "said"), [("3.5.1", "too old"), (None, "not installed")])
def test_triton_is_required(monkeypatch: pytest.MonkeyPatch, version: str | None, said: str) -> None:
    plain = metadata.version

    def fake(name: str) -> str:
        if "triton" not in name:
            return plain(name)
        if name == "triton" and version is not None:
            return version
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(chips.metadata, "version", fake)
    error = refused()
    assert error.code == "SPARC410"
    assert said in str(error)


@pytest.mark.parametrize("options", [{"verify_kernel": True}, {"verify_kernels": 1}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    assert refused(options=options).code == "SPARC209"


def test_activations_beyond_32_bit_indices_are_refused(language_model: Artifact) -> None:
    operator = next(iter(emission(language_model).lowered["forward"].operators.values()))
    huge = torch.empty(1, device="meta", dtype=torch.float16).expand(1 << 26, 64)
    with pytest.raises(SparcError) as error:
        operator.run(huge, SiteTensors((), ()), make_scratch((0, 0)), lambda *_: pytest.fail("it was launched"), 0)
    assert error.value.code == "SPARC412"


def test_strided_and_misaligned_activations_are_served() -> None:
    artifact = compiled(Encoder)
    whole = torch.randn(3, 5, 49).half()
    agrees(artifact, whole[:2, :, :48])
    agrees(artifact, whole.flatten()[1:481].view(2, 5, 48))
    agrees(artifact, torch.randn(48, 5, 2).half().permute(2, 1, 0))


def test_a_wrong_kernel_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparc.codegen.triton import operator

    plain = operator.generate

    def wrong(problem: Any, configuration: Any) -> Any:
        kernel = plain(problem, configuration)
        return replace(kernel, source=kernel.source.replace("- 1032.0", "- 1031.0").replace("+ 1024.0", "+ 1023.0"))

    monkeypatch.setattr(operator, "generate", wrong)
    assert refused().code == "SPARC402"
