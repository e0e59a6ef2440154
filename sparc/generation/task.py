"""Tasks: what compile captures, and with which inputs, where the user only says what the model is for."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sparc import codes
from sparc.cache import Cache
from sparc.capture import Dynamic
from sparc.diag import CaptureError
from sparc.generation.attachments import CONFIG, SETTINGS
from sparc.generation.decoder import Decoder, describe, named_call
from sparc.samples import Data
from sparc.suggest import hint

TASKS = ("text-generation",)


@dataclass(frozen=True)
class Task:
    """Arguments of compile, worked out from a model.

    Args:
        model: the module to capture.
        example_inputs: by name.
        dynamic: dimensions that vary.
        data: the user's data, in the module's own inputs.
        cache: of the captured entry.
        attachments: files for the artifact's folder: settings of generation.
    """

    model: nn.Module
    example_inputs: dict[str, Any]
    dynamic: Dynamic
    data: Data
    cache: Cache
    attachments: Mapping[str, bytes] = field(default_factory=dict)


def prepare_task(task: str, model: Any, data: Data) -> Task:
    """What a task makes of a model.

    Args:
        task: `text-generation`.
        model: a causal language model of transformers.
        data: what its tokenizer returns, or tokens `[batch, seq]`, or a function that returns such.

    Raises:
        CaptureError: SPARC112 when the model does not generate with a cache, SPARC113 for an unknown task.
    """
    if task not in TASKS:
        raise CaptureError(codes.UNKNOWN_TASK, f"there is no task {task!r}", hint=hint(task, TASKS, kind="tasks"))
    if not isinstance(model, nn.Module):
        raise CaptureError(codes.NO_CACHE, "the task needs the model itself", why=f"got {type(model).__name__}")
    examples, dynamic, cache = describe(model)
    named = None if data is None else lambda: map(named_call, _items(data))
    return Task(Decoder(model), examples, dynamic, named, cache, _settings(model))


def _settings(model: Any) -> dict[str, bytes]:
    """The model's own settings, as files of its folder."""
    generation = getattr(model, "generation_config", None)
    texts = {CONFIG: model.config.to_json_string(use_diff=False)}
    if generation is not None:
        texts[SETTINGS] = generation.to_json_string()
    return {name: text.encode() for name, text in texts.items()}


def _items(data: Iterable[Any] | Callable[[], Iterable[Any]]) -> Iterable[Any]:
    return data() if callable(data) else data
