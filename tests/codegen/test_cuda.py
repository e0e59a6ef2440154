"""What the CUDA flavour leaves to the CPU, and that it says so."""

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from sparc.capture import capture
from sparc.codegen.onnx.cuda import kernel_table, uncovered
from sparc.encoding.int_grid import IntGrid
from tests.codegen.emitting import assert_agrees, emit, operators
from tests.codegen.encoding import encode_weights, quantize_input


def model(
    nodes: list[onnx.NodeProto], kind: int = TensorProto.FLOAT, outputs: int = TensorProto.FLOAT
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, ["a", "b"])],
        [helper.make_tensor_value_info("y", outputs, None)],
        [helper.make_tensor("one", TensorProto.INT64, [1], [1])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def whys(found: onnx.ModelProto) -> list[tuple[str, str]]:
    return [(each.operator, each.why) for each in uncovered(found)]


def test_the_table_knows_the_operators_the_flavour_counts_on() -> None:
    standard, contributed = kernel_table()[""], kernel_table()["com.microsoft"]
    assert {"MatMul", "Gemm", "Conv", "LayerNormalization", "Softmax", "Gather", "QuantizeLinear"} <= standard.keys()
    assert {"MatMulNBits", "MultiHeadAttention", "GatherBlockQuantized"} <= contributed.keys()
    assert "MatMulIntegerToFloat" not in contributed
    assert "DynamicQuantizeLinear" not in standard


def test_no_kernel() -> None:
    nodes = [helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "s", "z"], name="q")]
    assert whys(model(nodes, outputs=TensorProto.UINT8)) == [
        ("DynamicQuantizeLinear", "the CUDA provider has no kernel for it")
    ]


def test_no_kernel_for_a_type() -> None:
    nodes = [helper.make_node("ArgMax", ["x"], ["y"])]
    assert whys(model(nodes, TensorProto.INT32, TensorProto.INT64)) == [
        ("ArgMax", "the CUDA provider has no kernel for int32")
    ]
    assert whys(model(nodes, TensorProto.FLOAT, TensorProto.INT64)) == []


def test_size_computations_stay_on_the_cpu() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Concat", ["s", "one"], ["t"], axis=0),
        helper.make_node("Reshape", ["x", "t"], ["y"]),
    ]
    assert whys(model(nodes)) == [("Concat", "it computes sizes, which ONNX Runtime keeps on the CPU")]
    direct = [helper.make_node("Shape", ["x"], ["s"]), helper.make_node("Expand", ["x", "s"], ["y"])]
    assert whys(model(direct)) == []


class Masked(nn.Module):
    """Attention under a padding mask over positions, with dynamic sizes in every place models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.positions = nn.Embedding(20, 16), nn.Embedding(32, 16)
        self.q, self.k, self.norm, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 20)
        self.token = nn.Parameter(torch.randn(1, 1, 16))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        batch, length = ids.shape
        x = self.table(ids) + self.positions(torch.arange(length)) + self.token.expand(batch, length, -1)
        q, k = (f(x).view(batch, length, 4, 4).transpose(1, 2) for f in (self.q, self.k))
        visible = (mask[:, None, None, :] > 0).expand(batch, 1, length, length)
        y = nn.functional.scaled_dot_product_attention(q, k, k, visible)
        y = self.norm(x + y.transpose(1, 2).reshape(batch, length, 16))
        folded = y.flatten(0, 1).tanh().unflatten(0, (batch, length))
        return self.head(y + folded)


DYNAMIC = {"ids": {0: "batch", 1: "length"}, "mask": {0: "batch", 1: "length"}}


@pytest.mark.parametrize("grid", [None, IntGrid(8), IntGrid(4, 16)], ids=str)
def test_every_node_runs_on_cuda(grid: IntGrid | None) -> None:
    ids, mask = torch.randint(0, 20, (3, 7)), torch.ones(3, 7, dtype=torch.int64)
    program = capture(Masked(), (ids, mask), dynamic=DYNAMIC)
    program = encode_weights(program, grid) if grid is not None else program
    emission = emit(program, "cuda")
    assert uncovered(emission.models["forward"]) == []
    assert "MultiHeadAttention" in operators(emission)
    mask[1, 4:] = 0
    mask[2] = 0
    assert_agrees(program, emission, [ids, mask], 1e-5)
    assert_agrees(program, emission, [ids[:2, :4].contiguous(), mask[:2, :4].contiguous()], 1e-5)


def test_dynamic_quantization_runs_on_cuda() -> None:
    x = torch.randn(2, 5, 16)
    program = encode_weights(
        capture(nn.Sequential(nn.Linear(16, 8)), (x,), dynamic={"input": {0: "batch"}}), IntGrid(8)
    )
    for kind in ("tensor", "token"):
        emission = emit(quantize_input(program, kind), "cuda")
        assert uncovered(emission.models["forward"]) == []


def test_half_precision_runs_on_cuda_and_agrees_here() -> None:
    ids, mask = torch.randint(0, 20, (3, 7)), torch.ones(3, 7, dtype=torch.int64)
    program = encode_weights(capture(Masked().half(), (ids, mask), dynamic=DYNAMIC), IntGrid(4, 16))
    emission = emit(program, "cuda")
    assert uncovered(emission.models["forward"]) == []
    assert_agrees(program, emission, [ids, mask], 5e-3)


class Causal(nn.Module):
    """Causal attention and a mask of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(16, 16)

    def forward(self, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        q = self.q(x).view(*x.shape[:2], 4, 4).transpose(1, 2)
        attention = nn.functional.scaled_dot_product_attention
        causal, biased = attention(q, q, q, is_causal=True), attention(q, q, q, bias, scale=0.3)
        return causal.transpose(1, 2).flatten(2), biased.transpose(1, 2).reshape(x.shape)


def test_causal_and_biased_attention() -> None:
    x = torch.randn(2, 5, 16)
    hidden = torch.zeros(2, 1, 5, 5)
    hidden[1, 0, 2] = -torch.inf
    for bias in (torch.randn(5, 5), torch.randn(2, 4, 5, 5), torch.randn(1, 1, 5, 5), hidden):
        program = capture(Causal(), (x, bias))
        emission = emit(program, "cuda")
        assert operators(emission).count("MultiHeadAttention") == 2
        assert_agrees(program, emission, [x, bias], 1e-5)
