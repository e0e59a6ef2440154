"""An encoder-decoder of transformers as two modules: the encoder, and a decoder with an explicit cache."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from sparc import codes
from sparc.cache import DECODER, ENCODER, LOGITS, MASK, SOURCE_MASK, TOKENS, Cache, CacheSlot
from sparc.diag import CaptureError
from sparc.generation.decoder import Wrapped, cached_layers, check_model, context_length, filled_cache, run_model

_BATCH, _SOURCE, _TOKENS, _PAST = 2, 7, 3, 5
Layers = list[dict[str, Tensor]]


class Encoder(Wrapped):
    """`forward(input_ids, attention_mask)`, both `[batch, source]`: `cross`, which the decoder's layers attend to.

    `cross` is a list of `{"key": ..., "value": ...}`, one for each layer of the decoder, each
    `[batch, heads, source, size]`.
    """

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Layers]:
        """See the class."""
        from transformers import DynamicCache, EncoderDecoderCache

        # One token makes the decoder's layers fill the cache. Nothing else of it contributes, and the rest is swept.
        model, cache = self._model[0], EncoderDecoderCache(DynamicCache(), DynamicCache())
        model(
            encoder_outputs=model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask),
            attention_mask=attention_mask,
            decoder_input_ids=input_ids[:, :1],
            past_key_values=cache,
            use_cache=True,
        )
        return {"cross": _layers(cache.cross_attention_cache)}


class SourceDecoder(Wrapped):
    """`forward(input_ids, encoder_attention_mask, cross, past_key_values)`: one call of the decoder.

    `input_ids` is `[batch, seq]`, `encoder_attention_mask` `[batch, source]`, `cross` as `Encoder` returns it, and each
    tensor of `past_key_values` `[batch, heads, past, size]`. The results are the logits, `[batch, seq, vocabulary]`,
    and the grown cache, `present`.
    """

    def forward(
        self, input_ids: Tensor, encoder_attention_mask: Tensor, cross: Layers, past_key_values: Layers
    ) -> dict[str, Any]:
        """See the class."""
        from transformers import EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        cache = EncoderDecoderCache(_cache(past_key_values), _cache(cross))
        cache.is_updated = dict.fromkeys(range(len(cross)), True)  # so the encoder's states are not read
        size = self._model[0].get_input_embeddings().weight.shape[1]
        states = cross[0]["key"].new_zeros(*encoder_attention_mask.shape, size)
        result = self._model[0](
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=encoder_attention_mask,
            decoder_input_ids=input_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return {LOGITS: result.logits, "present": _layers(cache.self_attention_cache)}


def _cache(layers: Layers) -> Any:
    return filled_cache([(layer["key"], layer["value"]) for layer in layers])


def _layers(cache: Any) -> Layers:
    return [{"key": layer.keys, "value": layer.values} for layer in cache.layers]


def describe_entries(model: nn.Module) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, dict[int, Any]]], Cache]:
    """Example inputs and dynamic dimensions of `Encoder(model)` and `SourceDecoder(model)`, by entry, and the decoder's
    cache. Shapes are those that the model itself makes of a short input.

    Raises:
        CaptureError: SPARC112 when the model reads something else than tokens, or keeps no keys and values.
    """
    check_model(model)
    config: Any = model.config
    reads = getattr(model.get_encoder(), "main_input_name", TOKENS)  # type: ignore[operator]
    if reads != TOKENS:
        raise CaptureError(codes.NO_CACHE, f"{type(model).__name__} reads {reads}", why="the task needs tokens")
    source, target = _tokens(config, _SOURCE), _tokens(config, _PAST + _TOKENS)
    mask = torch.ones_like(source)
    mask[1, -2:] = 0
    past, cross = _run_once(model, source, mask, target[:, :_PAST])
    examples: dict[str, dict[str, Any]] = {
        ENCODER: {TOKENS: source, MASK: mask},
        DECODER: {
            TOKENS: target[:, _PAST:].contiguous(), SOURCE_MASK: mask, "cross": cross, "past_key_values": past,
        },
    }  # fmt: skip
    length = context_length(config)
    places: dict[int, Any] = {0: "batch", 1: Dim("source", max=length)}
    dynamic: dict[str, dict[str, dict[int, Any]]] = {
        ENCODER: {TOKENS: places, MASK: places},
        DECODER: {TOKENS: {0: "batch", 1: "seq"}, SOURCE_MASK: {0: "batch", 1: "source"}},
    }
    slots, given = [], [SOURCE_MASK]
    for name in _names(past):
        dynamic[DECODER][f"past_key_values.{name}"] = {0: "batch", 2: "past"}
        slots.append(CacheSlot(f"past_key_values.{name}", f"present.{name}"))
    for name in _names(cross):
        dynamic[DECODER][f"cross.{name}"] = {0: "batch", 2: "source"}
        given.append(f"cross.{name}")
    return examples, dynamic, Cache(tuple(slots), length, tuple(given))


def _names(layers: Layers) -> list[str]:
    return [f"{index}.{kind}" for index in range(len(layers)) for kind in ("key", "value")]


def _tokens(config: Any, count: int) -> Tensor:
    """Random tokens, none of them special."""
    vocabulary = int(config.get_text_config(decoder=True).vocab_size)
    generator = torch.Generator().manual_seed(count)
    return torch.randint(min(10, vocabulary // 2), vocabulary, (_BATCH, count), generator=generator)


def _run_once(model: nn.Module, source: Tensor, mask: Tensor, target: Tensor) -> tuple[Layers, Layers]:
    """The decoder's own keys and values of every layer after these tokens, and those of the source."""
    from transformers import DynamicCache, EncoderDecoderCache

    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    run_model(
        model, input_ids=source, attention_mask=mask, decoder_input_ids=target, past_key_values=cache, use_cache=True
    )
    past = cached_layers(model, cache.self_attention_cache, *target.shape)
    cross = cached_layers(model, cache.cross_attention_cache, *source.shape)
    named = [[{"key": key, "value": value} for key, value in pairs] for pairs in (past, cross)]
    return named[0], named[1]
