"""The GPU benchmark where there is no GPU: what it says, what it checks in the interpreter, and its table."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import gpu, gpu_block, gpu_linears, gpu_numerics, gpu_table
from benchmarks.gpu_cases import CASES, EncodedMatrix, encode, exact
from sparc.codegen.triton.timing import Replay
from sparc.cost import device_of

H100 = device_of(90, "NVIDIA H100 80GB HBM3")


def row(layer: str, tokens: int, floor: float, seconds: dict[str, float], failed: dict[str, str]) -> dict[str, Any]:
    named = {"case": "int4 g128", "layer": layer, "tokens": tokens, "floor": floor}
    return {**named, "seconds": seconds, "failed": failed}


RESULT: dict[str, Any] = {
    "device": "NVIDIA H100 80GB HBM3",
    "sections": {
        "numerics": {
            "checked": 3,
            "failures": ["int8, 5 tokens, plain: an error of 1.0e+00, and 2.0e-03 is allowed"],
            "no_lowering": {"NF4": "no kernel decodes Codebook"},
            "worst": {"int8": 500.0},
        },
        "linears": {
            "rows": [
                row("a", 1, 2e-6, {"ours": 4e-6, "torch float16": 8e-6, "ours, atomic": 2e-6}, {"gemlite": "no"}),
                row("b", 1, 1e-6, {"ours": 8e-6, "torch float16": 64e-6, "torch int4": 16e-6}, {"gemlite": "no"}),
                row("a", 16, 1e-6, {}, {"ours": "ValueError: its error is 1.0e+00"}),
            ],
            "no_lowering": {},
            "not_reached": ["bf16"],
            "kernels": {},
        },
        "block": {
            "seconds": {"ours": 5e-5, "torch.compile(reduce-overhead)": 1.5e-4},
            "launches": {"ours": 6.0},
            "failed": {},
            "error": 1e-3,
        },
        "onnx": {"error": "RuntimeError: no"},
    },
}


def invoke(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(gpu.main)
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "local_capability", lambda: None)


@pytest.mark.usefixtures("without_gpu")
def test_without_a_gpu_it_says_what_would_run() -> None:
    result = invoke()
    assert result.exit_code == gpu.NO_GPU
    assert result.output.count("\n") == 1
    assert "no GPU here" in result.output
    assert all(section in result.output for section in gpu.SECTIONS)


@pytest.mark.usefixtures("without_gpu")
def test_a_misspelt_section_is_refused() -> None:
    result = invoke("numeric")
    assert result.exit_code == 2
    assert "no GPU" not in result.output


@pytest.mark.usefixtures("without_gpu")
def test_kernels_are_checked_in_the_interpreter() -> None:
    result = invoke("--interpret")
    assert result.exit_code == 0
    # Two encodings, one and five tokens, plain and between a norm and a gate.
    assert result.output.splitlines()[-1] == "numerics: 8 of 8 kernels are right"


def test_a_wrong_kernel_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_numerics, "exact", lambda x, matrices: 1.01 * exact(x, matrices))
    found = gpu_numerics.check(H100, "cpu", cases=CASES[:1], shape=(48, 256), tokens=(1,))
    assert found["checked"] == 2
    assert [failure.split(": ")[0] for failure in found["failures"]] == [
        "int4 g128, 1 tokens, plain",
        "int4 g128, 1 tokens, norm and gate",
    ]


def test_every_form_is_checked() -> None:
    cases = [case for case in CASES if case.name == "binary 3"]
    subjects, _ = gpu_numerics.find_subjects(H100, "cpu", cases, (48, 256), (1,))
    forms = [(subject.trial.configuration.form, subject.norm) for subject in subjects]
    assert sorted(forms) == [("lookup", False), ("lookup", True), ("product", False), ("product", True)]


def test_a_kernel_that_fails_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = iter([RuntimeError("boom\nmore"), None])

    def error_of(subject: Any, place: str) -> float:
        raised = next(errors)
        if raised is not None:
            raise raised
        return 0.0

    monkeypatch.setattr(gpu_numerics, "error_of", error_of)
    found = gpu_numerics.check(H100, "cpu", cases=CASES[:1], shape=(48, 256), tokens=(1,))
    assert found["failures"] == ["int4 g128, 1 tokens, plain: RuntimeError: boom"]


def test_layers_are_timed_against_every_contender(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"ours": 2e-6, "torch float16": 8e-6}
    monkeypatch.setattr(gpu_linears, "copies_of", lambda nbytes: 2)
    monkeypatch.setattr(gpu_linears, "record", lambda calls: Replay(SimpleNamespace(), len(calls)))  # type: ignore[arg-type]
    monkeypatch.setattr(gpu_linears, "time_in_turns", lambda replays, rounds: {name: seconds[name] for name in replays})
    compiler: Any = SimpleNamespace(submit=lambda trials: None, fits=lambda trial: True)
    layers = (gpu_linears.Layer("gate", 32, 128, gated=True),)
    plan = gpu_linears.Plan(cases=CASES[1:2], layers=layers, tokens=(5,), place="cpu")
    found = gpu_linears.measure(H100, plan, compiler)
    [measured] = found["rows"]
    assert measured["seconds"] == seconds
    assert measured["failed"] == {"torchao int8": "not installed", "gemlite int8": "not installed"}
    assert measured["error"] < 2 * gpu_numerics.TOLERANCE["float16"]
    assert set(found["kernels"].values()) == {2e-6}
    assert found["not_reached"] == []
    assert gpu_linears.measure(H100, replace(plan, seconds=0), compiler)["not_reached"] == ["int8"]


def test_the_floor_is_bytes_or_products() -> None:
    matrix = encode(CASES[1], (4096, 4096), "cpu")
    assert isinstance(matrix, EncodedMatrix)
    stored = 4096 * 4096 + 2 * 4096
    assert gpu_linears.floor([matrix], 1, H100) == pytest.approx((stored + 2 * 2 * 4096) / 3.0e12)
    assert gpu_linears.floor([matrix], 4096, H100) == pytest.approx(2 * 4096**3 / 800e12)


def test_the_block_computes_what_llama_does() -> None:
    sizes = gpu_block.Sizes(hidden=64, heads=4, groups=2, inner=96, past=7)
    block, inputs = gpu_block.make_block(sizes).float(), [each.float() for each in gpu_block.make_inputs(sizes)]
    x, cosine, sine, keys, values = inputs

    def norm(y: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return y / (y.square().mean() + 1e-5).sqrt() * gain

    def rotated(y: torch.Tensor) -> torch.Tensor:
        half = torch.view_as_complex(torch.stack(y.chunk(2, -1), -1).contiguous())
        turned = torch.view_as_real(half * torch.complex(cosine[:8], sine[:8]))
        return torch.cat([turned[..., 0], turned[..., 1]], -1)

    with torch.no_grad():
        y = norm(x[0, 0], block.before_attention)
        q, k, v = (layer(y).reshape(-1, 16) for layer in (block.q, block.k, block.v))
        heads = []
        for head in range(4):
            group = head // 2
            all_keys = torch.cat([keys[0, group], rotated(k)[group : group + 1]])
            weights = (all_keys @ rotated(q)[head] / 4).softmax(0)
            heads.append(weights @ torch.cat([values[0, group], v[group : group + 1]]))
        x = x[0, 0] + block.o(torch.cat(heads))
        y = norm(x, block.before_gate)
        expected = x + block.down(torch.nn.functional.silu(block.gate(y)) * block.up(y))
        torch.testing.assert_close(block(*inputs)[0, 0], expected)


def test_the_table_says_what_was_found() -> None:
    lines = gpu_table.render(RESULT).splitlines()
    assert "numerics: 2 of 3 kernels are right" in lines
    assert "  wrong: int8, 5 tokens, plain: an error of 1.0e+00, and 2.0e-03 is allowed" in lines
    assert "  no lowering: NF4: no kernel decodes Codebook" in lines
    [cells] = [line.split() for line in lines if line.startswith("  int4 g128")]
    # Over the floor sqrt(2 * 8), against float16 sqrt(2 * 8); nothing at 16 tokens.
    assert cells == ["int4", "g128", "4.00", "4.00×", "–"]
    assert "  torch int4 / ours: M=1 2.00×" in lines
    assert "  gemlite / ours: no" in lines
    assert "  atomic / deterministic, where split: 0.50 of 1" in lines
    assert "  failed: int4 g128, a, 16 tokens: ValueError: its error is 1.0e+00" in lines
    assert "  no time for 1, the first bf16" in lines
    assert "  ours: 50.0 µs, 6 launches" in lines
    assert "  torch.compile(reduce-overhead): 150.0 µs" in lines
    assert lines[-1] == "onnx: failed: RuntimeError: no"


def test_results_are_written_to_every_folder(tmp_path: Path) -> None:
    written = gpu_table.save(RESULT, tmp_path / "a", tmp_path / "b")
    assert [path.relative_to(tmp_path).as_posix() for path in written] == [
        "a/gpu-nvidia-h100-80gb-hbm3.json",
        "b/gpu-nvidia-h100-80gb-hbm3.json",
    ]
    assert all(json.loads(path.read_text()) == RESULT for path in written)


@pytest.mark.parametrize(
    ("section", "fails"),
    [({"failures": []}, False), ({"failures": ["x"]}, True), ({"error": "x"}, True), ({"error": 1e-3}, False)],
)
def test_the_exit_status_tells_failures(section: dict[str, Any], fails: bool) -> None:
    assert gpu.failed({"sections": {"it": section}}) is fails


def test_a_section_that_raises_is_told() -> None:
    def section() -> dict[str, Any]:
        raise KeyError("gone")

    assert gpu.attempt(section) == {"error": "KeyError: 'gone'"}
