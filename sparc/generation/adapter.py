"""An artifact as a model of transformers: `generate` there, with everything it knows about sampling and searching."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparc import codes
from sparc.cache import KEEP, LOGITS, MASK, POSITIONS, TOKENS, token_positions
from sparc.diag import ArtifactError
from sparc.generation.artifact import cached_entry
from sparc.generation.attachments import CONFIG, SETTINGS, attached_json

if TYPE_CHECKING:
    from sparc.artifact import Artifact


def as_transformers(artifact: "Artifact") -> Any:
    """A module with transformers' `GenerationMixin` that runs the artifact.

    Its `forward` is that of a causal language model with a `DynamicCache`; the cache is handed over in every call, so
    this is slower than `Artifact.generate`, but beam search, assisted generation and logits processors work.

    Args:
        artifact: compiled with `task="text-generation"`.

    Raises:
        ArtifactError: SPARC513 when it does not generate, its settings are missing, or transformers is not installed.
    """
    cached_entry(artifact)
    try:
        from transformers import AutoConfig, GenerationConfig, GenerationMixin, PreTrainedModel
        from transformers.modeling_outputs import CausalLMOutputWithPast
    except ImportError:
        raise _unable("transformers is not installed", hint="pip install transformers") from None
    try:
        config = AutoConfig.for_model(**attached_json(artifact, CONFIG))
    except (ValueError, TypeError) as error:
        raise _unable(f"{CONFIG} is missing or damaged", why=f"{type(error).__name__}: {error}"[:200]) from None

    class CompiledModel(_Compiled, PreTrainedModel, GenerationMixin):  # type: ignore[misc]
        """The artifact under transformers' interface."""

        output_type = CausalLMOutputWithPast
        _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # whatever the config asks for

    model = CompiledModel(config)
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
