"""Masked weights (N:M, blocks) in ONNX: no operator skips zeros, so every element's code is stored, and only those."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparc
from sparc.artifact import Artifact
from sparc.capture import capture
from sparc.encoding.base import Encoding
from sparc.encoding.blocks import Blocks
from sparc.encoding.dense import Dense
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.nm import NM
from sparc.encoding.unstructured import Unstructured
from sparc.ledger import Ledger
from sparc.passes.encode import Encode
from sparc.passes.prune import Prune
from sparc.passes.round import Round
from sparc.program import Program
from sparc.serialize.masked import masked_from_json, masked_to_json, pick
from sparc.target import Masked, StoredTensor
from tests.artifacts import code_of, content
from tests.codegen.emitting import FLAVOURS, assert_agrees, emit
from tests.codegen.encoding import encode_weights, quantize_input

WITHOUT_ZERO = IntGrid(8, zero="minimum", symmetric=False)
INNER = [Dense(), IntGrid(8), IntGrid(4, 32), IntGrid(4, 12, symmetric=False), WITHOUT_ZERO]
MASKS = [mask(of=inner) for mask in (NM, lambda of: NM(1, 4, of), lambda of: Blocks((7, 16), of)) for inner in INNER]
MASKS += [Unstructured(), Unstructured(IntGrid(4, 12, symmetric=False)), Unstructured(WITHOUT_ZERO)]
MASKS += [Blocks((1, "all"), IntGrid(8)), Blocks(("all", 1), IntGrid(4, 32))]


class Net(nn.Module):
    """A product, a table and a transposed matrix."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.fc = nn.Embedding(12, 64), nn.Linear(64, 36)
        self.matrix = nn.Parameter(torch.randn(36, 20))
        with torch.no_grad():  # a block of each matrix
            self.table.weight[:7, :16] = self.fc.weight[:7, 16:32] = self.matrix[:16, :7] = 0

    def forward(self, ids: Tensor) -> Tensor:
        return torch.relu(self.fc(self.table(ids))) @ self.matrix


IDS = torch.arange(12).reshape(3, 4)


@functools.cache
def captured() -> Program:
    return capture(Net(), (IDS,))


def artifact(spec: Encoding, flavour: str, only: str = "") -> Artifact:
    program = encode_weights(captured(), spec, only)
    return Artifact(program, Ledger(), [], emit(program, flavour))


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("spec", MASKS, ids=str)
def test_each_weight_is_stored_once_and_comes_back_bitwise(spec: Encoding, flavour: str, tmp_path: Path) -> None:
    made = artifact(spec, flavour)
    assert_agrees(made.program, made.emission, [IDS], 1e-5)
    loaded = sparc.load(made.save(tmp_path / "a"))
    for name, tensor in made.program.weights.items():
        again = loaded.program.weights[name]
        assert torch.equal(again.view(torch.uint8), tensor.view(torch.uint8)), name
        assert again.dtype == tensor.dtype
    assert torch.equal(loaded(IDS), made(IDS))
    assert content(loaded.save(tmp_path / "b")) == content(tmp_path / "a")
    rows = json.loads((tmp_path / "a" / "program.json").read_text())["weights"]
    for weight in ("table.weight", "fc.weight", "matrix"):
        dense = next((each for each in made.emission.stored if each.name == weight), None)
        if spec.of == WITHOUT_ZERO:  # its zeros have no code, so the decoded weight is stored
            assert dense is not None
            assert dense.weight is None
        else:
            assert rows[f"{weight}_codes"]["masked"]["spec"] == str(spec)
        assert "masked" not in rows[f"{weight}_{spec.part_names[-1]}"]


def test_the_target_that_reads_kept_codes_stores_nothing_else(tmp_path: Path) -> None:
    compiled = sparc.compile(Net(), (IDS,), recipe="sparse24-w8", target="reference", measure=False)
    compiled.save(tmp_path / "a")
    assert '"masked":' not in (tmp_path / "a" / "program.json").read_text()


@pytest.mark.parametrize(("pattern", "density"), [(Unstructured(), 0.5), (NM(2, 4), None), (Blocks((1, "all")), 0.5)])
def test_what_sweeps_pruned_and_rounded_comes_back(
    pattern: NM | Blocks | Unstructured, density: float | None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16)).eval(), torch.randn(64, 32)
    steps = [Prune(pattern, density, method="sparsegpt"), Round(IntGrid(4, 16), method="gptq"), Encode()]
    made = sparc.compile(model, (x,), recipe=steps, target="onnx", measure=False)
    for row in made.ledger.sites:
        assert row.encoding == str(pattern.around(IntGrid(4, 16)))
        codes = made.program.weights[f"{row.weight}_codes"]
        assert codes.nbytes == (32 * 48 if row.weight == "0.weight" else 48 * 16) // 4
    loaded = sparc.load(made.save(tmp_path / "a"))
    assert torch.equal(loaded(x), made(x))
    torch.testing.assert_close(made(x), made.program.run(x), rtol=1e-4, atol=1e-4)


# the report -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("recipe", "mask_bytes"), [("sparse24-w8", 36 * 64 // 8), ("blocks64-w8", None)])
@pytest.mark.parametrize("target", ["onnx", "onnx:portable", "onnx:cuda"])
def test_the_report_counts_what_is_stored_and_says_why(
    recipe: str, mask_bytes: int | None, target: str, tmp_path: Path
) -> None:
    made = sparc.compile(Net(), (IDS,), recipe=recipe, target=target, measure=False)
    made.save(tmp_path / "a")
    row = next(row for row in made.ledger.sites if row.weight == "fc.weight")
    if mask_bytes is not None:
        assert row.file_bytes == 36 * 64 + 36 * 4 + mask_bytes
        assert "ONNX has no operator for" in row.note
        assert any(each.code.id == "SPARC403" and "fc.weight" in each.what for each in made.diagnostics)
    from safetensors import safe_open

    with safe_open(str(tmp_path / "a" / "weights.safetensors"), "pt") as file:
        names = file.keys()
        held = sum(file.get_tensor(name).nbytes for name in names)
    assert made.ledger.summary.file_bytes == held


def test_static_convolutions_say_so_too() -> None:
    class Convolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    x = torch.randn(2, 4, 9, 9)
    program = quantize_input(encode_weights(capture(Convolution(), (x,)), NM(of=IntGrid(8))), "static")
    emission = emit(program)
    assert_agrees(program, emission, [x], 1e-5)
    assert "ONNX has no operator for the zeros of NM" in emission.kernels["conv.weight"].note


# what strangers write -------------------------------------------------------------------------------------------------
GOOD = {"spec": "NM(n=2, m=4, of=IntGrid(bits=8))", "shape": [2, 8], "parts": {"positions": "p"}}


@pytest.mark.parametrize(
    "change",
    [
        {"spec": "IntGrid()"},
        {"spec": "Blocks(size=(2, 2))"},
        {"shape": [2, 12]},
        {"shape": [4, 8]},
        {"parts": {"positions": "long"}},
        {"parts": {"pointers": "p"}},
        {"parts": {}},
        {"spec": "Unstructured(of=IntGrid(bits=8))"},
        {"spec": "Unstructured(of=IntGrid(bits=8))", "parts": {"bitmap": "long"}},
    ],
)
def test_what_does_not_belong_together_is_refused(change: dict[str, Any]) -> None:
    weights = {"p": torch.zeros(2, 1, dtype=torch.uint8), "long": torch.zeros(2, 5, dtype=torch.uint8)}
    stored = StoredTensor(
        "codes", torch.zeros(2, 8, dtype=torch.int8), "w", "identity", masked_from_json(GOOD | change)
    )
    with pytest.raises((ValueError, RuntimeError)):
        pick(stored, weights.__getitem__, sparc.encoding.parse.parse_spec)


def test_a_bitmap_picks_what_it_keeps() -> None:
    masked = Masked("Unstructured(of=IntGrid(bits=8))", (2, 8), {"bitmap": "p"})
    stored = StoredTensor("codes", torch.arange(16, dtype=torch.int8).reshape(2, 8), "w", "identity", masked)
    bitmap = torch.tensor([[0b00000101], [0b10000000]], dtype=torch.uint8)
    picked = pick(stored, {"p": bitmap}.__getitem__, sparc.encoding.parse.parse_spec)
    assert picked.tolist() == [[0, 2, 15]]


def test_pointers_must_fit_their_indices() -> None:
    spec = Blocks((2, 2))
    for pointers in ([0, 2**30], [0, -1], [3, 0], [0, 1]):
        parts = {"pointers": torch.tensor(pointers, dtype=torch.int32), "indices": torch.zeros(2, dtype=torch.int32)}
        with pytest.raises(ValueError, match="pointers"):
            spec.mask(parts, (2, 4))


def test_a_mask_is_read_back() -> None:
    masked = Masked("NM()", (2, 8), {"positions": "p"})
    assert masked_from_json(json.loads(json.dumps(masked_to_json(masked)))) == masked


@pytest.mark.parametrize("change", [{"shape": [8]}, {"shape": [-1, 8]}, {"spec": 3}, {"parts": {"p": 1}}, {"more": 1}])
def test_a_malformed_mask_is_sparc503(change: dict[str, Any]) -> None:
    assert code_of(lambda: masked_from_json(GOOD | change)) == "SPARC503"


def test_altered_codes_of_dropped_elements_are_noticed(tmp_path: Path) -> None:
    folder = artifact(NM(of=IntGrid(8)), "portable").save(tmp_path / "a")
    file = folder / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert code_of(lambda: sparc.load(folder)) == "SPARC502"
