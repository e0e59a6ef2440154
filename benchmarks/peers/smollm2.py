"""SmolLM2 over whole sequences in ONNX Runtime: fused float32, and its own int8 and blockwise quantizers on it.

The graph is the one that onnxruntime-genai's model builder makes, without the cache: ONNX Runtime's optimizer fuses
neither attention nor rotary embedding in torch's exports of a Llama (which have 2,000 nodes instead of 400).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn

from benchmarks.peers.nbits import quantize_matmuls
from benchmarks.peers.quiet import quiet
from examples.models.smollm2 import FullSequence

_POSITIONS = 2048
_EPSILON = 1e-5
_CONTRIB = ("GroupQueryAttention", "QuickGelu", "SkipSimplifiedLayerNormalization")


class _Builder:
    """Collects nodes and initializers."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def constant(self, name: str, value: NDArray[np.generic]) -> str:
        """Add an initializer and return its name."""
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(self, operator: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> str:
        """Add a node named after its first output and return that output's name."""
        domain = "com.microsoft" if operator in _CONTRIB else ""
        self.nodes.append(helper.make_node(operator, inputs, outputs, outputs[0], domain=domain, **attributes))
        return outputs[0]

    def linear(self, x: str, weight: Tensor, name: str) -> str:
        """Add ``x @ weight.T``."""
        return self.node("MatMul", [x, self.constant(f"{name}.weight", weight.detach().numpy().T)], [name])

    def normalise(self, x: str, residual: str | None, norm: nn.Module, name: str) -> tuple[str, str]:
        """Add RMSNorm(x + residual), or of x where there is no residual yet; return it and the sum."""
        weight = self.constant(f"{name}.weight", norm.get_parameter("weight").detach().numpy())
        if residual is None:
            return self.node("SimplifiedLayerNormalization", [x, weight], [name], axis=-1, epsilon=_EPSILON), x
        outputs = [name, "", "", f"{name}.sum"]
        self.node("SkipSimplifiedLayerNormalization", [x, residual, weight], outputs, epsilon=_EPSILON)
        return outputs[0], outputs[3]


def float32(model: FullSequence, folder: Path) -> Path:
    """Write float32 with ONNX Runtime's fused attention, rotary embedding and normalisation."""
    graph = _Builder()
    attention_inputs = _attention_inputs(graph, model)
    embedding = model.model.embed_tokens.weight
    x = graph.node("Gather", [graph.constant("embedding", embedding.detach().numpy()), "input_ids"], ["embedded"])
    residual: str | None = None
    for index, layer in enumerate(model.model.layers):
        name = f"layers.{index}"
        h, residual = graph.normalise(x, residual, layer.input_layernorm, f"{name}.attention_norm")
        x = _attention(graph, h, layer.self_attn, attention_inputs, name)
        h, residual = graph.normalise(x, residual, layer.post_attention_layernorm, f"{name}.mlp_norm")
        x = _mlp(graph, h, layer.mlp, name)
    h, _ = graph.normalise(x, residual, model.model.norm, "norm")
    graph.linear(h, model.lm_head.weight, "logits")
    return _save(graph, folder / "smollm2_float32.onnx", embedding.shape[0])


def dynamic_int8(model: FullSequence, folder: Path) -> Path:
    """Write ONNX Runtime's dynamic int8, per channel, of the fused graph; the embedding table included."""
    path = folder / "smollm2_int8.onnx"
    with quiet():
        quantize_dynamic(
            float32(model, folder),
            path,
            per_channel=True,
            weight_type=QuantType.QInt8,
            # Types cannot be inferred through the contrib operators of the fused graph.
            extra_options={"DefaultTensorType": TensorProto.FLOAT},
        )
    return path


def blockwise(model: FullSequence, folder: Path, bits: int, block: int = 32) -> Path:
    """Write MatMulNBits weights of 4 or 8 bits in the fused graph; the embedding table stays float32."""
    return quantize_matmuls(float32(model, folder), folder / f"smollm2_nbits{bits}.onnx", bits, block)


def _attention_inputs(graph: _Builder, model: FullSequence) -> list[str]:
    """Add what GroupQueryAttention takes beside q, k, v: no cache, the lengths and the rotary tables."""
    angles = torch.arange(_POSITIONS)[:, None] * model.model.rotary_emb.inv_freq
    one = graph.constant("one", np.array([1], np.int32))
    batch = graph.node("Shape", ["input_ids"], ["batch_size"], start=0, end=1)
    seq = graph.node("Shape", ["input_ids"], ["seq_length_64"], start=1, end=2)
    seq = graph.node("Cast", [seq], ["seq_length"], to=TensorProto.INT32)
    last = graph.node("Expand", [graph.node("Sub", [seq, one], ["last"]), batch], ["last_per_row"])
    total = graph.node("Squeeze", [seq], ["total_length"])
    cos, sin = (graph.constant(f.__name__, f(angles).numpy()) for f in (torch.cos, torch.sin))
    return ["", "", last, total, cos, sin]


def _attention(graph: _Builder, x: str, attention: Any, others: Sequence[str], name: str) -> str:
    parts = [graph.linear(x, attention.get_parameter(f"{p}_proj.weight"), f"{name}.{p}") for p in "qkv"]
    config = attention.config
    attended = graph.node(
        "GroupQueryAttention",
        [*parts, *others],
        [f"{name}.attended", f"{name}.present_key", f"{name}.present_value"],
        num_heads=config.num_attention_heads,
        kv_num_heads=config.num_key_value_heads,
        do_rotary=1,
    )
    return graph.linear(attended, attention.get_parameter("o_proj.weight"), f"{name}.o")


def _mlp(graph: _Builder, x: str, mlp: nn.Module, name: str) -> str:
    gate = graph.linear(x, mlp.get_parameter("gate_proj.weight"), f"{name}.gate")
    silu = graph.node("QuickGelu", [gate], [f"{name}.silu"], alpha=1.0)  # x * sigmoid(alpha * x)
    up = graph.linear(x, mlp.get_parameter("up_proj.weight"), f"{name}.up")
    gated = graph.node("Mul", [silu, up], [f"{name}.gated"])
    return graph.linear(gated, mlp.get_parameter("down_proj.weight"), f"{name}.down")


def _save(graph: _Builder, path: Path, vocabulary: int) -> Path:
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "seq"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "seq", vocabulary])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    body = helper.make_graph(graph.nodes, "smollm2", [ids], [logits], graph.initializers)
    onnx.save(helper.make_model(body, opset_imports=opsets, ir_version=10), path)
    return path
