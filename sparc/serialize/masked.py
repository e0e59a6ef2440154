"""Kept codes that are not written, because the target stores the codes of every element: they are picked out again."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sparc import layout
from sparc.encoding.base import Encoding
from sparc.encoding.mask import MaskEncoding
from sparc.serialize import schema
from sparc.serialize.schema import malformed
from sparc.target import Masked, StoredTensor

Parse = Callable[[str], Encoding]


def pick(place: StoredTensor, part: Callable[[str], Tensor], parse: Parse) -> Tensor:
    """The kept codes of a mask, from a target's tensor that holds every element's.

    Args:
        place: the tensor; `place.masked` says which mask.
        part: the mask's own parts, by the name of the program's weight.
        parse: the encoding of a spec's text.

    Raises:
        ValueError: when tensor, mask and shape do not belong together.
        PassError: SPARC201, SPARC209 for a spec that cannot be read.
    """
    masked = place.masked
    spec = parse(masked.spec) if masked is not None else None
    if masked is None or not isinstance(spec, MaskEncoding) or set(masked.parts) != set(spec.mask_names):
        raise ValueError("it has no mask")
    packed = spec.of.pack(torch.empty(masked.shape, dtype=torch.uint8, device="meta"))
    stored = layout.restore(place.layout, place.tensor, packed.shape)
    if stored.shape != packed.shape:
        raise ValueError(f"{list(stored.shape)} are no codes of a matrix {list(masked.shape)}")
    mask = spec.mask({name: part(weight) for name, weight in masked.parts.items()}, masked.shape)
    return spec.keep(spec.of.unpack(stored, masked.shape[-1]), mask)


def masked_to_json(masked: Masked) -> dict[str, Any]:
    """JSON-ready values."""
    return {"spec": masked.spec, "shape": list(masked.shape), "parts": dict(masked.parts)}


def masked_from_json(row: Any) -> Masked:
    """The inverse of `masked_to_json`.

    Raises:
        ArtifactError: SPARC503.
    """
    schema.fields(row, "a mask", ["spec", "shape", "parts"])
    shape = schema.sizes(row["shape"], "a mask's shape")
    if len(shape) < 2:
        raise malformed("a mask's shape is no matrix's")
    parts: Mapping[str, Any] = schema.entries(row["parts"], "a mask's parts")
    return Masked(
        schema.text(row["spec"], "a spec", 1000),
        shape,
        {name: schema.text(weight, "a weight's name") for name, weight in parts.items()},
    )
