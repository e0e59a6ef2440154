"""Hugging Face folders and GGUF files, and example inputs worked out from the config.

Nothing is downloaded, no code from the folder is run, and pickled weights are refused.
"""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparc import codes
from sparc.checkpoint import build
from sparc.checkpoint.base import Checkpoint
from sparc.checkpoint.folder import check_safetensors, is_compressed, read_config, read_folder
from sparc.checkpoint.read import read_checkpoint
from sparc.diag import CaptureError
from sparc.generation.text import checkpoint_files, tokenizer_files

_BATCH, _LENGTH = 2, 16
_SAMPLES = 16_000


def load_folder(folder: Path) -> dict[str, Any]:
    """Compile's arguments, and the tokenizer's files, for a model saved with `save_pretrained`; a compressed one is
    taken as it is, with `keep`.

    Raises:
        CaptureError: SPARC110 when the folder is incomplete, needs code of its own, or transformers is not installed;
            what `read_checkpoint` raises for a compressed one.
    """
    described = read_config(folder)
    if is_compressed(described):
        return _compressed(read_folder(folder), tokenizer_files(folder))
    check_safetensors(folder)
    transformers = build.transformers_package()
    with build.quiet(), build.explained(folder.name, folder):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        owner = build.model_class(transformers, described)
        model = owner.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            **_no_remote_code(owner),
        )
    model.eval()
    build.turn_off_caches(model)
    inputs = example_inputs(model, config)
    return {
        "model": model,
        "example_inputs": inputs,
        "dynamic": dynamic_axes(inputs),
        "attachments": tokenizer_files(folder),
    }


def load_gguf(path: Path) -> dict[str, Any]:
    """Compile's arguments for the model in a GGUF file, with the recipe `keep`.

    Raises:
        CaptureError: what `read_checkpoint` raises.
    """
    checkpoint = read_checkpoint(path)
    return _compressed(checkpoint, checkpoint_files(checkpoint))


def _compressed(checkpoint: Checkpoint, attachments: Mapping[str, bytes]) -> dict[str, Any]:
    inputs = example_inputs(checkpoint.model, checkpoint.model.config)
    return {
        "model": checkpoint,
        "example_inputs": inputs,
        "dynamic": dynamic_axes(inputs),
        "recipe": "keep",
        "attachments": attachments,
    }


def _no_remote_code(owner: Any) -> dict[str, Any]:
    return {"trust_remote_code": False} if owner.__name__.startswith("Auto") else {}


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
        raise CaptureError(
            codes.LOAD_FAILED,
            "example inputs cannot be worked out",
            why=f"forward() declares {names}",
            hint="write a function pkg.mod:fn",
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
