"""What a user gets wrong: a coded diagnostic that names the thing and says what to do; nothing is left behind."""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import sparc
from sparc import files
from sparc.capture import capture
from sparc.cli import run
from sparc.diag import Diagnostic, Diagnostics
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.nm import NM
from sparc.encoding.unstructured import Unstructured
from sparc.passes.equalize.awq import Awq
from sparc.passes.low_rank import LowRank
from sparc.passes.prune import PermuteChannels, Prune
from sparc.passes.rotate import Rotate
from sparc.passes.round import Compensate, Round
from sparc.samples import make_samples, vary

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x * 2
        return x


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8))


def compiled(**options: Any) -> Any:
    given = {"recipe": "dense", "measure": False, "verify": "types", **options}
    return sparc.compile(given.pop("model", None) or model(), given.pop("example_inputs", (X,)), **given)


def refused(action: Callable[[], Any]) -> Diagnostic:
    with pytest.raises(sparc.SparcError) as caught:
        action()
    return caught.value.diagnostic


def raises() -> Any:
    return 1 // 0


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ({"model": Branch()}, "SPARC101", ["depends on the values", "x.sum() > 0", "test_bad_input.py"]),
        ({"example_inputs": (X * float("nan"),)}, "SPARC102", ["'input' contains NaN", "without NaN"]),
        ({"data": [(X,), (X * float("nan"),)]}, "SPARC102", ["'input' contains NaN"]),
        ({"data": [(X[:, :3],)]}, "SPARC102", ["data=", "size 3 in dimension 1, not 8"]),
        ({"data": [(X[:3],)]}, "SPARC102", ["size 3 in dimension 0", "declare the dimension in dynamic="]),
        ({"data": [(X.double(),)]}, "SPARC102", ["float64, not float32"]),
        ({"data": raises}, "SPARC102", ["data= could not be read", "ZeroDivisionError", "in raises"]),
        (
            {"metric": lambda artifact: raises()},
            "SPARC303",
            ["metric= gave", "ZeroDivisionError", "in raises"],
        ),
        ({"metric": lambda artifact: "good"}, "SPARC303", ["metric= gave no number", "'good'"]),
        ({"metric": lambda artifact: False}, "SPARC303", ["returned False"]),
        ({"options": {"opsett": 21}}, "SPARC209", ["'opsett'", "did you mean opset?"]),
        ({"options": {"opset": "new"}}, "SPARC209", ["'new'", "18 to 24"]),
        ({"options": {"opset": 99}}, "SPARC407", ["99", "18 to 24"]),
        ({"options": {"opset": 21}, "target": "reference"}, "SPARC209", ["'reference' has no option 'opset'"]),
        ({"options": {"opsett": 21}, "model": Branch()}, "SPARC209", ["'opsett'"]),
    ],
)
def test_compile_says_what_is_wrong(options: dict[str, Any], code: str, words: list[str]) -> None:
    found = refused(lambda: compiled(**options))
    assert found.code.id == code
    assert [word for word in words if word not in str(found)] == [], str(found)


def test_masks_with_infinities_are_inputs_like_any() -> None:
    mask = torch.zeros(2, 3).masked_fill(torch.tensor([True, False, False]), float("-inf"))
    (varied,) = vary([mask], 1)
    assert torch.equal(varied, mask)
    program = capture(nn.Softmax(-1), (mask,))
    samples = make_samples(program, {"forward": (mask,)}, None, Diagnostics())
    assert not any(tensor.isnan().any() for batch in samples.held_out["forward"] for tensor in batch)


def test_endless_data_is_read_up_to_a_number_and_said() -> None:
    program = capture(nn.ReLU(), (torch.ones(2, 3),))
    diagnostics = Diagnostics()
    numbers = itertools.count()
    samples = make_samples(program, {"forward": (torch.ones(2, 3),)}, (torch.ones(2, 3) for _ in numbers), diagnostics)
    assert [remark.code.id for remark in diagnostics] == ["SPARC121"]
    assert len(samples.calibration["forward"]) + len(samples.held_out["forward"]) == 1024


def test_data_may_be_a_loader() -> None:
    program = capture(nn.ReLU(), (torch.ones(2, 3),))
    loader = DataLoader(list(torch.randn(10, 3)), batch_size=2)  # type: ignore[arg-type]  # a list is a dataset
    samples = make_samples(program, {"forward": (torch.ones(2, 3),)}, loader, Diagnostics())
    assert [len(batches["forward"]) for batches in (samples.calibration, samples.held_out)] == [4, 1]


# writing --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("number", "why", "hint"),
    [(28, "no space is left on the disk", "free some space"), (13, "Permission denied", "choose another place")],
)
def test_a_disk_that_refuses_is_named(
    number: int, why: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, chunks: Any) -> Any:
        path.write_bytes(b"part")
        raise OSError(number, os.strerror(number))

    artifact = compiled()
    monkeypatch.setattr(files, "write_file", refuse)
    for save in (lambda: artifact.save(tmp_path / "deep" / "mine"), lambda: files.replace_file(tmp_path / "mine", b"")):
        found = refused(save)
        assert (found.code.id, found.why) == ("SPARC505", why)
        assert "mine" in found.what
        assert hint in str(found)
        assert not list(tmp_path.iterdir())


# options of passes ----------------------------------------------------------------------------------------------------
MISTYPED: dict[str, Callable[[], Any]] = {
    "damping": lambda: Prune(NM(2, 4), damping="x"),  # type: ignore[arg-type]
    "density": lambda: Prune(Unstructured(), density="half"),  # type: ignore[arg-type]
    "refine": lambda: Prune(NM(2, 4), refine="yes"),  # type: ignore[arg-type]
    "encoding": lambda: Round("int4"),  # type: ignore[arg-type]
    "method": lambda: Round(method="qptq"),  # type: ignore[arg-type]
    "budget": lambda: Round(finer=IntGrid(8), budget="x"),  # type: ignore[arg-type]
    "activation_order": lambda: Compensate(activation_order=1),  # type: ignore[arg-type]
    "points": lambda: Awq(points=2.5),  # type: ignore[arg-type]
    "insert": lambda: Awq(insert="x"),  # type: ignore[arg-type]
    "rank": lambda: LowRank(rank="x"),  # type: ignore[arg-type]
    "iterations": lambda: LowRank(rank=2, iterations="x"),  # type: ignore[arg-type]
    "rounds": lambda: PermuteChannels(rounds="x"),  # type: ignore[arg-type]
    "seed": lambda: Rotate(seed="x"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", MISTYPED)
def test_options_of_the_wrong_type_are_refused_where_a_pass_is_made(name: str) -> None:
    found = refused(MISTYPED[name])
    assert found.code.id == "SPARC209"
    assert f"option {name!r}" in found.what
    assert found.why


# the command line -----------------------------------------------------------------------------------------------------
def test_a_file_instead_of_an_import_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["compile", "nets/mine.py:model", "-o", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "SPARC110" in said
    assert "write nets.mine:model" in said


@pytest.mark.slow
def test_ctrl_c_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import time, torch\nfrom pathlib import Path\n"
        "def wait(artifact):\n    Path('started').touch()\n    time.sleep(60)\n"
        "def model():\n"
        "    return {'model': torch.nn.Linear(8, 8), 'example_inputs': (torch.ones(2, 8),), 'metric': wait}\n"
    )
    command = [sys.executable, "-c", "from sparc.cli import main; main()"]
    command += ["compile", "mine:model", "-o", "deep/out", "--no-measure"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "started").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "stopped; nothing was saved" in said
    assert not (tmp_path / "deep").exists()
