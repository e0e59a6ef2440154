"""A causal language model of transformers as a module with an explicit cache: what the task captures."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from sparc import codes
from sparc.cache import KEEP, LOGITS, MASK, POSITIONS, TOKENS, Cache, CacheSlot, token_positions
from sparc.diag import CaptureError

_LONGEST = 1 << 20
_BATCH, _TOKENS, _PAST = 2, 3, 5


class Wrapped(nn.Module):
    """A module around a model whose weights keep the names they have there; the model itself is not changed."""

    def __init__(self, model: nn.Module) -> None:
        """Args: the model."""
        super().__init__()
        self._model: tuple[Any] = (model,)  # in a tuple, so that weights are not named "model.model..."
        for name, child in model.named_children():
            self.add_module(name, child)
        for name, parameter in model.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in model.named_buffers(recurse=False):
            self.register_buffer(name, buffer)


class Decoder(Wrapped):
    """`forward(input_ids, attention_mask, position_ids, logits_to_keep, past_key_values)` of a causal language model.

    `past_key_values` is a list of `{"key": ..., "value": ...}`, one for each layer, each `[batch, heads, past, size]`.
    The results are the logits at `logits_to_keep`, `[batch, kept, vocabulary]`, and the grown cache, `present`.
    """

    def __init__(self, model: nn.Module) -> None:
        """Args: the model."""
        super().__init__(model)
        declared = inspect.signature(model.forward).parameters
        self._takes = frozenset(name for name in (MASK, POSITIONS, KEEP) if name in declared)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        logits_to_keep: Tensor,
        past_key_values: list[dict[str, Tensor]],
    ) -> dict[str, Any]:
        """See the class."""
        cache = filled_cache([(layer["key"], layer["value"]) for layer in past_key_values])
        given = {MASK: attention_mask, POSITIONS: position_ids, KEEP: logits_to_keep}
        taken = {name: value for name, value in given.items() if name in self._takes}
        result = self._model[0](input_ids=input_ids, past_key_values=cache, use_cache=True, **taken)
        logits = result.logits if KEEP in self._takes else result.logits[:, logits_to_keep]
        return {LOGITS: logits, "present": [{"key": layer.keys, "value": layer.values} for layer in cache.layers]}


def describe(model: nn.Module) -> tuple[dict[str, Any], dict[str, dict[int, Any]], Cache]:
    """Example inputs of `Decoder(model)`, its dynamic dimensions, and its cache.

    The cache's shapes are those that the model itself makes of a short input.

    Raises:
        CaptureError: SPARC112 when the model takes no cache of keys and values.
    """
    check_model(model)
    config: Any = model.config
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(config.get_text_config(decoder=True).vocab_size)
    shape = (_BATCH, _PAST + _TOKENS)
    tokens = torch.randint(min(10, vocabulary // 2), vocabulary, shape, generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, :2] = 0
    if getattr(config, "is_encoder_decoder", False):
        raise CaptureError(codes.NO_CACHE, f"{type(model).__name__} has an encoder", why="it is no decoder alone")
    layers = _run_once(model, tokens[:, :_PAST], mask[:, :_PAST])
    examples = {
        TOKENS: tokens[:, _PAST:].contiguous(),
        MASK: mask,
        POSITIONS: token_positions(mask, _TOKENS),
        KEEP: torch.arange(_TOKENS)[-2:],
        "past_key_values": [{"key": key, "value": value} for key, value in layers],
    }
    dynamic: dict[str, dict[int, Any]] = {
        TOKENS: {0: "batch", 1: "seq"},
        MASK: {0: "batch", 1: Dim("total", min=4)},  # tracing takes `past` and `seq` to be at least 2
        POSITIONS: {0: "batch", 1: "seq"},
        KEEP: {0: "kept"},
    }
    slots = []
    for index in range(len(layers)):
        for kind in ("key", "value"):
            dynamic[f"past_key_values.{index}.{kind}"] = {0: "batch", 2: "past"}
            slots.append(CacheSlot(f"past_key_values.{index}.{kind}", f"present.{index}.{kind}"))
    return examples, dynamic, Cache(tuple(slots), context_length(config))


def context_length(config: Any) -> int:
    """How many positions the model knows; a model without such a limit gets a very large one."""
    text = config.get_text_config(decoder=True)
    if hasattr(text, "relative_attention_num_buckets"):  # distances beyond the greatest share a bucket
        return _LONGEST
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        length = getattr(text, name, None)
        if isinstance(length, int) and 0 < length <= _LONGEST:
            return length
    return _LONGEST


def check_model(model: nn.Module) -> None:
    """Raises CaptureError SPARC112 for what is no language model with a cache."""
    try:
        from transformers import PreTrainedModel
    except ImportError:
        raise CaptureError(codes.NO_CACHE, "transformers is not installed", hint="pip install transformers") from None
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise CaptureError(codes.NO_CACHE, f"{name} is no language model of transformers that generates")
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise CaptureError(codes.NO_CACHE, f"{name}.forward() takes no past_key_values")


def _run_once(model: nn.Module, tokens: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The keys and values of every layer after these tokens."""
    from transformers import DynamicCache

    cache = DynamicCache()
    run_model(model, input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True)
    return cached_layers(model, cache, *tokens.shape)


def run_model(model: nn.Module, **given: Any) -> Any:
    """The model's result in eval mode; raises CaptureError SPARC112 when it does not run so."""
    training = model.training
    try:
        with torch.no_grad():
            return model.eval()(**given)
    except Exception as error:  # any error of the user's own code
        name, why = type(model).__name__, f"{type(error).__name__}: {error}".splitlines()[0][:300]
        raise CaptureError(codes.NO_CACHE, f"{name} does not run with a DynamicCache", why=why) from None
    finally:
        model.train(training)


def cached_layers(model: nn.Module, cache: Any, batch: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """The keys and values of every layer of a cache, each `[batch, heads, count, size]`.

    Raises:
        CaptureError: SPARC112 when the model keeps something else there.
    """
    found = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
    if not found or any(
        not isinstance(each, Tensor) or each.ndim != 4 or (each.shape[0], each.shape[2]) != (batch, count)
        for pair in found for each in pair
    ):  # fmt: skip
        what = f"{type(model).__name__} keeps another state than keys and values by place"
        raise CaptureError(codes.NO_CACHE, what)
    return found  # type: ignore[return-value]


def filled_cache(pairs: list[tuple[Tensor, Tensor]]) -> Any:
    """A DynamicCache that already holds these keys and values."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    for key, value in pairs:
        layer = DynamicLayer()
        layer.lazy_initialization(key, value)
        layer.keys, layer.values = key, value
        cache.layers.append(layer)
    return cache


def named_call(item: Any) -> dict[str, Any]:
    """An item of data, as the tokenizers of transformers return it, by name; a tensor alone is the tokens.

    Raises:
        CaptureError: SPARC102 when it is neither.
    """
    if isinstance(item, Tensor):
        return {TOKENS: item}
    if isinstance(item, (tuple, list)) and item and isinstance(item[0], Tensor):
        return dict(zip((TOKENS, MASK), item, strict=False))
    if isinstance(item, Mapping):
        return {name: value for name, value in item.items() if name in (TOKENS, MASK, POSITIONS)}
    raise CaptureError(codes.INPUTS_MISSING, "an item of data= holds no tokens", why=f"got {type(item).__name__}")
