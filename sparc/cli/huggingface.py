"""Hugging Face folders: a local `config.json` and safetensors, and example inputs worked out from the config.

Nothing is downloaded, no code from the folder is run, and pickled weights are refused.
"""

import inspect
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparc import codes
from sparc.diag import CaptureError
from sparc.generation.text import tokenizer_files

_BATCH, _LENGTH = 2, 16
_SAMPLES = 16_000
_CONFIG_LIMIT = 1 << 22


def load_folder(folder: Path) -> dict[str, Any]:
    """`model`, `example_inputs`, `dynamic` and the tokenizer's files of a model saved with `save_pretrained`.

    Raises:
        CaptureError: SPARC110 when the folder is incomplete, needs code of its own, or transformers is not installed.
    """
    described = _read_config(folder)
    if not any(folder.glob("*.safetensors")):
        raise _failed(
            f"{folder.name} holds no safetensors",
            hint="save it with model.save_pretrained(folder, safe_serialization=True)",
        )
    try:
        import transformers
    except ImportError:
        raise _failed("transformers is not installed", hint="pip install transformers") from None
    with _quiet(), _explained(folder):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        owner = _model_class(transformers, described)
        model = owner.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            **_no_remote_code(owner),
        )
    model.eval()
    _turn_off_caches(model)
    inputs = example_inputs(model, config)
    return {
        "model": model,
        "example_inputs": inputs,
        "dynamic": dynamic_axes(inputs),
        "attachments": tokenizer_files(folder),
    }


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file() or path.stat().st_size > _CONFIG_LIMIT:
        raise _failed(
            f"{folder.name} is no Hugging Face folder",
            why="it holds no config.json",
            hint="an artifact is read by sparc inspect",
        )
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _failed("config.json is no JSON", why=str(error)[:200]) from None
    if not isinstance(described, dict):
        raise _failed("config.json is no object")
    if "auto_map" in described:
        raise _failed(
            f"{folder.name} needs code of its own",
            why="sparc runs no code from model folders",
            hint="write a function pkg.mod:fn",
        )
    return described


def _model_class(transformers: Any, described: Mapping[str, Any]) -> Any:
    """The class that config.json names, if transformers has it; else the base model of its type."""
    for name in described.get("architectures") or ():
        found = getattr(transformers, str(name), None) if str(name).isidentifier() else None
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return transformers.AutoModel


def _no_remote_code(owner: Any) -> dict[str, Any]:
    return {"trust_remote_code": False} if owner.__name__.startswith("Auto") else {}


def _turn_off_caches(model: nn.Module) -> None:
    """A key/value cache among the outputs is of no use without one among the inputs."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "use_cache"):
            config.use_cache = False


# example inputs -------------------------------------------------------------------------------------------------------
def example_inputs(model: nn.Module, config: Any) -> dict[str, Tensor]:
    """Seeded random inputs of the kinds that the model's forward() declares.

    Raises:
        CaptureError: SPARC110 when no input is of a kind that is known.
    """
    declared = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(0)
    text = getattr(config, "text_config", None) or config
    vision = getattr(config, "vision_config", None) or config
    makers = {
        "input_ids": lambda: _ids(text, generator),
        "attention_mask": lambda: torch.ones(_BATCH, _length(text), dtype=torch.int64),
        "decoder_input_ids": lambda: _ids(text, generator),
        "pixel_values": lambda: _pixels(vision, generator),
        "input_values": lambda: torch.randn(_BATCH, _SAMPLES, generator=generator),
        "input_features": lambda: _features(config, generator),
    }
    wanted = _wanted(model, config, declared)
    if not wanted:
        names = ", ".join(declared)
        raise _failed(
            "example inputs cannot be worked out", why=f"forward() declares {names}", hint="write a function pkg.mod:fn"
        )
    return {name: makers[name]() for name in makers if name in wanted}


def _wanted(model: nn.Module, config: Any, declared: Mapping[str, Any]) -> set[str]:
    main = str(getattr(model, "main_input_name", "input_ids"))
    kinds = ("input_ids", "pixel_values", "input_values", "input_features")
    wanted = {name for name in kinds if name in declared and (name == main or _has_part(config, name))}
    if "input_ids" in wanted and "attention_mask" in declared:
        wanted.add("attention_mask")
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in declared:
        wanted.add("decoder_input_ids")
    return wanted


def _has_part(config: Any, name: str) -> bool:
    """Whether a model of several kinds of input has the part that reads this one."""
    if name == "input_ids":
        return hasattr(config, "text_config")
    return name == "pixel_values" and hasattr(config, "vision_config")


def _length(config: Any) -> int:
    longest = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or _LENGTH
    return max(2, min(_LENGTH, int(longest)))


def _ids(config: Any, generator: torch.Generator) -> Tensor:
    """Token numbers that are none of the special ones at the beginning of a vocabulary."""
    vocabulary = int(getattr(config, "vocab_size", 2))
    return torch.randint(min(10, vocabulary // 2), vocabulary, (_BATCH, _length(config)), generator=generator)


def _pixels(config: Any, generator: torch.Generator) -> Tensor:
    size = getattr(config, "image_size", None) or 224
    if isinstance(size, Mapping):
        size = (size.get("height", 224), size.get("width", 224))
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return torch.randn(_BATCH, int(getattr(config, "num_channels", 3)), int(height), int(width), generator=generator)


def _features(config: Any, generator: torch.Generator) -> Tensor:
    length = 2 * int(getattr(config, "max_source_positions", 1500))
    return torch.randn(_BATCH, int(getattr(config, "num_mel_bins", 80)), length, generator=generator)


def dynamic_axes(inputs: Mapping[str, Tensor]) -> dict[str, dict[int, str]]:
    """Batches vary, and so do the lengths of texts."""
    axes: dict[str, dict[int, str]] = {}
    for name in inputs:
        axes[name] = {0: "batch"}
        if name in ("input_ids", "attention_mask"):
            axes[name][1] = "seq"
        elif name == "decoder_input_ids":
            axes[name][1] = "decoder_seq"
    return axes


# errors ---------------------------------------------------------------------------------------------------------------
def _failed(what: str, *, why: str = "", hint: str = "") -> CaptureError:
    return CaptureError(codes.LOAD_FAILED, what, why=why, hint=hint)


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # transformers raises assorted types
        why = f"{type(error).__name__}: {error}".splitlines()[0][:300].replace(str(folder.resolve()), folder.name)
        raise _failed(f"the model in {folder.name} cannot be loaded", why=why) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' own progress bars and warnings off the terminal."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(before)
        if bars:
            transformers_logging.enable_progress_bar()
