"""Tiny causal language models of transformers, and calls of their decoders with a cache."""

import functools
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import sparc
from sparc.artifact import Artifact
from sparc.cache import token_positions

VOCABULARY = 97
_PLAIN = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
_FEW = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
_NEOX = {**_PLAIN, "rotary_pct": 0.5}
_OPT = {**_PLAIN, "ffn_dim": 96, "word_embed_proj_dim": 64}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _PLAIN),
    "mistral": ("MistralConfig", {**_PLAIN, "sliding_window": 6}),
    "qwen3": ("Qwen3Config", {**_PLAIN, "head_dim": 16}),
    "gemma3": ("Gemma3TextConfig", {**_PLAIN, "head_dim": 16, "sliding_window": 6}),
    "phi": ("PhiConfig", _PLAIN),
    "phi3": ("Phi3Config", _PLAIN),
    "gpt2": ("GPT2Config", _GPT2),
    "neox": ("GPTNeoXConfig", _NEOX),
    "falcon": ("FalconConfig", _PLAIN),
    "opt": ("OPTConfig", _OPT),
    "bloom": ("BloomConfig", _BLOOM),
    "gemma2": ("Gemma2Config", {**_PLAIN, "head_dim": 16, "sliding_window": 6}),
}


def tiny(name: str, **options: Any) -> nn.Module:
    """A model of an architecture with random weights; `options` go over its configuration."""
    kind, settings = CONFIGS[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**settings, **_FEW, **options})
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config).eval()
    return model


@functools.cache
def compiled(name: str, recipe: str = "exact", target: str = "onnx") -> Artifact:
    """The artifact of a tiny model for the task; equality is checked by the tests."""
    options = {"recipe": recipe, "target": target, "measure": False, "verify": "types"}
    return sparc.compile(tiny(name), task="text-generation", **options)  # type: ignore[arg-type]


def call(
    artifact: Artifact, mask: list[list[int]], new: int, *, keep: int | None = None, seed: int = 0
) -> list[Tensor]:
    """One tensor for every input: `new` tokens behind a random cache, under `mask` over all of them."""
    generator = torch.Generator().manual_seed(seed)
    visible = torch.tensor(mask)
    batch, total = visible.shape
    given = {
        "input_ids": torch.randint(3, VOCABULARY, (batch, new), generator=generator),
        "attention_mask": visible,
        "position_ids": token_positions(visible, new),
        "logits_to_keep": torch.arange(new)[-(keep or new) :],
    }
    entry = artifact.program.main
    for node, name in zip(entry.placeholders, entry.signature.input_names, strict=True):
        if name not in given:
            _, heads, _, size = node.meta["val"].shape
            given[name] = torch.randn(batch, heads, total - new, size, generator=generator)
    return [given[name] for name in entry.signature.input_names]


MASKS: dict[str, tuple[list[list[int]], int]] = {
    "prompt": ([[1] * 9], 9),
    "left padding": ([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8], 8),
    "decode": ([[1] * 12], 1),
    "decode, padded": ([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9], 1),
    "holes": ([[1, 0, 1, 1, 0, 1, 1, 0, 1], [1, 1, 1, 0, 0, 0, 1, 1, 1]], 1),
    "continued": ([[1, 0, 1, 1, 1, 0, 1, 1, 1]], 4),
    "continued batch": ([[1, 0, 1, 1, 1, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1, 1]], 4),
    "continued alike": ([[1] * 9, [1] * 9], 4),
    "one token": ([[1]], 1),
    "nothing visible": ([[0, 0, 0, 0], [1, 1, 1, 1]], 1),
}
"""Masks over all tokens, and how many of these are new."""


def calls(artifact: Artifact) -> Iterator[tuple[str, list[Tensor]]]:
    """A call for every one of `MASKS`."""
    for name, (mask, new) in MASKS.items():
        yield name, call(artifact, mask, new)
