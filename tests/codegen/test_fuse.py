"""Regions that one operator computes: the operator is there, and the numbers are the program's."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparc.capture import capture
from sparc.codegen.onnx.check import check_model
from sparc.codegen.onnx.emission import OnnxEmission
from sparc.program import Program
from tests.codegen.emitting import FLAVOURS, assert_agrees, emit, operators

torch.manual_seed(0)
LENGTHS = {"x": {0: "batch", 1: "length"}}


class Attending(nn.Module):
    """Attention over split heads: `mask` is a function of the scores' batch and length."""

    def __init__(self, heads: int = 4, kv_heads: int = 4, mask: Any = None, **options: Any) -> None:
        super().__init__()
        self.q = nn.Linear(32, 8 * heads)
        self.k, self.v = nn.Linear(32, 8 * kv_heads), nn.Linear(32, 8 * kv_heads)
        self.mask, self.options = mask, {**options, "enable_gqa": heads != kv_heads}

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (f(x).view(batch, length, -1, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        mask = self.mask(x) if self.mask is not None else None
        y = F.scaled_dot_product_attention(q, k, v, mask, **self.options)
        return y.transpose(1, 2).reshape(batch, length, -1)


def emitted(
    model: nn.Module, x: Tensor, flavour: str = "cpu", dynamic: Mapping[str, Any] | None = LENGTHS, **options: Any
) -> tuple[Program, OnnxEmission]:
    """The program and its emission, valid and equal on the example and, if sizes vary, on a smaller one."""
    program = capture(model.eval(), (x,), dynamic=dynamic)
    emission = emit(program, flavour, **options)
    check_model(emission.models["forward"])
    assert_agrees(program, emission, [x])
    if dynamic:
        assert_agrees(program, emission, [x[:2, :3].contiguous()])
    return program, emission


MASKS = {
    "none": None,
    "keys": lambda x: (x[:, :, 0] > -1)[:, None, None, :],
    "keys_float": lambda x: x[:, None, None, :, 0],
    "rows": lambda x: (x @ x.transpose(1, 2) > 0)[:, None],
    "shared": lambda x: x[0] @ x[0].T > -5,
    "heads": lambda x: torch.stack([x @ x.transpose(1, 2)] * 4, 1),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    _, emission = emitted(Attending(mask=MASKS[name]), torch.randn(3, 5, 32))
    found = operators(emission)
    assert found.count("Attention") == 1
    assert "Softmax" not in found


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("flavour", "opset"), [("cpu", 21), ("portable", 21), ("portable", 23), ("cuda", 21)])
def test_masks_elsewhere(name: str, flavour: str, opset: int) -> None:
    _, emission = emitted(Attending(mask=MASKS[name]), torch.randn(3, 5, 32), flavour, opset=opset)
    found = operators(emission)
    fused = (
        {"cuda": "MultiHeadAttention", "portable": "Attention"}.get(flavour)
        if opset == 23 or flavour == "cuda"
        else None
    )
    assert ("Softmax" in found) == (fused is None)
    assert fused is None or found.count(fused) == 1


@pytest.mark.parametrize("options", [{"is_causal": True}, {"scale": 0.3}, {"is_causal": True, "scale": 1.0}], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_causal_scaled_grouped(options: dict[str, Any], kv_heads: int, flavour: str) -> None:
    _, emission = emitted(Attending(4, kv_heads, **options), torch.randn(3, 5, 32), flavour)
    if flavour == "cpu":
        assert "Attention" in operators(emission)


def test_heads_are_not_moved_around_attention() -> None:
    _, emission = emitted(Attending(4, 2, is_causal=True), torch.randn(3, 5, 32))
    assert operators(emission).count("Attention") == 1
    assert not {"Transpose", "Reshape", "Expand"} & set(operators(emission))


HIDING = {
    "false": torch.tensor([[True, True], [False, False]]),
    "infinity": torch.tensor([[0.0, 0.5], [float("-inf"), float("-inf")]]),
    "lowest": torch.tensor([[0.0, 0.5], [torch.finfo(torch.float32).min] * 2]),
    "both": torch.tensor([[0.0, float("-inf")], [torch.finfo(torch.float32).min, float("-inf")]]),
}


@pytest.mark.parametrize("name", HIDING)
@pytest.mark.parametrize(("flavour", "opset"), [("cpu", 23), ("cpu", 21), ("portable", 23), ("cuda", 21)])
def test_rows_that_see_nothing(name: str, flavour: str, opset: int) -> None:
    """Zero where every key is masked by False or -inf; the plain mean under the lowest finite number."""
    model = Attending(mask=lambda x: HIDING[name])
    emitted(model, torch.randn(2, 2, 32), flavour, dynamic=None, opset=opset)


class Crossed(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        y = F.scaled_dot_product_attention(q, k, v)
        return y, F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_more_keys_than_queries_and_wider_values(flavour: str) -> None:
    inputs = [torch.randn(2, 4, 3, 8), torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 16)]
    program = capture(Crossed(), tuple(inputs))
    emission = emit(program, flavour)
    check_model(emission.models["forward"])
    assert_agrees(program, emission, inputs)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_one_key_head_for_all(flavour: str) -> None:
    """Torch broadcasts a single head without being asked for groups."""
    inputs = [torch.randn(2, 4, 3, 8), torch.randn(2, 1, 6, 8), torch.randn(2, 1, 6, 8)]
    program = capture(Crossed(), tuple(inputs))
    emission = emit(program, flavour)
    assert_agrees(program, emission, inputs)
    assert ("Attention" in operators(emission)) == (flavour == "cpu")


def test_attention_without_batch_or_in_float64_stays_plain() -> None:
    for inputs in ([torch.randn(4, 3, 8)] * 3, [torch.randn(2, 4, 3, 8, dtype=torch.float64)] * 3):
        program = capture(Crossed(), tuple(each.clone() for each in inputs))
        emission = emit(program, "cpu")
        assert_agrees(program, emission, inputs)
        assert "Attention" not in operators(emission)


class Shown(Attending):
    """Attention whose split heads are read as well."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, 4, 8).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, q, q)
        return y, y.transpose(1, 2) + 1, y.transpose(1, 2).reshape(batch, length, 32)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_heads_that_are_read_elsewhere_are_still_there(flavour: str) -> None:
    emitted(Shown(), torch.randn(3, 5, 32), flavour)


# norms ----------------------------------------------------------------------------------------------------------------
class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.fc(x) + x) + x


def test_residual_of_a_layer_norm_is_a_sum() -> None:
    """ONNX Runtime would merge an Add into its slow SkipLayerNormalization; other additions stay Add."""
    for flavour, expected in (("cpu", 1), ("portable", 0), ("cuda", 0)):
        _, emission = emitted(Residual(), torch.randn(2, 3, 16), flavour, {"x": {0: "batch"}})
        found = operators(emission)
        assert (found.count("Sum"), found.count("Add")) == (expected, 3 - expected)


def test_equal_programs_give_equal_bytes() -> None:
    x = torch.randn(3, 5, 32)
    model = Attending(4, 2, is_causal=True).eval()
    made = [emit(capture(model, (x,), dynamic=LENGTHS), "cpu").models["forward"] for _ in range(2)]
    assert made[0].SerializeToString(deterministic=True) == made[1].SerializeToString(deterministic=True)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_half_precision_for_cuda(kv_heads: int) -> None:
    """Fused in half precision, grouped heads too; without the provider the same file runs on the CPU."""
    x = torch.randn(3, 5, 32).half()
    program = capture(Attending(4, kv_heads, is_causal=True).half().eval(), (x,), dynamic=LENGTHS)
    emission = emit(program, "cuda")
    check_model(emission.models["forward"])
    assert_agrees(program, emission, [x], 2e-3)
    assert ("MultiHeadAttention" if kv_heads == 4 else "GroupQueryAttention") in operators(emission)
    sizes = [row["why"] for row in emission.without_kernel()]
    assert all("computes sizes" in why for why in sizes)


def test_what_has_no_cuda_kernel_is_named() -> None:
    _, emission = emitted(Residual(), torch.randn(2, 3, 16), "cuda", {"x": {0: "batch"}})
    assert emission.without_kernel() == []
    model = emission.models["forward"]
    node = next(each for each in model.graph.node if each.op_type == "MatMul")
    node.op_type, node.domain = "DynamicQuantizeMatMul", "com.microsoft"
    model.opset_import.add(domain="com.microsoft", version=1)
    first = emission.without_kernel()[0]
    assert (first["operator"], first["why"]) == ("DynamicQuantizeMatMul", "the CUDA provider has no kernel for it")
