"""GGUF's metadata and tensor names, for decoders of Llama's kind, as transformers' config and parameter names.

llama.cpp's converter (convert_hf_to_gguf.py) renames tensors, interleaves the rows of Llama's q and k so that rotary
pairs are neighbours, and adds 1 to the gains of Gemma's norms; all three are undone here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sparc import codes
from sparc.checkpoint import build
from sparc.checkpoint.base import Checkpoint, StoredWeight, malformed, unknown
from sparc.checkpoint.gguf import Container, read_container
from sparc.checkpoint.gguf_blocks import stored_weight
from sparc.checkpoint.gguf_tokenizer import read_tokenizer
from sparc.diag import CaptureError

_PARTS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAME = re.compile(r"(?:blk\.(?P<layer>\d{1,6})\.)?(?P<part>[a-z_]+)\.(?P<kind>weight|bias)")
_FREQUENCIES = "rope_freqs.weight"
_LIMIT = 1 << 31
_MISSING = object()


@dataclass(frozen=True)
class _Architecture:
    """What differs between the kinds.

    Args:
        owner: the class of transformers.
        config: the class of its config.
        interleaved: whether the rows of q and k are interleaved.
        gain: what the stored gains of norms have too much.
        options: of the config.
    """

    owner: str
    config: str
    interleaved: bool = False
    gain: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)


_ARCHITECTURES = {
    "llama": _Architecture("LlamaForCausalLM", "LlamaConfig", interleaved=True),
    "qwen2": _Architecture("Qwen2ForCausalLM", "Qwen2Config"),
    "qwen3": _Architecture("Qwen3ForCausalLM", "Qwen3Config"),
    "gemma": _Architecture(
        "GemmaForCausalLM", "GemmaConfig", gain=1.0, options={"hidden_activation": "gelu_pytorch_tanh"}
    ),
}


def read_gguf(path: Path) -> Checkpoint:
    """The model in a GGUF file.

    Raises:
        CaptureError: SPARC110 when transformers is missing, SPARC116 to SPARC119 for a file that is cut short,
            contradicts itself, is of an unknown kind, or whose weights are not those of its architecture; SPARC106 for
            weights that are not finite.
    """
    file = read_container(path)
    name = _Metadata(file, "general").value("architecture", str)
    if name not in _ARCHITECTURES:
        raise unknown(f"{path.name} holds a model of the architecture {name!r}", f"one of {', '.join(_ARCHITECTURES)}")
    kind, transformers = _ARCHITECTURES[name], build.transformers_package()
    source = f"{path.name} ({name})"
    described = _config(file, name, kind)
    with build.quiet(), build.explained(source):
        config = getattr(transformers, kind.config)(**described)
    build.check_depth(config, len(file.tensors), source)
    weights = _weights(file, described, kind, source)
    checkpoint = build.build(getattr(transformers, kind.owner), config, weights, source)
    _scale_frequencies(checkpoint.model, file, source)
    chat = file.metadata.get("tokenizer.chat_template")
    return replace(checkpoint, tokenizer=read_tokenizer(file.metadata), chat=chat if isinstance(chat, str) else None)


class _Metadata:
    """Typed access to the entries under a prefix."""

    def __init__(self, file: Container, prefix: str) -> None:
        self.entries, self.prefix = file.metadata, prefix

    def value(self, key: str, kind: Any, default: Any = _MISSING) -> Any:
        """An entry; a number is positive and bounded."""
        found = self.entries.get(f"{self.prefix}.{key}", default)
        if found is _MISSING:
            raise malformed(f"the metadata {self.prefix}.{key} is missing")
        if found is default:
            return found
        if kind is float and type(found) is int:
            found = float(found)
        if type(found) is not kind or (kind in (int, float) and not 0 < found < _LIMIT):
            raise malformed(f"the metadata {self.prefix}.{key} is {str(found)[:40]!r}")
        return found


def _config(file: Container, name: str, kind: _Architecture) -> dict[str, Any]:
    """The arguments of the config."""
    given = _Metadata(file, name)
    for key in ("expert_count", "rope.scaling.type"):
        value = file.metadata.get(f"{name}.{key}", 0)
        if value not in (0, "none", "linear"):
            raise unknown(f"{name}.{key} is {str(value)[:40]!r}")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise malformed("there is no token_embd.weight of two dimensions")
    heads, width = given.value("attention.head_count", int), given.value("embedding_length", int)
    head = given.value("attention.key_length", int, width // heads)
    if (
        given.value("attention.value_length", int, head) != head
        or given.value("rope.dimension_count", int, head) != head
    ):
        raise unknown(f"{name} with heads that are rotated in part, or of several widths")
    rotary = {"rope_type": "default", "rope_theta": given.value("rope.freq_base", float, 10000.0)}
    if file.metadata.get(f"{name}.rope.scaling.type") == "linear":
        rotary |= {"rope_type": "linear", "factor": given.value("rope.scaling.factor", float)}
    return {
        "vocab_size": embedding.shape[0],
        "hidden_size": width,
        "intermediate_size": given.value("feed_forward_length", int),
        "num_hidden_layers": given.value("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": given.value("attention.head_count_kv", int, heads),
        "head_dim": head,
        "max_position_embeddings": given.value("context_length", int),
        # stored in float32, written with fewer digits by people
        "rms_norm_eps": float(f"{given.value('attention.layer_norm_rms_epsilon', float):.6g}"),
        "rope_parameters": rotary,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_output.bias" in file.tensors,
        **_tokens(file, embedding.shape[0]),
        **kind.options,
    }


def _tokens(file: Container, vocabulary: int) -> dict[str, int | None]:
    """The numbers of special tokens; those that are no tokens are left out."""
    names = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    found = {key: file.metadata.get(f"tokenizer.ggml.{name}") for key, name in names.items()}
    return {key: each if type(each) is int and 0 <= each < vocabulary else None for key, each in found.items()}


def _weights(file: Container, config: Mapping[str, Any], kind: _Architecture, source: str) -> dict[str, StoredWeight]:
    weights = {}
    for name, info in file.tensors.items():
        if name == _FREQUENCIES:
            continue
        target, part = _parameter_name(name, source)
        shape, rows = info.shape, file.rows(name)
        if len(shape) > 2:
            raise build.mismatch(source, [f"{name!r} has the shape {list(shape)}"])
        if kind.interleaved and part in ("attn_q", "attn_k"):
            heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
            rows = _deinterleaved(rows.reshape(shape[0], -1), heads, name)
        weight = stored_weight(info.block, rows, target)
        dense = weight.dense.reshape(shape)
        if kind.gain and part.endswith("norm"):
            dense = dense - kind.gain
        weights[target] = StoredWeight(dense, weight.grid if len(shape) == 2 else None)
    return weights


def _parameter_name(name: str, source: str) -> tuple[str, str]:
    """The parameter's name in transformers, and what it is in GGUF."""
    match = _NAME.fullmatch(name)
    parts = _PARTS if match is None or match["layer"] is None else _LAYER_PARTS
    if match is None or match["part"] not in parts:
        raise build.mismatch(source, [f"there is no place for {name!r}"])
    layer = "" if match["layer"] is None else f"model.layers.{int(match['layer'])}."
    return f"{layer}{parts[match['part']]}.{match['kind']}", match["part"]


def _deinterleaved(rows: NDArray[np.uint8], heads: int, name: str) -> NDArray[np.uint8]:
    """Rows in the order [heads, 2, half] from [heads, half, 2]: both rotary halves of a head behind one another."""
    if rows.shape[0] % (2 * heads):
        raise malformed(f"tensor {name!r} has {rows.shape[0]} rows for {heads} heads")
    split = rows.reshape(heads, -1, 2, rows.shape[1])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(rows.shape)


def _scale_frequencies(model: nn.Module, file: Container, source: str) -> None:
    """Divide the rotary frequencies by the file's factors, as Llama 3.1 does for long contexts."""
    if _FREQUENCIES not in file.tensors:
        return
    info = file.tensors[_FREQUENCIES]
    factors = stored_weight(info.block, file.rows(_FREQUENCIES), _FREQUENCIES).dense.reshape(-1)
    rotary = model.get_submodule("model.rotary_emb")
    buffers = [name for name in ("inv_freq", "original_inv_freq") if name in dict(rotary.named_buffers())]
    for name in buffers:
        before = rotary.get_buffer(name)
        if before.shape != factors.shape or not bool((factors > 0).all()):
            raise build.mismatch(source, [f"{_FREQUENCIES!r} holds {factors.numel()} factors for {before.numel()}"])
        setattr(rotary, name, torch.div(before, factors))
    if not buffers:
        raise CaptureError(codes.UNKNOWN_FORMAT, f"{source} scales rotary frequencies that its model does not have")
