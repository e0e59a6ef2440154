"""Emissions: their files, their sharing of tensors, their refusals."""

import os
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

from sparc import layout
from sparc.capture import capture, capture_entries
from sparc.codegen.onnx.check import check_parity, difference
from sparc.codegen.onnx.emission import OnnxEmission
from sparc.codegen.onnx.target import OnnxTarget
from sparc.diag import ArtifactError, LoweringError
from sparc.encoding.int_grid import IntGrid
from sparc.program import Program
from sparc.target import EmitContext, Span
from tests.codegen.emitting import FLAVOURS, assert_agrees, emit
from tests.codegen.encoding import encode_weights


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": self.second(self.first(x).relu()), "same": x}


X = torch.randn(3, 32)


def program(grid: IntGrid | None = None) -> Program:
    torch.manual_seed(5)
    made = capture(Model(), (X,), dynamic={"x": {0: "batch"}})
    return encode_weights(made, grid) if grid is not None else made


def run_file(path: Path) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["y"], {"x": X.numpy()})[0])


def spans(data: bytes, emission: OnnxEmission) -> dict[str, Span]:
    import json

    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    offsets = {each.name: header[each.name]["data_offsets"] for each in emission.stored}
    return {name: Span(8 + size + start, end - start) for name, (start, end) in offsets.items()}


@pytest.mark.parametrize("grid", [None, IntGrid(4, 16), IntGrid(4, 16, symmetric=False)], ids=str)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_files_read_their_weights_from_safetensors(grid: IntGrid | None, flavour: str, tmp_path: Path) -> None:
    made = program(grid)
    emission = emit(made, flavour)
    weights = save({each.name: each.tensor for each in emission.stored})
    (tmp_path / "weights.safetensors").write_bytes(weights)
    files = emission.files(spans(weights, emission))
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert difference(run_file(tmp_path / "model.onnx"), made.run_flat([X])[0]) < 1e-5
    loaded = OnnxTarget(flavour).load(made, files, emission.stored, EmitContext())  # type: ignore[arg-type]
    assert_agrees(made, loaded, [X], 1e-5)


@pytest.mark.parametrize("beside", [False, True])
def test_export(beside: bool, tmp_path: Path) -> None:
    made = program(IntGrid(4, 16))
    emit(made).export_onnx(tmp_path / "a.onnx", external_data=beside)
    assert sorted(each.name for each in tmp_path.iterdir()) == (["a.onnx", "a.onnx.data"] if beside else ["a.onnx"])
    assert difference(run_file(tmp_path / "a.onnx"), made.run_flat([X])[0]) < 1e-5
    onnx.checker.check_model(str(tmp_path / "a.onnx"), full_check=True)


def test_a_failed_export_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.onnx").write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArtifactError, match="SPARC505"):
        emit(program()).export_onnx(tmp_path / "a.onnx")
    assert [each.name for each in tmp_path.iterdir()] == ["a.onnx"]
    assert (tmp_path / "a.onnx").read_bytes() == b"old"


def test_equal_programs_give_equal_bytes_without_machine_paths() -> None:
    first, second = (emit(program(IntGrid(4, 16))) for _ in range(2))
    content = first.models["forward"].SerializeToString(deterministic=True)
    assert content == second.models["forward"].SerializeToString(deterministic=True)
    assert str(Path(__file__).parents[2]).encode() not in content
    assert first.models["forward"].producer_name == "sparc"


def test_names_of_inputs_outputs_and_dimensions_are_the_users() -> None:
    graph = emit(program()).models["forward"].graph
    assert [each.name for each in graph.input] == ["x"]
    assert [each.name for each in graph.output] == ["y", "same"]
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_entries_share_stored_tensors() -> None:
    entries = {
        "prefill": {"example_inputs": (torch.randn(4, 32),), "dynamic": {"x": {0: "rows"}}},
        "decode": {"example_inputs": (torch.randn(1, 32),)},
    }
    made = capture_entries(Model(), entries)
    emission = emit(made)
    assert sorted(emission.files({each.name: Span(0, each.tensor.nbytes) for each in emission.stored})) == [
        "decode.onnx",
        "model.onnx",
    ]
    assert sum(each.tensor.nbytes for each in emission.stored) == made.weights.nbytes
    for name, rows in (("prefill", 7), ("decode", 1)):
        x = torch.randn(rows, 32)
        got, want = emission.runner(name)([x]), made.run_flat([x], entry=name)
        assert difference(got[0], want[0]) < 1e-5


@pytest.mark.parametrize("opset", range(18, 25))
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_opset(opset: int, flavour: str) -> None:
    for grid in (None, IntGrid(8), IntGrid(4, 16)):
        made = program(grid)
        emission = emit(made, flavour, opset=opset)
        assert emission.models["forward"].opset_import[0].version == opset
        assert_agrees(made, emission, [X], 1e-5)


def test_an_unknown_opset_is_refused() -> None:
    with pytest.raises(LoweringError, match="SPARC407"):
        OnnxTarget("cpu", 9)


def test_parity_is_checked() -> None:
    made = program()
    run = emit(made).runner()
    assert all(each.difference < 1e-5 for each in check_parity(made, run, [X]))
    with pytest.raises(LoweringError, match="SPARC402"):
        check_parity(made, lambda inputs: [1.001 * each for each in run(inputs)], [X])


class Cancelling(nn.Module):
    """A sum that float32 gets right to a few digits only."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + 3000.0).sum(-1) - 3000.0 * x.shape[-1]


def test_parity_asks_no_more_than_float32_gives() -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    program = capture(Cancelling(), (x,))
    exact = program.run_flat([x], wide=True)[0]
    found = program.run_flat([x])[0]
    assert difference(found, exact) > 1e-4
    mirrored = (2 * exact - found).float()  # as far from exact as the program, on the other side
    (parity,) = check_parity(program, lambda inputs: [mirrored], [x])
    assert parity.difference > 1e-4
    with pytest.raises(LoweringError, match="SPARC402"):
        check_parity(program, lambda inputs: [(4 * exact - 3 * found).float()], [x])


class Unsupported(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(x)


def test_an_operator_without_translation_is_named_with_its_line() -> None:
    made = capture(Unsupported(), (torch.eye(3),))
    with pytest.raises(LoweringError, match="SPARC401") as caught:
        emit(made)
    assert "test_emission.py" in caught.value.diagnostic.where.source


def test_a_refused_model_is_a_diagnostic() -> None:
    emission = emit(program())
    emission.models["forward"].graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(LoweringError, match="SPARC406"):
        emission.runner()


@pytest.mark.parametrize(
    ("way", "tensor", "shape"),
    [
        ("identity", torch.arange(6).reshape(2, 3), None),
        ("transpose", torch.arange(6).reshape(2, 3), None),
        ("flip_sign", torch.tensor([[-128, 0, 127]], dtype=torch.int8), None),
        ("interleave", torch.randn(3, 6, 2), None),
        ("interleave+flip_sign", torch.randint(0, 255, (2, 4, 3), dtype=torch.uint8), None),
        ("transpose+flip_sign", torch.tensor([[0, 255], [3, 4]], dtype=torch.uint8), None),
        ("pack4", torch.randint(0, 16, (3, 5), dtype=torch.uint8), None),
        ("pad", torch.randint(0, 255, (3, 5), dtype=torch.uint8), (3, 8)),
        ("flip_sign+pad", torch.randint(-128, 127, (3, 5), dtype=torch.int8), (3, 8)),
        ("reshape", torch.arange(6).reshape(2, 3), (3, 2)),
    ],
)
def test_layouts_can_be_restored(way: str, tensor: Tensor, shape: tuple[int, ...] | None) -> None:
    stored = layout.store(way, tensor, shape)
    restored = layout.restore(way, stored, tensor.shape)
    assert restored.dtype == tensor.dtype
    assert torch.equal(restored, tensor)


def test_idle_threads_can_sleep() -> None:
    name = "session.intra_op.allow_spinning"
    spinning, sleeping = (emit(program()).runner(spin=spin).session.get_session_options() for spin in (True, False))  # type: ignore[attr-defined]
    assert sleeping.get_session_config_entry(name) == "0"
    with pytest.raises(RuntimeError, match=name):
        spinning.get_session_config_entry(name)
