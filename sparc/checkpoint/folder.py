"""Hugging Face folders with compressed weights: `config.json` says how, safetensors hold them."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparc import codes
from sparc.checkpoint import build
from sparc.checkpoint.awq import read_awq
from sparc.checkpoint.base import Checkpoint, StoredWeight, malformed, plain, unknown
from sparc.checkpoint.compressed import read_compressed
from sparc.checkpoint.fp8 import read_fp8
from sparc.checkpoint.gptq import read_gptq
from sparc.checkpoint.layer import Layer
from sparc.diag import CaptureError

_CONFIG_LIMIT = 1 << 22
_SETTINGS = ("quantization_config", "compression_config")

Reader = Callable[[Layer, Mapping[str, Any]], StoredWeight]
_READERS: Mapping[str, tuple[frozenset[str], Reader]] = {
    "gptq": (frozenset({"qweight", "qzeros", "scales", "g_idx"}), read_gptq),
    "awq": (frozenset({"qweight", "qzeros", "scales"}), read_awq),
    "compressed-tensors": (
        frozenset(
            {
                "weight_packed",
                "weight_scale",
                "weight_zero_point",
                "weight_shape",
                "weight_g_idx",
                "weight_global_scale",
            }
        ),
        read_compressed,
    ),
    "fp8": (frozenset({"weight_scale_inv", "weight_scale"}), read_fp8),
}
_OF_ACTIVATIONS = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point",
                   "input_g_idx", "activation_scale", "k_scale", "v_scale")  # fmt: skip


def read_folder(folder: Path) -> Checkpoint:
    """The model in a folder whose `config.json` has a `quantization_config`.

    Raises:
        CaptureError: SPARC106, SPARC110 and SPARC116 to SPARC119; see `sparc.api.read_checkpoint`.
    """
    described = read_config(folder)
    if not is_compressed(described):
        raise unknown(f"{folder.name} holds no compressed weights", "compile the folder itself: sparc compile FOLDER")
    settings = next(described[key] for key in _SETTINGS if key in described)
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if not isinstance(method, str) or method not in _READERS:
        raise unknown(f"{folder.name} is compressed by {str(method)[:40]!r}", f"one of {', '.join(_READERS)}")
    check_safetensors(folder)
    transformers = build.transformers_package()
    source = f"{folder.name} ({method})"
    weights, notes = _weights(folder, method, settings)
    with build.quiet(), build.explained(folder.name, folder):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        for key in _SETTINGS:
            if hasattr(config, key):
                delattr(config, key)
        owner = build.model_class(transformers, described)
        if owner is transformers.AutoModel:
            owner = transformers.MODEL_MAPPING[type(config)]
    return replace(build.build(owner, config, weights, source), notes=notes)


def read_config(folder: Path) -> dict[str, Any]:
    """What `config.json` says.

    Raises:
        CaptureError: SPARC110 when it is missing, too large, no JSON object, or names code of its own.
    """
    path = folder / "config.json"
    if not path.is_file() or path.stat().st_size > _CONFIG_LIMIT:
        raise CaptureError(
            codes.LOAD_FAILED,
            f"{folder.name} is no Hugging Face folder",
            why="it holds no config.json",
            hint="an artifact is read by sparc inspect",
        )
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CaptureError(codes.LOAD_FAILED, "config.json is no JSON", why=str(error)[:200]) from None
    if not isinstance(described, dict):
        raise CaptureError(codes.LOAD_FAILED, "config.json is no object")
    if "auto_map" in described:
        raise CaptureError(
            codes.LOAD_FAILED,
            f"{folder.name} needs code of its own",
            why="sparc runs no code from model folders",
            hint="write a function pkg.mod:fn",
        )
    return described


def is_compressed(described: Mapping[str, Any]) -> bool:
    """Whether a config announces compressed weights."""
    return any(key in described for key in _SETTINGS)


def check_safetensors(folder: Path) -> None:
    """Raises CaptureError SPARC110 when a folder holds no safetensors."""
    if not any(folder.glob("*.safetensors")):
        raise CaptureError(
            codes.LOAD_FAILED,
            f"{folder.name} holds no safetensors",
            hint="save it with model.save_pretrained(folder, safe_serialization=True)",
        )


def _weights(folder: Path, method: str, settings: Mapping[str, Any]) -> tuple[dict[str, StoredWeight], tuple[str, ...]]:
    """Every weight by its parameter's name, and what was left out."""
    parts, read = _READERS[method]
    layers: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    left = 0
    for name, tensor in _tensors(folder):
        path, _, part = name.rpartition(".")
        if part in parts:
            layers.setdefault(path, {})[part] = tensor
        elif part in _OF_ACTIVATIONS:
            left += 1
        else:
            others[name] = tensor
    weights = {}
    for path, tensors in layers.items():
        given = {"weight": others.pop(f"{path}.weight")} if f"{path}.weight" in others else {}
        weights[f"{path}.weight"] = read(Layer(path, {**tensors, **given}), settings)
    weights |= {name: plain(tensor, name) for name, tensor in others.items()}
    return weights, _notes(settings, left, weights.values())


def _notes(settings: Mapping[str, Any], left: int, weights: Iterable[StoredWeight]) -> tuple[str, ...]:
    notes = []
    if any(getattr(each.grid and each.grid.spec, "scale_dtype", "float32") != "float32" for each in weights):
        notes.append("weights are computed from codes and scales in float32, where other tools use half precision")
    groups = settings.get("config_groups")
    quantized = [
        group for group in (groups.values() if isinstance(groups, dict) else ())
        if isinstance(group, dict) and (group.get("input_activations") or group.get("output_activations"))
    ]  # fmt: skip
    if left or quantized or settings.get("activation_scheme"):
        notes.append(f"activations, which the checkpoint wants quantized ({left} tensors of their scales), stay floats")
    return tuple(notes)


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the folder's weights, once."""
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    seen: set[str] = set()
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if name in seen:
                        raise malformed(f"the tensor {name!r} is in two files")
                    seen.add(name)
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise _broken(path, str(error)) from None


def _broken(path: Path, why: str) -> CaptureError:
    short = any(words in why for words in ("header too small", "invalid header length", "incomplete metadata"))
    code = codes.CHECKPOINT_CUT if short else codes.CHECKPOINT_MALFORMED
    return CaptureError(code, f"{path.name} cannot be read", why=why[:200])
