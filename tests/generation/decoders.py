"""Tiny decoders of transformers with random weights."""

from collections.abc import Callable
from typing import Any

import torch
import transformers

VOCABULARY = 97
_LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _LLAMA),
    "qwen3": ("Qwen3Config", {**_LLAMA, "head_dim": 8}),
    "mistral": ("MistralConfig", {**_LLAMA, "sliding_window": 6}),
    "gemma2": ("Gemma2Config", {**_LLAMA, "head_dim": 8, "sliding_window": 6}),
    "gemma3": ("Gemma3TextConfig", {**_LLAMA, "head_dim": 8, "sliding_window": 6}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "phi": ("PhiConfig", _LLAMA),
    "phi3": ("Phi3Config", {**_LLAMA, "original_max_position_embeddings": 64}),
    "mixtral": ("MixtralConfig", {**_LLAMA, "num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**_LLAMA, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "opt": (
        "OPTConfig",
        {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32,
         "max_position_embeddings": 64},
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "falcon": ("FalconConfig", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
}  # fmt: skip


def decoder(name: str, **changes: Any) -> Any:
    """A causal language model by the name of its architecture; no token ends a sequence."""
    kind, options = CONFIGS[name]
    make: Callable[..., Any] = getattr(transformers, kind)
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = make(**{"vocab_size": VOCABULARY, **tokens, **options, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    return model


def prompts(batch: int = 2, length: int = 6, hidden: int = 3) -> dict[str, torch.Tensor]:
    """Random prompts as a tokenizer returns them; the second one is padded on the left."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1:2, :hidden] = 0
    return {"input_ids": ids, "attention_mask": mask}
