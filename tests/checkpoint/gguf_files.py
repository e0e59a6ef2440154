"""GGUF files of tiny random models, written with the gguf package as llama.cpp's converter writes them."""

from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Kind

WIDTH, VOCABULARY = 256, 64
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
CLASSES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config"),
    "gemma": ("GemmaForCausalLM", "GemmaConfig"),
}


def tiny(architecture="llama", *, tied=True, layers=1, **options):
    """A random model of transformers with 4 heads, 2 of keys and values."""
    owner, config = CLASSES[architecture]
    values = {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e3},
    }  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, owner)(getattr(transformers, config)(**{**values, **options})).eval()
    model.config.use_cache = False
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):  # what starts at a constant would hide an exchange
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def interleave(weight, heads):
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    shape = weight.shape
    return weight.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def gguf_name(name):
    """The name of a tensor in GGUF."""
    path, _, kind = name.rpartition(".")
    if path.startswith("model.layers."):
        _, _, layer, path = path.split(".", 3)
        return f"blk.{layer}.{NAMES[path]}.{kind}"
    return f"{NAMES[path]}.{kind}"


def random_blocks(kind, rows, columns, seed=0):
    """Random bytes of a format with finite scales, uint8 `[rows, bytes]`."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    count = rows * columns // block
    raw = np.random.default_rng(seed).integers(0, 256, (count, size), dtype=np.uint8)
    for start in SCALES.get(kind, ()):
        scales = np.random.default_rng(seed + start).standard_normal(count).astype(np.float16) * np.float16(0.01)
        raw[:, start : start + 2] = scales.view(np.uint8).reshape(count, 2)
    if kind == Kind.MXFP4:
        raw[:, 0] = 100 + raw[:, 0] % 27
    return raw.reshape(rows, -1)


SCALES = {  # where the float16 numbers of a block are
    Kind.Q4_0: (0,), Kind.Q4_1: (0, 2), Kind.Q5_0: (0,), Kind.Q5_1: (0, 2), Kind.Q8_0: (0,), Kind.Q2_K: (80, 82),
    Kind.Q3_K: (108,), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,), Kind.IQ4_NL: (0,), Kind.IQ4_XS: (0,),
}  # fmt: skip


def write(path: Path, model, architecture="llama", kind=Kind.Q4_1, embedding=Kind.Q8_0, extra=None, tokens=None):
    """Write a model with its matrices in `kind`; returns the state dict that the file stands for."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if tokens is not None:
        tokens(writer)
    state, meant = model.state_dict(), {}
    for name, value in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = value.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        permuted = heads if architecture == "llama" else None
        array = interleave(array, permuted) if permuted else array
        if array.ndim == 1:
            more = np.float32(architecture == "gemma" and "norm" in name)
            writer.add_tensor(gguf_name(name), array + more)
            meant[name] = torch.from_numpy(array + more - more)
            continue
        this = embedding if name == "model.embed_tokens.weight" else kind
        raw, dense = stored_as(this, array)
        writer.add_tensor(gguf_name(name), raw, raw_dtype=this)
        if permuted:  # the inverse of `interleave`
            dense = dense.reshape(heads, -1, 2, dense.shape[1]).swapaxes(1, 2).reshape(dense.shape)
        meant[name] = torch.from_numpy(np.array(dense))
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def stored_as(kind, array):
    """An array in a format, as bytes, and what they mean; random codes where the gguf package cannot quantize."""
    try:
        raw = gguf.quantize(np.ascontiguousarray(array), kind)
    except NotImplementedError:
        raw = random_blocks(kind, *array.shape)
    return raw, gguf.dequantize(raw, kind).astype(np.float32)


def weight_decodes(program):
    """The nodes that decode weights; what decodes an activation takes its shape from the codes."""
    decodes = [node for _, node in program.nodes() if str(node.target) == "sparc.decode.default"]
    return [node for node in decodes if node.args[3] is not None]
