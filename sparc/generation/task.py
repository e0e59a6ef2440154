"""Tasks: what compile captures, and with which inputs, where the user only says what the model is for."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from sparc import codes
from sparc.cache import KEEP, MASK, POSITIONS, TOKENS, Cache, token_positions
from sparc.capture import Dynamic
from sparc.checkpoint.base import Checkpoint
from sparc.diag import CaptureError
from sparc.generation.attachments import CONFIG, SETTINGS
from sparc.generation.decoder import Decoder, describe, named_call
from sparc.generation.text import checkpoint_files
from sparc.samples import Data
from sparc.suggest import hint

TASKS = ("text-generation",)
_PROMPT = 128


@dataclass(frozen=True)
class Task:
    """What compile captures, calibrates and times.

    Args:
        model: what to capture.
        example_inputs: its example inputs.
        dynamic: dimensions that vary.
        data: the user's data, in the model's own inputs.
        cache: of the captured entry, if it generates.
        attachments: files for the artifact's folder: settings of generation.
        timed: inputs that latency is measured on, by what they are.
    """

    model: nn.Module | ExportedProgram | Checkpoint
    example_inputs: Any
    dynamic: Dynamic | None
    data: Data
    cache: Cache | None = None
    attachments: Mapping[str, bytes] = field(default_factory=dict)
    timed: Mapping[str, dict[str, Any]] = field(default_factory=dict)


def prepare_task(task: str, model: Any, data: Data) -> Task:
    """What a task makes of a model.

    Args:
        task: `text-generation`.
        model: a causal language model of transformers, or a checkpoint of one.
        data: what its tokenizer returns, or tokens `[batch, seq]`, or a function that returns such.

    Raises:
        CaptureError: SPARC112 when the model does not generate with a cache, SPARC113 for an unknown task.
    """
    if task not in TASKS:
        raise CaptureError(codes.UNKNOWN_TASK, f"there is no task {task!r}", hint=hint(task, TASKS, kind="tasks"))
    module = model.model if isinstance(model, Checkpoint) else model
    if not isinstance(module, nn.Module):
        raise CaptureError(codes.NO_CACHE, "the task needs the model itself", why=f"got {type(model).__name__}")
    examples, dynamic, cache = describe(module)
    named = None if data is None else lambda: map(named_call, _items(data))
    wrapped, attachments = Decoder(module), _settings(module)
    subject = model.with_model(wrapped) if isinstance(model, Checkpoint) else wrapped
    if isinstance(model, Checkpoint):
        attachments |= checkpoint_files(model)
    return Task(subject, examples, dynamic, named, cache, attachments, _timed(examples, cache))


def _timed(examples: Mapping[str, Any], cache: Cache) -> dict[str, dict[str, Any]]:
    """One sequence: a prompt, and one token after it."""
    length = max(2, min(_PROMPT, cache.length - 1))
    made = {f"a prompt of {length} tokens": (length, 0), f"one token after {length}": (1, length)}
    return {name: _call(examples, tokens, past) for name, (tokens, past) in made.items()}


def _call(examples: Mapping[str, Any], tokens: int, past: int) -> dict[str, Any]:
    mask = torch.ones(1, past + tokens, dtype=torch.int64)
    layers = [
        {kind: torch.zeros(1, each.shape[1], past, each.shape[3], dtype=each.dtype) for kind, each in layer.items()}
        for layer in examples["past_key_values"]
    ]
    ids = examples[TOKENS][:1, :1].expand(1, tokens).contiguous()
    positions = token_positions(mask, tokens)
    return {TOKENS: ids, MASK: mask, POSITIONS: positions, KEEP: torch.tensor([-1]), "past_key_values": layers}


def _settings(model: Any) -> dict[str, bytes]:
    """The model's own settings, as files of its folder."""
    generation = getattr(model, "generation_config", None)
    texts = {CONFIG: model.config.to_json_string(use_diff=False)}
    if generation is not None:
        texts[SETTINGS] = generation.to_json_string()
    return {name: text.encode() for name, text in texts.items()}


def _items(data: Iterable[Any] | Callable[[], Iterable[Any]]) -> Iterable[Any]:
    return data() if callable(data) else data
