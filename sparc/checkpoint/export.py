"""A compiled language model as a Hugging Face folder in compressed-tensors' format `pack-quantized` (for vLLM)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparc import codes, files
from sparc.analysis.sites import Site, find_sites
from sparc.diag import LoweringError
from sparc.encoding.bits import pack_bits
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.operators import find_spec
from sparc.generation.attachments import CONFIG, SETTINGS, TOKENIZER_FILES, attached_json
from sparc.program import Program
from sparc.serialize import TensorFile

if TYPE_CHECKING:
    from sparc.artifact import Artifact

_WEIGHTS = "model.safetensors"
_WORD = 4  # bytes


@dataclass(frozen=True)
class Exported:
    """What a checkpoint holds.

    Args:
        packed: the layers whose weights are packed codes.
        dense: the layers whose weights are floats though the artifact has codes for them, and why.
    """

    packed: tuple[str, ...]
    dense: Mapping[str, str] = field(default_factory=dict)


def export_checkpoint(artifact: "Artifact", folder: str | Path) -> Exported:
    """Write a folder with config.json, model.safetensors and the tokenizer's files, whole or not at all.

    Linear layers on integer grids of 4 or 8 bits, per channel or by groups that divide a row, keep their codes, scales
    and zero points; all else is written as the floats that it decodes to.

    Args:
        artifact: compiled from a model of transformers with `task="text-generation"`.
        folder: where; it must not exist, or be empty.

    Raises:
        LoweringError: SPARC509 when the artifact has no config.json, or its weights are no longer the model's own (a
            pass merged or moved them).
        ArtifactError: SPARC505 when the folder cannot be written.
    """
    config = attached_json(artifact, CONFIG)
    if not config:
        raise _unable("the artifact has no config.json", hint='compile it with task="text-generation"')
    program = artifact.program
    tensors = {name: tensor for name, tensor in program.weights.items() if tensor.is_floating_point()}
    schemes: dict[str, tuple[dict[str, Any], list[str]]] = {}
    dense: dict[str, str] = {}
    for site in find_sites(program)[0]:
        if site.encoded:
            for part in site.source.args[0]:  # type: ignore[union-attr]
                tensors.pop(str(part.target), None)  # type: ignore[union-attr]
            layer = site.weight.removesuffix(".weight")
            why = _why_dense(site)
            if why:
                dense[layer] = why
                tensors[site.weight] = _decoded(program, site)
            else:
                tensors.update(_packed(program, site, layer))
                scheme = _scheme(_grid(site))
                schemes.setdefault(json.dumps(scheme), (scheme, []))[1].append(layer)
    own = _check_names(config, set(tensors), {layer for _, layers in schemes.values() for layer in layers})
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items() if name not in own}
    described = {**config, "quantization_config": _quantization(list(schemes.values()), dense)} if schemes else config
    contents: dict[str, Any] = {CONFIG: [_json(described)], _WEIGHTS: TensorFile(tensors).chunks()}
    for name in (SETTINGS, *TOKENIZER_FILES):
        if name in artifact.attachments:
            contents[name] = [artifact.attachments[name]]
    with files.new_folder(folder, _may_replace) as temporary:
        for name, chunks in contents.items():
            files.write_file(temporary / name, chunks)
    return Exported(tuple(layer for _, layers in schemes.values() for layer in layers), dense)


def _grid(site: Site) -> Any:
    return find_spec(str(site.source.args[1]))


def _why_dense(site: Site) -> str:
    spec, shape = _grid(site), site.source.meta["val"].shape
    if any(use.operator != "linear" for use in site.uses):
        return "it is no linear layer's alone"
    if not isinstance(spec, IntGrid) or spec.bits not in (4, 8):
        return f"{spec} is no integer grid of 4 or 8 bits"
    if not spec.symmetric and spec.zero == "minimum":
        return "its grid has float minima, which the format lacks"
    if spec.group == "tensor" or (isinstance(spec.group, int) and shape[-1] % spec.group):
        return "its scales are neither per row nor of equal groups"
    return ""


def _parts(program: Program, site: Site) -> dict[str, Tensor]:
    names = [str(part.target) for part in site.source.args[0]]  # type: ignore[union-attr]
    return dict(zip(_grid(site).part_names, (program.weights[name] for name in names), strict=True))


def _decoded(program: Program, site: Site) -> Tensor:
    given = site.source.args
    parts = [program.weights[str(part.target)] for part in given[0]]  # type: ignore[union-attr]
    found: Tensor = site.source.target(parts, *given[1:])  # type: ignore[operator]
    return found


def _packed(program: Program, site: Site, layer: str) -> dict[str, Tensor]:
    """`weight_packed` along the inputs and `weight_zero_point` along the outputs, in words of 32 bits."""
    spec, parts = _grid(site), _parts(program, site)
    out, columns = (int(size) for size in site.source.meta["val"].shape)
    numbers = spec.unpack(parts["codes"], columns).to(torch.int16) - spec.low
    made = {
        f"{layer}.weight_packed": _words(numbers.to(torch.uint8), spec.bits),
        f"{layer}.weight_scale": parts["scale"].reshape(out, -1),
        f"{layer}.weight_shape": torch.tensor([out, columns]),
    }
    if "zero" in parts:
        zeros = parts["zero"].reshape(out, -1).to(torch.uint8)
        made[f"{layer}.weight_zero_point"] = _words(zeros.t().contiguous(), spec.bits).t().contiguous()
    return made


def _words(numbers: Tensor, bits: int) -> Tensor:
    """Rows of unsigned numbers as little-endian words, int32 `[rows, ceil(n * bits / 32)]`."""
    packed = pack_bits(numbers, bits)
    filled = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % _WORD))
    return filled.flatten().view(torch.int32).reshape(len(numbers), -1)


def _scheme(spec: IntGrid) -> dict[str, Any]:
    strategy = {"strategy": "channel"} if spec.group == "channel" else {"strategy": "group", "group_size": spec.group}
    weights = {"num_bits": spec.bits, "type": "int", "symmetric": spec.symmetric, "dynamic": False, **strategy}
    return {"weights": weights, "input_activations": None, "output_activations": None}


def _quantization(schemes: list[tuple[dict[str, Any], list[str]]], dense: Mapping[str, str]) -> dict[str, Any]:
    groups = {f"group_{index}": {"targets": layers, **scheme} for index, (scheme, layers) in enumerate(schemes)}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head", *dense],
    }


def _check_names(config: Mapping[str, Any], found: set[str], packed: set[str]) -> set[str]:
    """The names are those of the model that config.json describes, and its buffers that are not saved: returns those.

    Raises:
        LoweringError: SPARC509.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise _unable("transformers is not installed", hint="pip install transformers") from None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    wanted = set(model.state_dict()) - set(model.all_tied_weights_keys)
    own = {name for name, _ in model.named_buffers()} - wanted
    present = {name for name in found if not _is_part(name, packed)} | {f"{layer}.weight" for layer in packed}
    for name in sorted(wanted - present):
        raise _unable(f"the artifact has no weight {name!r}", why="a pass merged or folded it into others")
    for name in sorted(present - wanted - own):
        raise _unable(f"the model has no weight {name!r}", why="a pass made it")
    return own


def _is_part(name: str, packed: set[str]) -> bool:
    return name.rpartition(".")[0] in packed and ".weight_" in name


def _may_replace(folder: Path) -> str | None:
    return "something is there" if not folder.is_dir() or any(folder.iterdir()) else None


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True).encode() + b"\n"


def _unable(what: str, *, why: str = "", hint: str = "") -> LoweringError:
    return LoweringError(codes.NOT_EXPORTABLE, what, why=why, hint=hint)
