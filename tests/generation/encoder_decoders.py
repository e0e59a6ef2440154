"""Tiny encoder-decoders of transformers with random weights."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor

from sparc.cache import DECODER, ENCODER
from sparc.capture import capture, merge
from sparc.generation.encoder_decoder import Encoder, SourceDecoder, describe_entries
from sparc.program import Program

VOCABULARY, START = 97, 3
_BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64, "init_std": 0.3,
}  # fmt: skip
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "initializer_factor": 2.0}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5Config", _T5),
    "mt5": ("MT5Config", {**_T5, "feed_forward_proj": "gated-gelu"}),
    "bart": ("BartConfig", _BART),
    "mbart": ("MBartConfig", _BART),
    "pegasus": ("PegasusConfig", _BART),
    "marian": ("MarianConfig", _BART),
    "m2m_100": ("M2M100Config", _BART),
    "blenderbot": ("BlenderbotSmallConfig", _BART),
}


def encoder_decoder(name: str, **changes: Any) -> Any:
    """An encoder-decoder by the name of its architecture; no token ends a sequence."""
    kind, options = CONFIGS[name]
    make: Callable[..., Any] = getattr(transformers, kind)
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": START}
    config = make(**{"vocab_size": VOCABULARY, **tokens, **options, **changes})
    torch.manual_seed(1)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    return model


def sources(batch: int = 3, length: int = 9) -> dict[str, torch.Tensor]:
    """Random sources as a tokenizer returns them; the second one is padded on the right, the third on the left."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1:2, -3:] = 0
    mask[2:3, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


@cache
def captured(name: str) -> tuple[Any, Program]:
    """A tiny encoder-decoder, and its program of two entries."""
    model = encoder_decoder(name)
    examples, dynamic, of_decoder = describe_entries(model)
    modules = {ENCODER: Encoder(model), DECODER: SourceDecoder(model)}
    program = merge([capture(modules[each], examples[each], dynamic=dynamic[each], entry=each) for each in modules])
    program.entries[DECODER].cache = of_decoder
    return model, program


def targets(batch: int, count: int) -> Tensor:
    """Random tokens of the decoder."""
    return torch.randint(5, VOCABULARY, (batch, count), generator=torch.Generator().manual_seed(count))
