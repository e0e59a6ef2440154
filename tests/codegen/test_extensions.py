"""Lowerings that extensions register, and tests/plugin's: a third party's encoding all the way to ONNX Runtime."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import sparc
from sparc.api import registry
from sparc.artifact import Artifact
from sparc.capture import capture
from sparc.codegen.onnx.emission import OnnxEmission
from sparc.codegen.onnx.target import OnnxTarget
from sparc.diag import SparcError
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.parse import parse_spec
from sparc.program import Program
from sparc.recipe import Recipe
from sparc.target import EmitContext, KernelUse
from tests.codegen.emitting import assert_agrees, operators
from tests.codegen.encoding import encode_weights

X = torch.randn(3, 9, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(9, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.softsign(self.fc(x))


def emit(program: Program, lowerings: Mapping[Any, Any], flavour: str = "cpu") -> OnnxEmission:
    return OnnxTarget(flavour).emit(program, EmitContext(lowerings=lowerings))  # type: ignore[arg-type]


def encoded(spec: str) -> Program:
    return encode_weights(capture(Net(), (X,)), parse_spec(spec, registry().encodings))


def compiled(spec: str, **options: Any) -> Artifact:
    steps = f'[[steps]]\npass = "round"\nencoding = "{spec}"\nfloor = 5.0\n[[steps]]\npass = "encode"\n'
    recipe = Recipe.from_toml(steps, registry())
    return sparc.compile(Net(), (X,), recipe=recipe, measure=False, **options)


# the plugin's encoding ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flavour", ["portable", "cpu", "cuda"])
def test_the_plugins_lowering_stores_its_packed_codes(flavour: str) -> None:
    program = encoded("PowersOfTwo(levels=5)")
    emission = emit(program, registry().lowerings, flavour)
    assert {"Gather", "BitwiseAnd"} <= set(operators(emission))
    assert {stored.name for stored in emission.stored} == {"fc.weight_codes", "fc.weight_scale", "fc.bias"}
    assert emission.kernels["fc.weight"] == KernelUse("Gather, Mul", 8 * 9 * 4, "looked up when the file is loaded")
    assert_agrees(program, emission, [X])


def test_without_a_lowering_an_extensions_encoding_is_decoded_and_stored_dense() -> None:
    program = encoded("PowersOfTwo(levels=5)")
    emission = emit(program, {})
    assert "Gather" not in operators(emission)
    assert "ONNX has no operator for PowersOfTwo" in emission.kernels["fc.weight"].note
    assert_agrees(program, emission, [X])


def test_the_plugins_encoding_is_compiled_saved_and_loaded(tmp_path: Path) -> None:
    artifact = compiled("PowersOfTwo(levels=5)")
    artifact.save(tmp_path / "a")
    assert torch.equal(sparc.load(tmp_path / "a")(X), artifact(X))
    (row,) = artifact.ledger.sites
    assert (row.kernel, row.file_bytes, row.resident_bytes) == ("Gather, Mul", 8 * 5 + 8 * 4, 8 * 9 * 4)


# what any lowering may do ---------------------------------------------------------------------------------------------
def test_an_operators_lowering_comes_first() -> None:
    def softsign(e: Any, node: Any) -> Any:
        x = e.value(node.args[0])
        return e.op("Softsign", x) if str(node.target) == "aten.div.Tensor" else None

    program = capture(Net(), (X,))
    divided = next(node for node in program.main.graph.nodes if str(node.target) == "aten.div.Tensor")
    assert divided.args[0].target is torch.ops.aten.linear.default
    assert "Softsign" not in operators(emit(program, {}))
    for key in [("onnx", "aten.div.Tensor"), ("onnx", "aten.div"), ("onnx:portable", "aten.div.Tensor")]:
        emission = emit(program, {key: softsign}, "portable")
        assert "Softsign" in operators(emission)
        assert_agrees(program, emission, [X])
    assert "Softsign" not in operators(emit(program, {("onnx:cuda", "aten.div"): softsign}, "portable"))


def test_a_flavours_own_lowering_is_tried_before_the_familys() -> None:
    calls: list[str] = []

    def family(e: Any, node: Any) -> None:
        calls.append("family")

    def flavour(e: Any, node: Any) -> None:
        calls.append("flavour")

    emit(capture(Net(), (X,)), {("onnx", "aten.linear"): family, ("onnx:cuda", "aten.linear"): flavour}, "cuda")
    assert calls == ["flavour", "family"]


def test_an_encodings_lowering_may_take_the_whole_product_of_an_encoding_of_ours() -> None:
    seen: list[str] = []

    def product(e: Any, node: Any, weight: Any) -> Any:
        seen.append(f"{node.target} {weight.spec}")
        return None

    program = encode_weights(capture(Net(), (X,)), IntGrid(8))
    before = operators(emit(program, {}))
    assert operators(emit(program, {("onnx", "IntGrid"): product})) == before
    assert seen[0].startswith("aten.linear.default IntGrid(")


def test_a_lowering_that_says_nothing_of_memory_counts_as_dense() -> None:
    def plain(e: Any, node: Any, weight: Any) -> Any:
        if str(node.target) != "aten.linear.default":
            return None
        dense = weight.spec.decode(weight.tensors(e.program), weight.shape, torch.float32)
        return e.op("Gemm", node.args[0], e.derived("mine", dense), node.args[2], transB=1)

    program = encode_weights(capture(Net(), (X,)), IntGrid(8))
    emission = emit(program, {("onnx", "IntGrid"): plain})
    assert operators(emission)[0] == "Gemm"
    assert emission.kernels["fc.weight"] == KernelUse("linear", 8 * 9 * 4, "by an extension's lowering")
    assert_agrees(program, emission, [X])


def test_what_a_lowering_raises_names_it_and_the_users_line() -> None:
    def broken(e: Any, node: Any) -> Any:
        raise KeyError("scale")

    with pytest.raises(sparc.SparcError) as caught:
        emit(capture(Net(), (X,)), {("onnx", "aten.linear.default"): broken})
    found = caught.value.diagnostic
    assert found.code.id == "SPARC408"
    assert "aten.linear.default for onnx" in found.what
    assert f"{__name__}." in found.why
    assert "broken: KeyError: 'scale'" in found.why
    assert "test_extensions.py" in found.where.source


@pytest.mark.parametrize("answer", [0, "Gemm", [], [1]])
def test_what_is_no_onnx_value_is_refused(answer: Any) -> None:
    with pytest.raises(sparc.SparcError, match="neither None nor") as caught:
        emit(capture(Net(), (X,)), {("onnx", "aten.linear"): lambda e, node: answer})
    assert caught.value.code == "SPARC408"


def test_a_wrong_lowering_does_not_pass_the_check_of_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparc_plugin_example import onnx_lowering

    twice = [2 * value for value in onnx_lowering._MEANINGS]
    monkeypatch.setattr(onnx_lowering, "_MEANINGS", twice)
    with pytest.raises(sparc.SparcError) as caught:
        compiled("PowersOfTwo(levels=5)")
    assert caught.value.code == "SPARC402"
    assert caught.value.diagnostic.where.module == "fc"


def test_a_lowering_of_the_wrong_shape_is_no_valid_model() -> None:
    def flat(e: Any, node: Any) -> ir.Value:
        return e.op("Reshape", e.value(node.args[0]), [-1])  # type: ignore[no-any-return]

    program = capture(Net(), (X,))
    emission = emit(program, {("onnx", "aten.linear"): flat})
    with pytest.raises(sparc.SparcError):
        emission.check(program, {"forward": [X]}, {})


def test_the_plugins_kernels_compute_its_encoding(tmp_path: Path) -> None:
    artifact = compiled("PowersOfTwo(levels=5)", target="cuda:sm_90", options={"verify_kernels": False})
    assert artifact.emission.kernels["fc.weight"].operator.startswith("product")
    assert any("tl.exp2" in text for name, text in artifact.sources.items() if name.startswith("product"))
    (expected,), (found,) = artifact.program.run_flat([X]), artifact.run_flat([X])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    loaded = sparc.load(artifact.save(tmp_path / "a"))
    assert loaded.sources == artifact.sources
    assert torch.equal(loaded(X), artifact(X))


def test_a_broken_triton_lowering_is_named() -> None:
    def broken(*given: Any) -> Any:
        raise ValueError("no idea")

    target = registry().target("cuda:sm_90")
    context = EmitContext(lowerings={("cuda", "PowersOfTwo"): broken})
    with pytest.raises(SparcError) as error:
        target.emit(encoded("PowersOfTwo(levels=5)"), context)
    assert error.value.code == "SPARC408"
    assert "no idea" in str(error.value)
