"""An artifact as a model of transformers: `generate` there, with everything it knows about sampling and searching."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparc import codes
from sparc.cache import KEEP, LOGITS, MASK, POSITIONS, SOURCE_MASK, TOKENS, token_positions
from sparc.diag import ArtifactError
from sparc.generation.artifact import cached_entry
from sparc.generation.attachments import CONFIG, SETTINGS, attached_json
from sparc.generation.session import check_tokens
from sparc.generation.source import encode_source, source_arguments
from sparc.program import Entry

if TYPE_CHECKING:
    from sparc.artifact import Artifact


def as_transformers(artifact: "Artifact") -> Any:
    """A module with transformers' `GenerationMixin` that runs the artifact.

    Its `forward` is that of a causal language model with a `DynamicCache`, or of an encoder-decoder; the cache is
    handed over in every call, so this is slower than `Artifact.generate`, but beam search, assisted generation and
    logits processors work.

    Args:
        artifact: compiled with `task="text-generation"`.

    Raises:
        ArtifactError: SPARC513 when it does not generate, its settings are missing, or transformers is not installed.
    """
    _, entry = cached_entry(artifact)
    assert entry.cache is not None
    try:
        from transformers import AutoConfig, GenerationConfig, GenerationMixin, PreTrainedModel
        from transformers.modeling_outputs import CausalLMOutputWithPast, Seq2SeqLMOutput
    except ImportError:
        raise _unable("transformers is not installed", hint="pip install transformers") from None
    try:
        config = AutoConfig.for_model(**attached_json(artifact, CONFIG))
    except (ValueError, TypeError) as error:
        raise _unable(f"{CONFIG} is missing or damaged", why=f"{type(error).__name__}: {error}"[:200]) from None

    has_encoder = bool(entry.cache.source)
    methods: Any = _CompiledWithSource if has_encoder else _Compiled

    class CompiledModel(methods, PreTrainedModel, GenerationMixin):  # type: ignore[misc, valid-type]
        """The artifact under transformers' interface."""

        output_type = Seq2SeqLMOutput if has_encoder else CausalLMOutputWithPast
        _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # whatever the config asks for

    model: Any = CompiledModel(config)
    model.hold(artifact)
    given = attached_json(artifact, SETTINGS)
    model.generation_config = GenerationConfig(**given) if SETTINGS in artifact.attachments else GenerationConfig()
    return model


class _Compiled:
    """The methods of a model of transformers that run an artifact."""

    main_input_name = TOKENS
    output_type: Any = None

    def hold(self, artifact: "Artifact") -> None:
        """Run this artifact."""
        self._artifact = artifact
        self._name, entry = cached_entry(artifact)
        self._signature = entry.signature

    @property
    def device(self) -> torch.device:
        """Where inputs are expected."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        return torch.float32

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        logits_to_keep: int | Tensor = 0,
        **unused: Any,
    ) -> Any:
        """Logits and the grown cache, as the causal language models of transformers return them."""
        count = input_ids.shape[1]
        layers = [layer for layer in getattr(past_key_values, "layers", ()) if layer.get_seq_length()]
        if attention_mask is None:
            past = layers[0].get_seq_length() if layers else 0
            attention_mask = torch.ones(input_ids.shape[0], past + count, dtype=torch.int64)
        kept = logits_to_keep if isinstance(logits_to_keep, Tensor) else torch.arange(count)[-int(logits_to_keep) :]
        given: dict[str, Any] = {TOKENS: input_ids, MASK: attention_mask.long(), KEEP: kept}
        given[POSITIONS] = token_positions(given[MASK], count) if position_ids is None else position_ids
        named = {name: value for name, value in given.items() if name in self._signature.parameters}
        if layers:
            named["past_key_values"] = [{"key": layer.keys, "value": layer.values} for layer in layers]
        result = self._artifact.call(self._name, **named)
        return self.output_type(logits=result[LOGITS], past_key_values=_grown(past_key_values, result["present"]))


class _CompiledEncoder(nn.Module):
    """The artifact's encoder: all that the decoder reads of a source, side by side, `[batch, source, features]`.

    In one tensor with the batch in front transformers knows how to repeat it for beams.
    """

    main_input_name = TOKENS

    def __init__(self, artifact: "Artifact", entry: Entry) -> None:
        """Args: the artifact, and its decoder."""
        super().__init__()
        self._artifact, self._decoder = artifact, entry
        given = dict(zip(entry.signature.input_names, entry.placeholders, strict=True))
        self._kinds = {name: node.meta["val"] for name, node in given.items() if name.startswith("cross.")}

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **unused: Any) -> Any:
        """What transformers calls the last hidden state."""
        from transformers.modeling_outputs import BaseModelOutput

        source = encode_source(self._artifact, *check_tokens(input_ids, attention_mask))
        return BaseModelOutput(torch.cat([source[name].transpose(1, 2).flatten(2) for name in self._kinds], dim=2))

    def arguments(self, states: Tensor, mask: Tensor | None) -> dict[str, Any]:
        """The decoder's arguments, from what `forward` returned."""
        sizes = [(kind.shape[1], kind.shape[3]) for kind in self._kinds.values()]
        parts = states.split([heads * size for heads, size in sizes], dim=2)
        found = [part.unflatten(2, size).transpose(1, 2) for part, size in zip(parts, sizes, strict=True)]
        whole = torch.ones(states.shape[:2], dtype=torch.int64)
        source = dict(zip(self._kinds, found, strict=True)) | {SOURCE_MASK: whole if mask is None else mask.long()}
        return source_arguments(self._decoder, source)


class _CompiledWithSource(_Compiled):
    """The same of an encoder-decoder."""

    def hold(self, artifact: "Artifact") -> None:
        """Run this artifact."""
        super().hold(artifact)
        self.encoder = _CompiledEncoder(artifact, artifact.program.entries[self._name])

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        **unused: Any,
    ) -> Any:
        """Logits and the grown cache, as the encoder-decoders of transformers return them."""
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache

        states = self.encoder(input_ids, attention_mask) if encoder_outputs is None else encoder_outputs
        cache: Any = EncoderDecoderCache(DynamicCache(), DynamicCache()) if past_key_values is None else past_key_values
        named = {TOKENS: decoder_input_ids, **self.encoder.arguments(states[0], attention_mask)}
        layers = [layer for layer in cache.self_attention_cache.layers if layer.get_seq_length()]
        if layers:
            named["past_key_values"] = [{"key": layer.keys, "value": layer.values} for layer in layers]
        result = self._artifact.call(self._name, **named)
        _grown(cache.self_attention_cache, result["present"])
        return self.output_type(logits=result[LOGITS], past_key_values=cache)


def _grown(cache: Any, present: list[dict[str, Tensor]]) -> Any:
    """The caller's cache, or a new one, holding what the artifact returned: whole, also where a model has a window."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache() if cache is None else cache
    cache.layers = [DynamicLayer() for _ in present]
    for layer, made in zip(cache.layers, present, strict=True):
        layer.lazy_initialization(made["key"], made["value"])
        layer.keys, layer.values = made["key"], made["value"]
    return cache


def _unable(why_not: str, *, why: str = "", hint: str = "") -> ArtifactError:
    return ArtifactError(codes.NO_GENERATION, why_not, why=why, hint=hint)
