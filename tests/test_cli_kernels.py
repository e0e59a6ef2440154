"""`sparc inspect --kernels`: what kernels take, of artifacts that have some; others are refused."""

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparc
from sparc.cli import run
from sparc.codegen.triton import chips
from sparc.codegen.triton.emission import TritonEmission

ROW = {
    "kernel": "product_0123456789ab",
    "serves": ["a.up.weight: 1 token", "b.up.weight: 1 token", "c.up.weight: 1 token"],
    "registers": 168,
    "spill_bytes": 24,
    "shared_bytes": 98304,
    "load_bytes": [2, 16],
    "tensor_core": {"HGMMA": 32},
    "issue_slots": 3.25,
    "ceiling_tb_per_s": 4.4,
    "programs_per_sm": 2,
    "violations": ["it spills 24 bytes, and 0 are allowed"],
    "seconds": 0.0000072,
}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64, bias=False), nn.ReLU()).half().eval()
    options = {"verify_kernels": False}
    made = sparc.compile(
        model, (torch.randn(1, 128).half(),), recipe="w8", target="cuda:sm_90", verify="types", options=options
    )
    return made.save(tmp_path_factory.mktemp("kernels") / "out")


def shown(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    capsys.readouterr()
    assert run(["inspect", *map(str, arguments), "--kernels"]) == 0
    return capsys.readouterr().out


def test_every_kernel_is_described(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    described = json.loads(shown(capsys, artifact, "--json"))
    assert described["target"] == "cuda:sm_90"
    expected = {kernel.name for kernel in sparc.load(artifact).emission.every_kernel()}  # type: ignore[attr-defined]
    assert {row["kernel"] for row in described["kernels"]} == expected
    assert len(expected) == 1
    [row] = described["kernels"]
    [served] = row["serves"]
    assert served.startswith("0.weight: 1 token")
    assert 0 < row["registers"] <= 255
    assert row["spill_bytes"] == 0
    assert row["programs_per_sm"] >= 1
    assert row["seconds"] is None
    text = shown(capsys, artifact)
    assert row["kernel"] in text
    assert "unmeasured" in text


def test_times_and_broken_promises_are_said(
    artifact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TritonEmission, "kernel_rows", lambda self: [ROW])
    lines = shown(capsys, artifact).splitlines()
    cells = next(line for line in lines if line.startswith("product_0123456789ab ")).split()
    assert cells[1:] == ["168", "24", "98304", "2", "to", "16", "32", "HGMMA", "3.25", "4.4", "2", "7.2", "µs"]
    assert any("a.up: 1 token; 2 more" in line for line in lines)
    assert lines[-1] == "product_0123456789ab: it spills 24 bytes, and 0 are allowed."


def test_a_kernel_that_was_timed_says_its_seconds(artifact: Path) -> None:
    emission: Any = sparc.load(artifact).emission
    [kernel] = emission.every_kernel()
    emission.timings[kernel.digest] = 3e-6
    assert [row["seconds"] for row in emission.kernel_rows()] == [3e-6]


def test_other_targets_have_no_kernels(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = nn.Linear(16, 16)
    made = sparc.compile(
        model, (torch.randn(1, 16),), recipe="dense", target="reference", verify="types", measure=False
    )
    made.save(tmp_path / "out")
    assert run(["inspect", str(tmp_path / "out"), "--kernels"]) == 1
    said = capsys.readouterr().err
    assert "SPARC209" in said
    assert "'reference' has no kernels" in said


def test_without_triton_it_says_what_to_install(
    artifact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(chips.metadata, "version", missing)
    assert run(["inspect", str(artifact), "--kernels"]) == 1
    assert "SPARC410" in capsys.readouterr().err
