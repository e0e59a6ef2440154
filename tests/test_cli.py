"""The command line: every command with and without --json, exit statuses, and errors that leave nothing behind."""

import json
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

import sparc
from sparc import codes
from sparc.cli import main, run
from sparc.cli.compile import parse_dynamic
from sparc.cli.sizes import parse_sizes
from sparc.diag import SparcError

MODEL = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(16, 64), nn.Linear(64, 16), nn.LayerNorm(16)

    def forward(self, x):
        return {"y": self.norm(x + self.down(nn.functional.gelu(self.up(x))))}

def make():
    torch.manual_seed(0)
    return {"model": Block(), "example_inputs": {"x": torch.randn(4, 16)}, "dynamic": {"x": {0: "batch"}}}

def data():
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(4, 16, generator=generator)} for _ in range(8)]

def raising():
    raise RuntimeError("boom")

def interrupted():
    raise KeyboardInterrupt

def number():
    return 3

def misspelt():
    return {"model": Block(), "example_input": {}}

def incomplete():
    return {"model": Block()}

def not_finite():
    made = make()
    made["model"].up.weight.data[0, 0] = float("nan")
    return made
"""
COMPILE = ["--target", "reference", "--no-measure"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model's module, and an artifact compiled from it."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "cli_model.py").write_text(MODEL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        assert run(["compile", "cli_model:make", "-o", "out", *COMPILE]) == 0
        yield folder


@pytest.fixture(autouse=True)
def inside(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, code: str = "") -> str:
    """Run a command that must fail without a traceback and without leaving anything; returns stderr."""
    before = sorted(path.name for path in Path().iterdir() if path.name != "__pycache__")
    capsys.readouterr()
    assert run(arguments) == status
    captured = capsys.readouterr()
    assert code in captured.err
    assert "Traceback" not in captured.err + captured.out
    assert sorted(path.name for path in Path().iterdir() if path.name != "__pycache__") == before
    return captured.err


def as_json(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> Any:
    capsys.readouterr()
    assert run([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# compile --------------------------------------------------------------------------------------------------------------
def test_compile_saves_an_artifact_and_says_what_next(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["compile", "cli_model:make", "-o", str(tmp_path / "a"), "--data", "cli_model:data", *COMPILE]) == 0
    lines = capsys.readouterr().out.rstrip().splitlines()[-3:]
    assert [line.split()[0] for line in lines] == ["saved", "verify", "look"]
    assert f"sparc compare {tmp_path / 'a'} cli_model:make --layers" in lines[1]
    artifact = sparc.load(tmp_path / "a")
    assert artifact(x=torch.zeros(2, 16))["y"].shape == (2, 16)
    assert artifact.ledger.summary.data == "held out"


def test_compile_as_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    described = as_json(capsys, ["compile", "cli_model:make", "-o", str(tmp_path / "a"), *COMPILE])
    assert {site["weight"] for site in described["sites"]} == {"up.weight", "down.weight"}
    assert described["folder"] == str(tmp_path / "a")


def test_a_saved_recipe_compiles_to_the_same_bytes(tmp_path: Path) -> None:
    recipe, page = tmp_path / "r.toml", tmp_path / "r.html"
    more = ["--save-recipe", str(recipe), "--html", str(page)]
    assert run(["compile", "cli_model:make", "-o", str(tmp_path / "a"), *COMPILE, *more]) == 0
    assert run(["compile", "cli_model:make", "-o", str(tmp_path / "b"), *COMPILE, "--recipe", str(recipe)]) == 0
    files = {path.name for path in (tmp_path / "a").iterdir()} - {"timings.json"}
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    assert page.read_text().startswith("<!DOCTYPE html>")


def test_a_dry_run_says_what_each_step_is_for_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    described = as_json(capsys, ["compile", "cli_model:make", "--dry-run"])
    rounding = next(step for step in described["steps"] if step["step"].startswith("round"))
    assert rounding["weights"] == ["down.weight", "up.weight"]
    assert run(["compile", "cli_model:make", "--dry-run", "-o", str(tmp_path / "a")]) == 0
    assert "up.weight" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_dynamic_dimensions_from_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["compile", "cli_model:make", "-o", str(tmp_path / "a"), *COMPILE, "--dynamic", "x=0:rows"]) == 0
    assert "f32[rows, 16]" in sparc.load(tmp_path / "a").program.text()


def test_parsing_dynamic_and_sizes() -> None:
    assert parse_dynamic(["ids=0:batch,1:seq", "mask=-1:seq"]) == {"ids": {0: "batch", 1: "seq"}, "mask": {-1: "seq"}}
    assert parse_sizes(["batch=8,seq=128", "past=3"]) == {"batch": 8, "seq": 128, "past": 3}


@pytest.mark.parametrize(
    "text", ["", "ids", "ids=", "ids=batch", "ids=0", "ids=0:", "=0:batch", "ids=0:1batch", "ids=a:batch"]
)
def test_dynamic_that_is_not_understood(text: str) -> None:
    with pytest.raises(SparcError) as caught:
        parse_dynamic([text])
    assert caught.value.code == "SPARC104"


@pytest.mark.parametrize("text", ["batch", "batch=", "=3", "batch=0", "batch=-1", "batch=x", "batch=1,,"])
def test_sizes_that_are_not_understood(text: str) -> None:
    with pytest.raises(SparcError) as caught:
        parse_sizes([text])
    assert caught.value.code == "SPARC506"


FAILURES = {
    "an unknown recipe": (["cli_model:make", "--recipe", "w88"], "SPARC201", "w8"),
    "an unknown target": (["cli_model:make", "--target", "onxn"], "SPARC201", "onnx"),
    "an unknown level": (["cli_model:make", "--verify", "deep"], "SPARC209", "full"),
    "a recipe that is not there": (["cli_model:make", "--recipe", "no.toml"], "SPARC202", "no.toml"),
    "no such module": (["no_such_module:make"], "SPARC110", "no_such_module"),
    "no such function": (["cli_model:mak"], "SPARC110", "make"),
    "no import name": (["cli-model:make"], "SPARC110", "pkg.mod:fn"),
    "no such folder": (["nothing"], "SPARC110", "nothing"),
    "a function that raises": (["cli_model:raising"], "SPARC110", "cli_model.py:22 in raising"),
    "a function that returns a number": (["cli_model:number"], "SPARC110", "int"),
    "a misspelt argument": (["cli_model:misspelt"], "SPARC110", "example_inputs"),
    "a missing argument": (["cli_model:incomplete"], "SPARC110", "example_inputs"),
    "weights that are not finite": (["cli_model:not_finite"], "SPARC106", "up.weight"),
    "data that cannot be imported": (["cli_model:make", "--data", "cli_model:dat"], "SPARC110", "data"),
    "a dimension that is none": (["cli_model:make", "--dynamic", "z=0:rows"], "SPARC104", "z"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_bad_input_is_explained(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, code, word = FAILURES[case]
    assert word in fails(capsys, ["compile", *arguments, "-o", "new"], 1, code)


def test_errors_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compile", "cli_model:make", "-o", "new", "--recipe", "w88", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "SPARC201"


@pytest.mark.parametrize(
    "arguments", [["compile", "cli_model:make"], ["compile"], ["nonsense"], ["bench", "out", "--calls", "x"]]
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, arguments, 2)


def test_ctrl_c_exits_with_130_and_leaves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, ["compile", "cli_model:interrupted", "-o", "deep/new"], 130)


def test_a_folder_of_something_else_is_refused_before_any_work(capsys: pytest.CaptureFixture[str]) -> None:
    Path("thesis").mkdir()
    Path("thesis/text.txt").write_text("x")
    fails(capsys, ["compile", "cli_model:raising", "-o", "thesis"], 1, "SPARC505")
    assert Path("thesis/text.txt").read_text() == "x"


# other sources --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def exported(workplace: Path) -> Path:
    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> torch.Tensor:
            return self.fc(x) * scale

    program = torch.export.export(Scaled().eval(), (torch.ones(2, 8),), {"scale": torch.ones(8)}, strict=False)
    torch.export.save(program, workplace / "model.pt2")
    return workplace / "model.pt2"


def test_an_exported_program_needs_trust(exported: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "--trust" in fails(capsys, ["compile", "model.pt2", "-o", "new"], 1, "SPARC110")
    assert run(["compile", "model.pt2", "--trust", "-o", str(tmp_path / "a"), *COMPILE]) == 0
    assert sparc.load(tmp_path / "a")(torch.ones(2, 8), scale=torch.ones(8)).shape == (2, 8)


def test_a_file_that_is_no_exported_program(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "x.pt2").write_bytes(b"nonsense")
    fails(capsys, ["compile", str(tmp_path / "x.pt2"), "--trust", "-o", "new"], 1, "SPARC110")


# inspect --------------------------------------------------------------------------------------------------------------
def test_inspect_shows_report_files_and_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run(["inspect", "out"]) == 0
    text = capsys.readouterr().out
    for part in ("weights.safetensors", "[[steps]]", "IntGrid(bits=8)", "up.weight", "target reference"):
        assert part in text


def test_inspect_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    described = as_json(capsys, ["inspect", "out"])
    assert (described["inputs"], described["outputs"]) == (["x"], ["y"])
    assert described["files"]["weights.safetensors"] > 2000
    assert len(described["sites"]) == 2


def test_inspect_prints_the_program_and_writes_the_page(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    capsys.readouterr()
    assert run(["inspect", "out", "--program", "--html", str(tmp_path / "r.html")]) == 0
    assert "sparc.decode" in capsys.readouterr().out
    assert "up.weight" in (tmp_path / "r.html").read_text()


def test_inspect_lists_the_weights_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    described = as_json(capsys, ["inspect", "cli_model:make"])
    assert [(site["weight"], site["shape"]) for site in described["sites"]] == [
        ("up.weight", [64, 16]),
        ("down.weight", [16, 64]),
    ]
    assert run(["inspect", "cli_model:make"]) == 0
    assert "64×16" in capsys.readouterr().out


def test_an_altered_artifact_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    for path in Path("out").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "program.json").write_bytes(b"{}")
    for command in (["inspect", str(folder)], ["bench", str(folder)], ["compare", str(folder), "out"]):
        fails(capsys, command, 1, "SPARC502")
    (folder / "manifest.json").unlink()
    fails(capsys, ["inspect", str(folder)], 1, "SPARC501")


# compare --------------------------------------------------------------------------------------------------------------
def test_an_artifact_equals_itself(capsys: pytest.CaptureFixture[str]) -> None:
    described = as_json(capsys, ["compare", "out", "out", "--layers", "--tolerance", "0"])
    assert [each["tolerance"] for each in described["outputs"] + described["layers"]] == [0.0] * (
        1 + len(described["layers"])
    )
    assert len(described["layers"]) >= 4


def test_an_artifact_against_its_model(capsys: pytest.CaptureFixture[str]) -> None:
    described = as_json(capsys, ["compare", "out", "cli_model:make", "--layers"])
    output = described["outputs"][0]
    assert output["name"] == "y"
    assert 1e-5 < output["tolerance"] < 0.1
    assert output["p90"] <= output["p99"] <= output["tolerance"]
    tolerances = [each["tolerance"] for each in described["layers"]]
    assert tolerances == sorted(tolerances, reverse=True)
    assert {"up", "down", "norm"} <= {each["module"] for each in described["layers"]}
    assert run(["compare", "out", "cli_model:make", "--layers"]) == 0
    assert "Layers" in capsys.readouterr().out


def test_a_tolerance_that_is_not_met_fails(capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, ["compare", "out", "cli_model:make", "--tolerance", "1e-7"], 1, "SPARC510")


# bench ----------------------------------------------------------------------------------------------------------------
def test_bench(capsys: pytest.CaptureFixture[str]) -> None:
    described = as_json(
        capsys, ["bench", "out", "--vs", "cli_model:make", "--calls", "8", "--size", "batch=7", "--threads", "1"]
    )
    assert [(each["name"], each["calls"]) for each in described["timings"]] == [("out", 8), ("cli_model:make", 8)]
    assert all(0 < each["lower"] <= each["median"] <= each["upper"] for each in described["timings"])
    assert described["inputs"] == {"x": [7, 16]}
    assert described["ratio"]["pairs"] == 8
    assert run(["bench", "out", "--calls", "5"]) == 0
    assert "ms" in capsys.readouterr().out


# about ----------------------------------------------------------------------------------------------------------------
def test_every_code_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    for identifier, code in codes.catalogue().items():
        capsys.readouterr()
        assert run(["explain", identifier.lower()]) == 0
        assert code.title in " ".join(capsys.readouterr().out.split())
    assert as_json(capsys, ["explain", "203"])["code"] == "SPARC203"
    assert as_json(capsys, ["explain"]).keys() == codes.catalogue().keys()


def test_an_unknown_code_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "SPARC203" in fails(capsys, ["explain", "SPARC2O3"], 1, "SPARC201")


def test_passes_lists_everything_registered(capsys: pytest.CaptureFixture[str]) -> None:
    described = as_json(capsys, ["passes"])
    names = {kind: {row["name"] for row in rows} for kind, rows in described.items()}
    assert {"round", "encode"} <= names["passes"]
    assert "IntGrid" in names["encodings"]
    assert "w8" in names["recipes"]
    assert {"onnx", "reference"} <= names["targets"]
    assert all(row["doc"] for row in described["passes"] + described["encodings"] + described["targets"])
    assert as_json(capsys, ["passes", "IntGrid"])["options"]["bits"] == "8"
    assert run(["passes"]) == 0
    assert "IntGrid" in capsys.readouterr().out
    assert "round" in fails(capsys, ["passes", "roudn"], 1, "SPARC201")


def test_environment(capsys: pytest.CaptureFixture[str]) -> None:
    described = as_json(capsys, ["env"])
    assert described["packages"]["torch"] == metadata.version("torch")
    assert described["torch threads"] == torch.get_num_threads()
    assert run(["env"]) == 0


def test_the_installed_command_is_this_one() -> None:
    (script,) = metadata.entry_points(group="console_scripts", name="sparc")
    assert script.load() is main
