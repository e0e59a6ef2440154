"""Tokenizers from a GGUF file's metadata: byte-level BPE, as GPT-2's descendants have."""

from collections.abc import Mapping
from typing import Any

import numpy as np

_CONTROL_TOKEN = 3  # llama.cpp's type of special tokens
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {"llama-bpe": _WORDS % "1,3", "qwen2": _WORDS % "1"}
_SPLITS = {"smollm", "gpt-2", "default", *_PATTERNS}


def read_tokenizer(metadata: Mapping[str, Any]) -> Any:
    """The tokenizer that the metadata describes; it adds no special tokens.

    Returns:
        a `tokenizers.Tokenizer`; None for other kinds than byte-level BPE, for words cut in an unknown way, for
        metadata that contradict themselves, and when tokenizers is not installed.
    """
    split = metadata.get("tokenizer.ggml.pre", "default")
    tokens, merges = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.merges")
    known = metadata.get("tokenizer.ggml.model") == "gpt2" and isinstance(split, str) and split in _SPLITS
    if not known or not isinstance(tokens, list) or not isinstance(merges, list):
        return None
    try:
        from tokenizers import Tokenizer, decoders, models, normalizers
    except ImportError:
        return None
    types = metadata.get("tokenizer.ggml.token_type", np.ones(len(tokens)))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    parts = [each.partition(" ") for each in merges]
    pairs = [(first, second) for first, _, second in parts]
    made = {*vocabulary} >= {token for first, second in pairs for token in (first, second, first + second)}
    if not made or not isinstance(types, np.ndarray) or not len(types) == len(tokens) == len(vocabulary):
        return None
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=split == "llama-bpe"))
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(split)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([t for t, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN])
    return tokenizer


def _pre_tokenizer(split: str) -> Any:
    """How text is cut into words: by the model's own pattern, else GPT-2's; SmolLM cuts digits apart before."""
    from tokenizers import Regex, pre_tokenizers

    if split in _PATTERNS:
        words = pre_tokenizers.Split(Regex(_PATTERNS[split]), behavior="isolated")
        return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])
    return whole
