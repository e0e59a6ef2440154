"""Artifacts: called like the model, saved and loaded, identical for identical inputs, and replaced."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparc.artifact import Artifact, load_artifact
from sparc.capture import capture
from sparc.codegen.reference import ReferenceEmission, ReferenceTarget
from sparc.diag import Diagnostics, SparcError
from sparc.encoding.parse import BUILTIN
from sparc.inputs import example_tensors
from sparc.ledger import Ledger
from sparc.program import Program
from sparc.target import Span, StoredTensor
from tests import artifacts
from tests.artifacts import IDS, MASK, Encoder, code_of, content, load, make_artifact, make_program


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return make_artifact().save(tmp_path / "out")


# calling --------------------------------------------------------------------------------------------------------------
def test_it_is_called_like_the_model() -> None:
    torch.manual_seed(0)
    model, artifact = Encoder().eval(), make_artifact()
    with torch.no_grad():
        expected = model(IDS[:1], MASK[:1])
    for result in (artifact(IDS[:1], MASK[:1]), artifact(IDS[:1], mask=MASK[:1]), artifact(mask=MASK[:1], ids=IDS[:1])):
        assert result.keys() == expected.keys()
        assert all(torch.equal(result[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("ids", "mask", "word"),
    [(IDS.float(), MASK, "int64"), (IDS[0], MASK, "rank"), (IDS, MASK[:1], "batch"), (IDS, MASK[:, :3], "seq"), (IDS,
     None, "mask"), ("text", MASK, "tensor")],
)  # fmt: skip
def test_inputs_that_do_not_fit_are_refused(ids: Any, mask: Any, word: str) -> None:
    with pytest.raises(SparcError, match=word) as caught:
        make_artifact()(ids, mask)
    assert caught.value.code == "SPARC506"


def test_a_fixed_size_is_fixed() -> None:
    program = capture(nn.Linear(8, 4), (torch.zeros(2, 8),))
    artifact = Artifact(program, Ledger(), Diagnostics(), ReferenceEmission(program))
    assert code_of(lambda: artifact(torch.zeros(3, 8))) == "SPARC506"


def test_threads_reach_the_runtime() -> None:
    asked = []

    class Watched(ReferenceEmission):
        def runner(self, entry: str | None = None, *, threads: int | None = None, spin: bool = True) -> Any:
            asked.append(threads)
            return super().runner(entry, threads=threads)

    artifact = make_artifact(Watched(make_program()))
    artifact(IDS, MASK)
    artifact.threads = 1
    artifact(IDS, MASK)
    artifact(IDS, MASK)
    assert asked == [None, 1]
    assert code_of(lambda: setattr(artifact, "threads", 0)) == "SPARC506"


def test_an_unknown_entry_is_refused() -> None:
    assert code_of(lambda: make_artifact().call("decode", IDS, MASK)) == "SPARC506"


def test_the_reference_target_exports_no_onnx(tmp_path: Path) -> None:
    assert code_of(lambda: make_artifact().export_onnx(tmp_path / "model.onnx")) == "SPARC509"
    assert not list(tmp_path.iterdir())


def test_example_inputs_fit_the_model() -> None:
    program = make_program()
    ids, mask = example_tensors(program.main)
    assert ids.shape == (2, 5)
    assert ids.max() < 11
    assert mask.all()
    assert example_tensors(program.main, sizes={"seq": 9})[0].shape == (2, 9)
    make_artifact()(ids, mask)


# save and load --------------------------------------------------------------------------------------------------------
def test_what_is_loaded_is_what_was_saved(saved: Path) -> None:
    ours, theirs = make_artifact(), load(saved)
    assert theirs.program.text() == ours.program.text()
    assert theirs.ledger == ours.ledger
    assert list(theirs.diagnostics) == list(ours.diagnostics)
    assert (theirs.recipe_text, theirs.target) == (ours.recipe_text, ours.target)
    expected, actual = ours(IDS, MASK), theirs(IDS, MASK)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_saving_what_was_loaded_changes_no_byte(saved: Path, tmp_path: Path) -> None:
    load(saved).save(tmp_path / "again")
    assert content(tmp_path / "again") == content(saved)


def test_a_loaded_artifact_may_be_saved_over_itself(saved: Path) -> None:
    before = content(saved)
    load(saved).save(saved)
    assert content(saved) == before


def test_bytes_depend_on_neither_folder_nor_process_nor_hash_seed(saved: Path, tmp_path: Path) -> None:
    script = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("artifacts", {artifacts.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.make_artifact().save(sys.argv[1])
"""
    environment = {**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": os.pathsep.join(sys.path)}
    elsewhere = tmp_path / "a" / "much" / "deeper" / "folder"
    elsewhere.mkdir(parents=True)
    subprocess.run([sys.executable, "-c", script, "copy"], check=True, cwd=elsewhere, env=environment)
    assert content(elsewhere / "copy") == content(saved)


def test_times_are_outside_the_promise(tmp_path: Path) -> None:
    slow = make_artifact()
    slow.ledger.passes[0].seconds = 99.0
    slow.ledger.summary.latencies[0].median = 0.9
    first, second = content(make_artifact().save(tmp_path / "a")), content(slow.save(tmp_path / "b"))
    assert first.pop("timings.json") != second.pop("timings.json")
    assert first == second
    assert "timings.json" not in json.loads(first["manifest.json"])["files"]


def test_an_artifact_without_times_is_whole(saved: Path) -> None:
    (saved / "timings.json").unlink()
    assert load(saved).ledger.passes[0].seconds == 0


def test_no_path_of_this_machine_is_inside(saved: Path) -> None:
    for name, data in content(saved).items():
        for path in (Path.cwd(), Path(__file__).parent, saved.parent):
            assert str(path).encode() not in data, name


# layouts and target files ---------------------------------------------------------------------------------------------
class Transposing(ReferenceEmission):
    """Stores one weight transposed, and points into the weights' file from one of its own."""

    def __init__(self, program: Program, honest: bool = True) -> None:
        super().__init__(program)
        weight = program.weights["fc.weight"]
        turned = weight.t().contiguous() if honest else weight.t().contiguous() + 1
        self.stored = [StoredTensor("fc.weight^T", turned, "fc.weight", "transpose")]

    def files(self, spans: Mapping[str, Span]) -> Mapping[str, bytes]:
        return {"model.json": json.dumps([spans["fc.weight^T"].offset, spans["fc.weight^T"].length]).encode()}


def test_a_weight_is_stored_once_in_the_targets_layout(tmp_path: Path) -> None:
    artifact = make_artifact(Transposing(make_program()))
    folder = artifact.save(tmp_path / "out")
    offset, length = json.loads((folder / "model.json").read_bytes())
    turned = artifact.program.weights["fc.weight"].t().contiguous()
    assert (folder / "weights.safetensors").read_bytes()[offset : offset + length] == turned.numpy().tobytes()
    assert load(folder).program.text() == artifact.program.text()
    assert torch.equal(load(folder).program.weights["fc.weight"], artifact.program.weights["fc.weight"])
    stored = sum(tensor.nbytes for tensor in artifact.program.weights.values())
    assert (folder / "weights.safetensors").stat().st_size < stored + 1024


def test_a_layout_that_does_not_restore_the_weight_is_refused(tmp_path: Path) -> None:
    artifact = make_artifact(Transposing(make_program(), honest=False))
    assert code_of(lambda: artifact.save(tmp_path / "out")) == "SPARC508"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../evil", "a/b", ".hidden", "program.json", "manifest.json", ""])
def test_a_target_cannot_write_elsewhere(name: str, tmp_path: Path) -> None:
    class Evil(ReferenceEmission):
        def files(self, spans: Mapping[str, Span]) -> Mapping[str, bytes]:
            return {name: b"x"}

    assert code_of(lambda: make_artifact(Evil(make_program())).save(tmp_path / "out")) in ("SPARC504", "SPARC508")
    assert not list(tmp_path.iterdir())


def test_a_target_that_cannot_read_its_files_is_a_diagnostic(saved: Path) -> None:
    class Failing(ReferenceTarget):
        def load(self, program: Program, files: Any, stored: Any, context: Any) -> ReferenceEmission:
            raise KeyError("model.onnx")

    assert code_of(lambda: load_artifact(saved, BUILTIN, lambda name: Failing())) == "SPARC503"


# replacing ------------------------------------------------------------------------------------------------------------
def test_an_artifact_is_replaced(saved: Path) -> None:
    other = make_artifact()
    other.recipe_text = "name = 'other'\n"
    other.save(saved)
    assert load(saved).recipe_text == "name = 'other'\n"
    assert [path.name for path in saved.parent.iterdir()] == ["out"]


def test_an_empty_folder_is_filled_and_parents_are_made(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    load(make_artifact().save(tmp_path / "empty"))
    load(make_artifact().save(tmp_path / "new" / "newer" / "out"))


@pytest.mark.parametrize("foreign", ["notes.txt", "manifest.json"])
def test_a_folder_of_something_else_is_not_replaced(foreign: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / foreign).write_text("{}")
    assert code_of(lambda: make_artifact().save(folder)) == "SPARC505"
    assert content(folder) == {foreign: b"{}"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_artifact_with_foreign_files_is_not_replaced(saved: Path) -> None:
    (saved / "thesis.txt").write_text("years of work")
    assert code_of(lambda: make_artifact().save(saved)) == "SPARC505"
    assert (saved / "thesis.txt").read_text() == "years of work"


def test_a_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    assert code_of(lambda: make_artifact().save(tmp_path / "out")) == "SPARC505"
    assert (tmp_path / "out").read_text() == "x"
