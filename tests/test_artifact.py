"""Artifacts: called like the model, saved whole or not at all, identical for identical inputs, and checked when
loaded.
"""

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparc import codes, files
from sparc.artifact import Artifact, load_artifact
from sparc.capture import capture
from sparc.codegen.reference import ReferenceEmission, ReferenceTarget
from sparc.diag import Diagnostics, SparcError
from sparc.encoding.parse import BUILTIN
from sparc.inputs import example_tensors
from sparc.ledger import Ledger, PassRow, Ratio, SiteRow, SkipRow
from sparc.program import Program
from sparc.target import Span, StoredTensor, Target


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.fc = nn.Linear(8, 4)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        hidden = self.fc(self.embed(ids)) * mask.unsqueeze(-1)
        return {"hidden": hidden, "pooled": hidden.mean(1)}


IDS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
MASK = torch.ones(2, 5, dtype=torch.int64)


@cache
def captured() -> Program:
    torch.manual_seed(0)
    shape = {0: "batch", 1: "seq"}
    return capture(Encoder(), {"ids": IDS, "mask": MASK}, dynamic={"ids": shape, "mask": shape})


def make_program() -> Program:
    return captured().clone()


def make_ledger() -> Ledger:
    ledger = Ledger()
    skip = SkipRow("embed.weight", "its module is excluded")
    measured = {"snr_db": float("inf")}
    ledger.passes.append(PassRow("round(bits=8)", "*", "approximate", 1, 2, [skip], measured, 500, 200, seconds=1.5))
    source = "model.py:3 in forward"
    ledger.sites.append(SiteRow("fc.weight", "fc", source, "linear", "IntGrid()", "", 41.5, 128, 48, 48, "MatMulNBits"))
    ledger.summary.errors = {"hidden": {"relative error": 0.01}}
    ledger.summary.latencies = [Ratio("eager torch", 0.5, 0.4, 0.6, 30)]
    return ledger


def make_artifact(emission: Any = None) -> Artifact:
    program = make_program()
    diagnostics = Diagnostics()
    diagnostics.remark(codes.NOT_MATCHED, "embed.weight was left alone", why="its module is excluded")
    return Artifact(program, make_ledger(), diagnostics, emission or ReferenceEmission(program), "name = 'w8'\n")


def target_of(name: str) -> Target:
    assert name == "reference"
    return ReferenceTarget()


def load(folder: Path) -> Artifact:
    return load_artifact(folder, BUILTIN, target_of)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return make_artifact().save(tmp_path / "out")


def code_of(action: Callable[[], Any]) -> str:
    with pytest.raises(SparcError) as caught:
        action()
    return caught.value.code


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
        def runner(self, entry: str | None = None, *, threads: int | None = None) -> Any:
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
spec = importlib.util.spec_from_file_location("test_artifact", {__file__!r})
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
        def load(self, program: Program, files: Any, stored: Any) -> ReferenceEmission:
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


# interrupted ----------------------------------------------------------------------------------------------------------
STEPS = ("fsync", "rename", "mkdir", "write")


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException) -> Iterator[list[str]]:
    """The operating system refuses the `at`-th step of writing (a folder made, a file written, a flush, a rename)."""
    done: list[str] = []

    def guarded(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            done.append(name)
            if len(done) == at + 1:
                raise error
            return real(*args, **kwargs)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", guarded("fsync", os.fsync))
        patch.setattr(os, "rename", guarded("rename", os.rename))
        patch.setattr(os, "mkdir", guarded("mkdir", os.mkdir))
        patch.setattr(files, "write_file", guarded("write", files.write_file))
        yield done


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"]
)
@pytest.mark.parametrize("there", [False, True], ids=["new", "replacing"])
def test_wherever_saving_is_interrupted_nothing_is_left_behind(
    there: bool, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, folder, other = make_artifact(), tmp_path / "deep" / "out", make_artifact()
    other.recipe_text = "other"
    if there:
        artifact.save(folder)
    before = content(folder) if there else None
    with failing(monkeypatch, 10**9, error) as steps:
        other.save(tmp_path / "count" / "out")
    total = len(steps)
    assert total > 15
    for at in range(total):
        with failing(monkeypatch, at, error), pytest.raises((SparcError, KeyboardInterrupt)) as caught:
            other.save(folder)
        if isinstance(error, OSError):
            assert isinstance(caught.value, SparcError)
            assert caught.value.code == "SPARC505"
            assert "no space" in str(caught.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == (["count", "deep"] if there else ["count"])
        if there:
            assert [path.name for path in folder.parent.iterdir()] == ["out"]
            assert content(folder) == before
    other.save(folder)


def test_a_disk_that_fills_up_while_weights_are_written(saved: Path) -> None:
    """The operating system itself refuses: no file may grow beyond 700 bytes."""
    before = content(saved)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, limits[1]))
    try:
        code = code_of(lambda: make_artifact().save(saved))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == "SPARC505"
    assert content(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["out"]


def test_one_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    files.replace_file(path, b"old")
    for error in (OSError(errno.ENOSPC, "full"), KeyboardInterrupt()):
        with failing(monkeypatch, 0, error), pytest.raises((SparcError, KeyboardInterrupt)):
            files.replace_file(path, b"new")
        assert content(tmp_path) == {"report.html": b"old"}
    files.replace_file(path, b"new")
    assert content(tmp_path) == {"report.html": b"new"}
    assert code_of(lambda: files.replace_file(tmp_path / "no" / "such" / "folder.html", b"x")) == "SPARC505"


# damaged --------------------------------------------------------------------------------------------------------------
NAMES = ("program.json", "target.json", "report.json", "recipe.toml", "weights.safetensors")


def rewrite(folder: Path, name: str, data: bytes) -> None:
    """Replace a file and mend the manifest, as somebody would who means harm."""
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    record = files.hash_bytes(data)
    manifest["files"][name] = {"size": record.size, "sha256": record.sha256}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", [*NAMES, "manifest.json"])
def test_a_missing_file(name: str, saved: Path) -> None:
    (saved / name).unlink()
    assert code_of(lambda: load(saved)) == "SPARC501"


@pytest.mark.parametrize("name", NAMES)
def test_a_truncated_file(name: str, saved: Path) -> None:
    (saved / name).write_bytes((saved / name).read_bytes()[:-1])
    assert code_of(lambda: load(saved)) == "SPARC502"


@pytest.mark.parametrize("name", NAMES)
def test_one_bit_altered(name: str, saved: Path) -> None:
    data = bytearray((saved / name).read_bytes())
    data[len(data) // 2] ^= 1
    (saved / name).write_bytes(data)
    assert code_of(lambda: load(saved)) == "SPARC502"


def test_no_folder(tmp_path: Path) -> None:
    assert code_of(lambda: load(tmp_path / "nothing")) == "SPARC501"
    (tmp_path / "file").write_text("x")
    assert code_of(lambda: load(tmp_path / "file")) == "SPARC501"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_links_are_refused(link: Callable[[Path, Path], None], name: str, saved: Path, tmp_path: Path) -> None:
    (saved / name).rename(tmp_path / name)
    link(tmp_path / name, saved / name)
    assert code_of(lambda: load(saved)) == "SPARC504"


def test_a_pipe_is_refused(saved: Path) -> None:
    (saved / "recipe.toml").unlink()
    os.mkfifo(saved / "recipe.toml")
    assert code_of(lambda: load(saved)) == "SPARC504"


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a later version": (lambda m: m.update(version=2), "SPARC507"),
    "another format": (lambda m: m.update(format="zip"), "SPARC503"),
    "an unknown key": (lambda m: m.update(hook="x"), "SPARC503"),
    "a path upwards": (lambda m: m["files"].update({"../../etc/passwd": {"size": 1, "sha256": "0" * 64}}), "SPARC504"),
    "an absolute path": (lambda m: m["files"].update({"/etc/passwd": {"size": 1, "sha256": "0" * 64}}), "SPARC504"),
    "a path below": (lambda m: m["files"].update({"a/b": {"size": 1, "sha256": "0" * 64}}), "SPARC504"),
    "a hidden file": (lambda m: m["files"].update({".ssh": {"size": 1, "sha256": "0" * 64}}), "SPARC504"),
    "a file less": (lambda m: m["files"].pop("recipe.toml"), "SPARC503"),
    "a record without hash": (lambda m: m["files"]["recipe.toml"].pop("sha256"), "SPARC503"),
    "a hash that is none": (lambda m: m["files"]["recipe.toml"].update(sha256="0"), "SPARC503"),
    "a negative size": (lambda m: m["files"]["recipe.toml"].update(size=-1), "SPARC503"),
    "another target": (lambda m: m.update(target="onnx"), "SPARC503"),
    "files that are a list": (lambda m: m.update(files=[]), "SPARC503"),
}


@pytest.mark.parametrize("change", MANIFESTS)
def test_a_manifest_that_is_wrong(change: str, saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_bytes())
    MANIFESTS[change][0](manifest)
    (saved / "manifest.json").write_text(json.dumps(manifest))
    assert code_of(lambda: load(saved)) == MANIFESTS[change][1]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_nonsense_with_a_true_hash(name: str, saved: Path) -> None:
    if name == "recipe.toml":
        return
    for data in (b"", b"nonsense", b"[]\n", b"{}\n"):
        rewrite(saved, name, data)
        assert code_of(lambda: load(saved)) == "SPARC503"


def test_a_report_with_unknown_keys(saved: Path) -> None:
    report = json.loads((saved / "report.json").read_bytes())
    changes = (
        {"x": 1},
        {"sites": [{"weight": 3}]},
        {"diagnostics": [{"code": "os.system"}]},
        {"summary": {"latencies": []}},
    )
    for change in changes:
        rewrite(saved, "report.json", json.dumps({**report, **change}).encode())
        assert code_of(lambda: load(saved)) == "SPARC503"


def test_times_that_are_nonsense(saved: Path) -> None:
    (saved / "timings.json").write_text('{"seconds": [], "latencies": []}')
    assert code_of(lambda: load(saved)) == "SPARC503"
