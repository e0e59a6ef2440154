"""Mixtures of experts in ONNX: every flavour computes what the program computes, whichever expert gets which rows."""

import functools
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch

import sparc
from sparc.capture import capture
from sparc.codegen.onnx.check import check_model
from sparc.encoding.base import Encoding
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.microscaling import MXFP4
from sparc.encoding.nm import NM
from sparc.program import Program
from tests.architectures import ARCHITECTURES
from tests.codegen.emitting import FLAVOURS, assert_agrees, emit
from tests.codegen.encoding import encode_weights
from tests.mixtures import DYNAMIC, EXPERTS, ROUTES, Mixture, inputs

GRIDS: list[Encoding] = [
    IntGrid(8),
    IntGrid(8, "tensor"),
    IntGrid(8, symmetric=False, zero="minimum"),
    IntGrid(4, 16),
    IntGrid(4, 16, symmetric=False),
    IntGrid(4, 48, symmetric=False),
    IntGrid(4, 16, symmetric=False, zero="minimum"),
    IntGrid(3, 16),
    NM(2, 4, of=IntGrid(4, 16)),
    MXFP4(),
]
EXACT = 1e-5


@functools.cache
def mixture() -> Program:
    """Captured once; nothing edits it."""
    return capture(Mixture(), inputs("an expert without tokens"), dynamic=DYNAMIC)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("grid", [None, *GRIDS], ids=str)
def test_every_route(grid: Encoding | None, flavour: str) -> None:
    program = mixture() if grid is None else encode_weights(mixture(), grid)
    emission = emit(program, flavour)
    check_model(emission.models["forward"])
    for route in ROUTES:
        assert_agrees(program, emission, list(inputs(route)), EXACT)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("spelling", ["grouped_mm", "stored"])
def test_what_was_not_raised(spelling: str, flavour: str) -> None:
    program = capture(Mixture(spelling), inputs("33 tokens"), dynamic=DYNAMIC)
    assert "grouped_mm_fallback" in program.text()
    emission = emit(program, flavour)
    for route in ROUTES:
        assert_agrees(program, emission, list(inputs(route)), EXACT)


def nested(graph: onnx.GraphProto) -> list[str]:
    """The operators of a graph and of its branches."""
    found = []
    for node in graph.node:
        found.append(node.op_type)
        for attribute in node.attribute:
            found += nested(attribute.g)
    return found


@pytest.mark.parametrize(
    ("grid", "flavour", "operator"),
    [
        (IntGrid(4, 16), "cpu", "MatMulNBits"),
        (IntGrid(4, 16), "cuda", "MatMulNBits"),
        (IntGrid(4, 16), "portable", "DequantizeLinear, Gemm"),
        (IntGrid(8), "portable", "DequantizeLinear, Gemm"),
    ],
    ids=str,
)
def test_experts_stay_encoded(grid: IntGrid, flavour: str, operator: str) -> None:
    emission = emit(encode_weights(mixture(), grid), flavour)
    names = nested(emission.models["forward"].graph)
    for each in operator.split(", "):
        assert names.count(each) == 2 * EXPERTS
    up = emission.kernels["up"]
    assert up.operator == operator
    elements, scales = Mixture().up.numel(), EXPERTS * 96 * (2 if grid.bits == 4 else 1)
    assert up.resident_bytes == elements * grid.bits // 8 + 4 * scales
    stored = {each.name: each.tensor for each in emission.stored}
    assert stored["up_codes"].nbytes == elements * grid.bits // 8
    assert sum(each.nbytes for each in stored.values()) < Mixture().up.nbytes


def test_matrices_are_read_where_they_lie(tmp_path: Path) -> None:
    program = mixture()
    emission = emit(program, "cpu")
    emission.export_onnx(tmp_path / "model.onnx", external_data=True)
    held = sum(each.tensor.nbytes for each in emission.stored)
    assert held == Mixture().up.nbytes + Mixture().down.nbytes
    assert held <= (tmp_path / "model.onnx.data").stat().st_size < held + 4096 * (len(emission.stored) + 1)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    x, experts = inputs("33 tokens")
    (found,) = session.run(None, {"x": x.numpy(), "experts": experts.numpy()})
    (expected,) = program.run_flat([x, experts])
    assert torch.allclose(torch.from_numpy(found), expected, atol=EXACT)


FAMILIES = [
    (name, recipe, target)
    for name in ("mixtral", "qwen3_moe")
    for recipe in ("dense", "w8", "w4")
    for target in ("reference", "onnx", "onnx:portable")
]
QUICK = {("mixtral", "dense", "onnx"), ("qwen3_moe", "w8", "onnx:portable")}


@pytest.mark.parametrize(
    ("name", "recipe", "target"),
    [each if each in QUICK else pytest.param(*each, marks=pytest.mark.slow) for each in FAMILIES],
)
def test_families_of_transformers(name: str, recipe: str, target: str, tmp_path: Path) -> None:
    chosen = ARCHITECTURES[name]
    built = replace(chosen, options={**chosen.options, "num_hidden_layers": 1}).build().enlivened()
    artifact = sparc.compile(
        built.model, built.inputs, dynamic=built.dynamic, recipe=recipe, target=target, measure=False
    )
    artifact.save(tmp_path / "artifact")
    loaded = sparc.load(tmp_path / "artifact")
    for seq in (1, 7, 33):
        given = built.resized({"batch": 1, "seq": seq})
        found, expected = artifact(**given)["logits"], artifact.program.run(**given)["logits"]
        assert float((found - expected).abs().max()) < 2e-4 * float(expected.abs().max())
        assert torch.equal(loaded(**given)["logits"], found)
        if recipe == "dense":
            with torch.no_grad():
                eager = built.model(**given).logits
            assert float((found - eager).abs().max()) < EXACT * float(eager.abs().max())
