"""MiniLM by ONNX Runtime's own tools: fused float32, dynamic int8, blockwise weights."""

import math
from pathlib import Path
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers.fusion_options import FusionOptions
from onnxruntime.transformers.optimizer import optimize_model
from torch import Tensor, nn

from benchmarks.peers.export import export
from benchmarks.peers.nbits import quantize_matmuls
from benchmarks.peers.quiet import quiet
from examples.models import minilm

_AXES = {0: "batch", 1: "seq"}


class PlainBert(nn.Module):
    """BERT's encoder spelt in elementary operators, as ONNX Runtime's fusions expect it; shares the given weights."""

    def __init__(self, bert: Any) -> None:
        super().__init__()
        self.embeddings: Any = bert.embeddings
        self.layers: Any = bert.encoder.layer
        self.heads: int = bert.config.num_attention_heads
        self.width: int = bert.config.hidden_size // self.heads

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Map int64 [batch, seq] token ids and mask to float32 hidden states [batch, seq, hidden]."""
        allowed = attention_mask.unsqueeze(1).unsqueeze(2).to(torch.float32)
        mask = (1.0 - allowed) * torch.finfo(torch.float32).min
        positions = self.embeddings.position_ids[:, : input_ids.shape[1]]
        x: Tensor = self.embeddings.word_embeddings(input_ids)
        x = x + self.embeddings.token_type_embeddings(torch.zeros_like(input_ids))
        x = self.embeddings.LayerNorm(x + self.embeddings.position_embeddings(positions))
        for layer in self.layers:
            attention = layer.attention
            attended = attention.output.dense(self._attend(attention.self, x, mask))
            x = attention.output.LayerNorm(attended + x)
            x = layer.output.LayerNorm(layer.output.dense(F.gelu(layer.intermediate.dense(x))) + x)
        return x

    def _attend(self, attention: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = (self._split(attention.get_submodule(name)(x)) for name in ("query", "key", "value"))
        scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(self.width) + mask
        context = torch.matmul(scores.softmax(-1), value).permute(0, 2, 1, 3).contiguous()
        return context.view((*context.size()[:-2], self.heads * self.width))

    def _split(self, x: Tensor) -> Tensor:
        return x.view((*x.size()[:-1], self.heads, self.width)).permute(0, 2, 1, 3)


def float32(folder: Path) -> Path:
    """Write the fastest float32 found: attention and GELU fused, but Add and LayerNormalization left as a pair.

    On a CPU, ONNX Runtime's SkipLayerNormalization takes about six times as long as they do.
    """
    return _fuse(folder, "minilm_float32.onnx", skip_norm=False)


def float32_fused(folder: Path) -> Path:
    """Write float32 with everything fused that ONNX Runtime's transformer optimizer fuses."""
    return _fuse(folder, "minilm_fused.onnx", skip_norm=True)


def float32_unfused(folder: Path) -> Path:
    """Write float32 in elementary operators; ONNX Runtime fuses what its session can."""
    inputs = minilm.tokenize(["Two sentences of", "unlike length make the example."])
    dynamic = {"input_ids": _AXES, "attention_mask": _AXES, "last_hidden_state": _AXES}
    return export(PlainBert(minilm.load()), inputs, "last_hidden_state", dynamic, folder / "minilm_plain.onnx")


def dynamic_int8(folder: Path, *, per_channel: bool = True, fused: bool = True) -> Path:
    """Write ONNX Runtime's dynamic int8: int8 weights, embeddings included, uint8 activations.

    Args:
        folder: where to write.
        per_channel: a scale for every output channel, or one for each matrix.
        fused: quantize the graph of `float32_fused` (QAttention), or the one of `float32_unfused`.
    """
    name = f"minilm_int8_per_{'channel' if per_channel else 'tensor'}{'' if fused else '_unfused'}.onnx"
    path = folder / name
    with quiet():
        quantize_dynamic(
            float32_fused(folder) if fused else float32_unfused(folder),
            path,
            per_channel=per_channel,
            weight_type=QuantType.QInt8,
            # Types cannot be inferred through the contrib operators of the fused graph.
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )
    return path


def blockwise(folder: Path, bits: int, block: int = 32) -> Path:
    """Write MatMulNBits weights of 4 or 8 bits, asymmetric, in blocks along the input; attention stays unfused."""
    return quantize_matmuls(float32_unfused(folder), folder / f"minilm_nbits{bits}.onnx", bits, block)


def _fuse(folder: Path, name: str, *, skip_norm: bool) -> Path:
    options = FusionOptions("bert")
    options.enable_embed_layer_norm = False  # it cannot be taken for a model without token types
    options.enable_skip_layer_norm = skip_norm
    plain, path = float32_unfused(folder), folder / name
    with quiet():
        model = optimize_model(
            str(plain), "bert", num_heads=12, hidden_size=384, optimization_options=options, opt_level=0
        )
        model.save_model_to_file(str(path))
    return path
