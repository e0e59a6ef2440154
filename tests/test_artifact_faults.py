"""Artifacts that are interrupted while they are saved, or damaged before they are loaded."""

import errno
import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sparc import files
from sparc.diag import SparcError
from tests.artifacts import (
    code_of,
    content,
    load,
    make_artifact,
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return make_artifact().save(tmp_path / "out")


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
