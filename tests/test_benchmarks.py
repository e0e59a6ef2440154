"""`python -m benchmarks`: which cases it starts, each in a process of its own."""

import json
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

import sparc
from benchmarks import __main__ as command
from benchmarks import exact, methods, page, structural, timing


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    cases: list[str] = []

    def run(arguments: list[str], **options: Any) -> Any:
        cases.append(arguments[-1])
        return subprocess.CompletedProcess(arguments, 3 if arguments[-1] == "twin" else 0)

    monkeypatch.setattr(command.subprocess, "run", run)
    return cases


def invoke(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(command.main)
    return CliRunner().invoke(app, list(arguments))


def test_help_starts_nothing(started: list[str]) -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    assert "compile-time" in result.output
    assert not started


def test_named_cases_run_in_order(started: list[str]) -> None:
    assert invoke("smollm2", "minilm").exit_code == 0
    assert started == ["smollm2", "minilm"]


def test_all_cases_run_though_one_fails(started: list[str]) -> None:
    result = invoke()
    assert result.exit_code == 1
    assert "failed: twin" in result.output
    assert started == list(command.CASES)


def test_a_misspelt_case_starts_nothing(started: list[str]) -> None:
    assert invoke("minilm", "twn").exit_code == 2
    assert not started


@pytest.mark.parametrize("module", [page, exact, methods, structural], ids=lambda module: module.__name__)
def test_a_page_shows_the_results_in_the_repository(module: ModuleType) -> None:
    text = module.PAGE.read_text()
    assert module.filled(text) == text, f"run python -m {module.__name__}"


def test_files_are_timed_in_turns(tmp_path: Path) -> None:
    x = torch.randn(2, 8)
    files = {}
    for name, width in (("small", 8), ("large", 256)):
        files[name] = tmp_path / f"{name}.onnx"
        model = nn.Sequential(nn.Linear(8, width), nn.Linear(width, 8))
        sparc.compile(model, (x,), recipe="dense", verify="types", measure=False).export_onnx(files[name])
    rows = timing.compare(files["small"], {"large": files["large"]}, {"input": x}, threads=1)
    assert [(row["against"], row["pairs"]) for row in rows] == [("itself (control)", 200), ("large", 200)]
    assert all(0 < row["low"] <= row["median"] <= row["high"] for row in rows)


def test_structural_figures_become_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(structural, "FOLDER", tmp_path)
    ratio = {"median": 1.5, "low": 1.4, "high": 1.61}
    timed = {"0.5": {"bytes": 0.5, "eager torch": ratio, "ONNX Runtime": ratio}, "control": {"ONNX Runtime": ratio}}
    line = {"weights": 0.8, "cosine mean": 0.9}
    figures = {"latency": timed, "keep 0.75": {"magnitude": line}}
    (tmp_path / "structural-minilm.json").write_text(json.dumps({"machine": {}, **figures}))
    rows = structural.tables().splitlines()
    assert "| minilm | 0.5 | 50.0% | 1.50 [1.40, 1.61] | 1.50 [1.40, 1.61] |" in rows
    assert "| minilm | control |  | 1.50 [1.40, 1.61] |  |" in rows
    assert rows[-3:] == [
        "| minilm, 75% of the units | weights | cosine mean |",
        "|---|---|---|",
        "| magnitude | 0.800 | 0.900 |",
    ]
