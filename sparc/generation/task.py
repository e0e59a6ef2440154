"""Tasks: what compile captures, and with which inputs, where the user only says what the model is for."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from sparc import codes
from sparc.cache import DECODER, ENCODER, KEEP, MASK, POSITIONS, SOURCE_MASK, TOKENS, Cache, token_positions
from sparc.capture import Dynamic
from sparc.checkpoint.base import Checkpoint
from sparc.diag import CaptureError
from sparc.generation.attachments import CONFIG, SETTINGS
from sparc.generation.decoder import Decoder, describe, named_call
from sparc.generation.encoder_decoder import Encoder, SourceDecoder, describe_entries
from sparc.generation.own_text import own_text
from sparc.generation.source import entry_calls, start_token
from sparc.generation.text import checkpoint_files
from sparc.samples import Data, Feed
from sparc.suggest import hint

TASKS = ("text-generation",)
_PROMPT = 128


@dataclass(frozen=True)
class EntryTask:
    """What compile captures as one entry, and times.

    Args:
        model: what to capture.
        example_inputs: its example inputs.
        dynamic: dimensions that vary.
        cache: of the captured entry, if it generates.
        timed: inputs that latency is measured on, by what they are.
    """

    model: nn.Module | ExportedProgram | Checkpoint
    example_inputs: Any
    dynamic: Dynamic | None = None
    cache: Cache | None = None
    timed: Mapping[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """What compile captures, calibrates and times.

    Args:
        entries: by name.
        data: the user's data.
        feed: what an item of data is to each entry, where there are several.
        attachments: files for the artifact's folder: settings of generation.
        written: what the model writes itself, to calibrate on where there is no data.
    """

    entries: Mapping[str, EntryTask]
    data: Data
    feed: Feed | None = None
    attachments: Mapping[str, bytes] = field(default_factory=dict)
    written: Callable[[], list[Any]] | None = None


def prepare_task(task: str, model: Any, data: Data) -> Task:
    """What a task makes of a model.

    Args:
        task: `text-generation`.
        model: a causal language model or an encoder-decoder of transformers, or a checkpoint of one.
        data: what its tokenizer returns, or tokens `[batch, seq]`, or a function that returns such. Items of an
            encoder-decoder may hold `labels` or `decoder_input_ids`; without, it reads what it generates itself.

    Raises:
        CaptureError: SPARC112 when the model does not generate with a cache, SPARC113 for an unknown task.
    """
    if task not in TASKS:
        raise CaptureError(codes.UNKNOWN_TASK, f"there is no task {task!r}", hint=hint(task, TASKS, kind="tasks"))
    module = model.model if isinstance(model, Checkpoint) else model
    if not isinstance(module, nn.Module):
        raise CaptureError(codes.NO_CACHE, "the task needs the model itself", why=f"got {type(model).__name__}")
    two = getattr(getattr(module, "config", None), "is_encoder_decoder", False)
    entries, named, feed = _encoder_decoder(module, data) if two else _decoder(module, data)
    attachments = _settings(module)
    if isinstance(model, Checkpoint):
        entries = {name: _with_weights(each, model) for name, each in entries.items()}
        attachments |= checkpoint_files(model)
    written = None if two else lambda: [named_call(tokens) for tokens in own_text(module)]
    return Task(entries, named, feed, attachments, written)


def _with_weights(entry: EntryTask, checkpoint: Checkpoint) -> EntryTask:
    """The entry, whose weights keep the grids they have in a checkpoint."""
    assert isinstance(entry.model, nn.Module)
    return replace(entry, model=checkpoint.with_model(entry.model))


def _decoder(model: nn.Module, data: Data) -> tuple[dict[str, EntryTask], Data, Feed | None]:
    examples, dynamic, cache = describe(model)
    named = None if data is None else lambda: map(named_call, _items(data))
    return {"forward": EntryTask(Decoder(model), examples, dynamic, cache, _timed(examples, cache))}, named, None


def _encoder_decoder(model: nn.Module, data: Data) -> tuple[dict[str, EntryTask], Data, Feed | None]:
    examples, dynamic, cache = describe_entries(model)
    start = start_token(_settings(model))
    if start is None:
        raise CaptureError(codes.NO_CACHE, f"{type(model).__name__}'s settings have no decoder_start_token_id")
    timed = _timed_source(examples, cache)
    entries = {
        ENCODER: EntryTask(Encoder(model), examples[ENCODER], dynamic[ENCODER], None, timed[ENCODER]),
        DECODER: EntryTask(SourceDecoder(model), examples[DECODER], dynamic[DECODER], cache, timed[DECODER]),
    }
    return entries, data, partial(entry_calls, start=start)


def _timed_source(examples: Mapping[str, Any], cache: Cache) -> dict[str, dict[str, dict[str, Any]]]:
    """One sequence: a source, and one token after as many."""
    length = max(2, min(_PROMPT, cache.length - 1))
    ids = examples[ENCODER][TOKENS][:1, :1].expand(1, length).contiguous()
    mask = torch.ones_like(ids)
    layers = {name: _zeros(examples[DECODER][name], length) for name in ("cross", "past_key_values")}
    return {
        ENCODER: {f"a source of {length} tokens": {TOKENS: ids, MASK: mask}},
        DECODER: {f"one token after {length}": {TOKENS: ids[:, :1].contiguous(), SOURCE_MASK: mask, **layers}},
    }


def _timed(examples: Mapping[str, Any], cache: Cache) -> dict[str, dict[str, Any]]:
    """One sequence: a prompt, and one token after it."""
    length = max(2, min(_PROMPT, cache.length - 1))
    made = {f"a prompt of {length} tokens": (length, 0), f"one token after {length}": (1, length)}
    return {name: _call(examples, tokens, past) for name, (tokens, past) in made.items()}


def _call(examples: Mapping[str, Any], tokens: int, past: int) -> dict[str, Any]:
    mask = torch.ones(1, past + tokens, dtype=torch.int64)
    layers = _zeros(examples["past_key_values"], past)
    ids = examples[TOKENS][:1, :1].expand(1, tokens).contiguous()
    positions = token_positions(mask, tokens)
    return {TOKENS: ids, MASK: mask, POSITIONS: positions, KEEP: torch.tensor([-1]), "past_key_values": layers}


def _zeros(layers: list[dict[str, Tensor]], places: int) -> list[dict[str, Tensor]]:
    """Keys and values of one sequence of so many places."""
    return [
        {kind: torch.zeros(1, each.shape[1], places, each.shape[3], dtype=each.dtype) for kind, each in layer.items()}
        for layer in layers
    ]


def _settings(model: Any) -> dict[str, bytes]:
    """The model's own settings, as files of its folder."""
    generation = getattr(model, "generation_config", None)
    texts = {CONFIG: model.config.to_json_string(use_diff=False)}
    if generation is not None:
        texts[SETTINGS] = generation.to_json_string()
    return {name: text.encode() for name, text in texts.items()}


def _items(data: Iterable[Any] | Callable[[], Iterable[Any]]) -> Iterable[Any]:
    return data() if callable(data) else data
