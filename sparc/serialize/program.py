"""A whole program as JSON (schema version 1): entries (`sparc.serialize.entry`), weights and their other names.

    {"version": 1, "entries": {"forward": {...}}, "aliases": {"lm_head.weight": "embed.weight"},
     "weights": {"fc.weight": {"dtype": "float32", "shape": [16, 8], "tensor": "fc.weight", "layout": "identity",
                               "stride": [1, 16]?, "origins": ["fc.weight"], "trainable": true?,
                               "grid": {"spec": "IntGrid(bits=8)", "view": "matrix", "tensors": {"scale": {...}}}?}}}

The numbers lie in a safetensors file: `tensor` names the stored tensor, and `layout` (`sparc.layout`) says how it was
stored. With `masked`, the tensor holds the codes of every element, and the weight is what the mask keeps of them
(`sparc.serialize.masked`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparc import layout
from sparc.diag import SparcError
from sparc.encoding.base import Encoding
from sparc.encoding.grid import Grid
from sparc.encoding.operators import find_spec, spec_name
from sparc.encoding.view import WeightView
from sparc.program import Program, Weight, WeightStore
from sparc.serialize import schema
from sparc.serialize.entry import entry_from_json, entry_to_json
from sparc.serialize.masked import masked_from_json, masked_to_json, pick
from sparc.serialize.schema import malformed, unwritable
from sparc.serialize.values import dtype_from_text, dtype_to_text
from sparc.target import StoredTensor

VERSION = 1
_TENSOR = ("dtype", "shape", "tensor", "layout")
Parse = Callable[[str], Encoding]


@dataclass(frozen=True)
class Described:
    """A program ready to be written: its description, and every tensor that description and target refer to."""

    program: dict[str, Any]
    tensors: dict[str, Tensor]


# writing ------------------------------------------------------------------------------------------------------------
def program_to_dict(program: Program, stored: Sequence[StoredTensor] = ()) -> Described:
    """Describe a program whose weights may lie in a target's tensors.

    Args:
        program: the program.
        stored: the target's tensors, all of which will be written; a weight that is among them is not written again.

    Raises:
        ArtifactError: SPARC508 when something cannot be stored, or a target's tensor does not restore to its weight.
    """
    weights, tensors = place_weights(program.weights, stored)
    described = {
        "version": VERSION,
        "entries": {name: entry_to_json(entry) for name, entry in program.entries.items()},
        "aliases": dict(program.weights.aliases),
        "weights": weights,
    }
    return Described(described, tensors)


def place_weights(
    weights: WeightStore, stored: Sequence[StoredTensor] = ()
) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """Where each weight will lie: its description, and every tensor by the name it is written under.

    Args:
        weights: a program's weights.
        stored: as for `program_to_dict`.

    Raises:
        ArtifactError: SPARC508 when a target's tensor does not restore to its weight.
    """
    writer = _Writer(stored, weights)
    return {name: writer.weight(name, weights.record(name)) for name in weights}, writer.tensors


class _Writer:
    """Finds a place in the file for every tensor of a program."""

    def __init__(self, stored: Sequence[StoredTensor], weights: WeightStore) -> None:
        self._weights = weights
        self.tensors = {each.name: each.tensor for each in stored}
        if len(self.tensors) != len(stored):
            raise unwritable("two stored tensors have the same name")
        self._by_weight: dict[str, StoredTensor] = {}
        for each in stored:
            if each.weight is not None and (each.masked is None or self._picks(each, weights[each.weight])):
                self._by_weight.setdefault(each.weight, each)

    def _picks(self, place: StoredTensor, tensor: Tensor) -> bool:
        """Whether a weight comes back from a tensor that holds more: bitwise, or it is written by itself."""
        try:
            return _same(pick(place, self._weights.__getitem__, find_spec), tensor)
        except (ValueError, RuntimeError):
            return False

    def weight(self, name: str, record: Weight) -> dict[str, Any]:
        """One weight's description."""
        described = self._place(name, record.tensor, self._by_weight.get(name))
        described["origins"] = list(record.origins)
        if record.trainable:
            described["trainable"] = True
        if record.grid is not None:
            tensors = {
                part: self._place(f"{name}:{part}", tensor, None) for part, tensor in record.grid.tensors.items()
            }
            described["grid"] = {"spec": str(record.grid.spec), "view": record.grid.view, "tensors": tensors}
        return described

    def _place(self, name: str, tensor: Tensor, place: StoredTensor | None) -> dict[str, Any]:
        if place is None:
            unique = name
            while unique in self.tensors:
                unique += "'"
            self.tensors[unique] = tensor
            place = StoredTensor(unique, tensor)
        elif place.masked is None:
            _check_place(name, tensor, place)
        described: dict[str, Any] = {
            "dtype": dtype_to_text(tensor.dtype),
            "shape": list(tensor.shape),
            "tensor": place.name,
            "layout": place.layout,
        }
        if place.masked is not None:
            described["masked"] = masked_to_json(place.masked)
        if not tensor.is_contiguous() and _dense(tensor.shape, tensor.stride()):
            described["stride"] = list(tensor.stride())
        return described


def _check_place(name: str, tensor: Tensor, place: StoredTensor) -> None:
    if place.tensor is tensor and place.layout == layout.IDENTITY:
        return
    restored = layout.restore(place.layout, place.tensor, tuple(tensor.shape))
    if not _same(restored, tensor):
        raise unwritable(
            f"weight {name!r} does not come back from the target's tensor {place.name!r}", f"layout {place.layout}"
        )


def _same(restored: Tensor, tensor: Tensor) -> bool:
    same = restored.dtype == tensor.dtype and restored.shape == tensor.shape
    return same and torch.equal(_bits(restored), _bits(tensor))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether strides give every element a place of its own, without holes."""
    expected = 1
    for step, size in sorted(zip(stride, shape, strict=True)):
        if size != 1:
            if step != expected:
                return False
            expected *= size
    return expected > 0


# reading ------------------------------------------------------------------------------------------------------------
def program_from_dict(
    described: Any, tensor: Callable[[str], Tensor], parse: Parse
) -> tuple[Program, list[StoredTensor]]:
    """The program, and how its weights lie in the stored tensors.

    Args:
        described: what `program_to_dict` gave, from anyone's hands.
        tensor: a stored tensor by name, itself bounded by the file it comes from.
        parse: the encoding of a spec's text, built of registered encodings only.

    Raises:
        ArtifactError: SPARC503 when it is malformed, SPARC507 for another schema version.
        PassError: SPARC201 for an encoding that is not registered.
    """
    with schema.reading("program.json"), schema.quiet():
        found = schema.fields(described, "program.json", ["version", "entries", "aliases", "weights"])
        if found["version"] != VERSION:
            raise malformed(
                f"program.json has schema version {str(found['version'])[:20]}", f"this sparc reads version {VERSION}"
            )
        aliases = schema.entries(found["aliases"], "aliases")
        store = WeightStore(aliases={key: schema.text(value, "an alias") for key, value in aliases.items()})
        stored: list[StoredTensor] = []
        rows = schema.entries(found["weights"], "weights")
        for name, row in rows.items():
            weight, place = _weight_from_json(name, row, tensor, parse, rows)
            store.put(name, weight)
            stored.append(place)
        register = _registrar(parse)
        rows = schema.entries(found["entries"], "entries")
        if not rows:
            raise malformed("the program has no entries")
        return Program(store, {name: entry_from_json(row, store, register) for name, row in rows.items()}), stored


def _weight_from_json(
    name: str, row: Any, tensor: Callable[[str], Tensor], parse: Parse, rows: Mapping[str, Any]
) -> tuple[Weight, StoredTensor]:
    schema.fields(row, f"weight {name[:80]}", [*_TENSOR, "origins"], ["stride", "grid", "trainable", "masked"])

    def part(weight: str) -> Tensor:
        if "masked" in rows[weight]:
            raise malformed(f"the mask of {name[:80]!r} lies behind another mask")
        return _tensor_from_json(weight, rows[weight], tensor)[0]

    value, place = _tensor_from_json(name, row, tensor, lambda place: pick(place, part, parse))
    grid = None
    if "grid" in row:
        found = schema.fields(row["grid"], "a grid", ["spec", "view", "tensors"])
        parts = schema.entries(found["tensors"], "a grid's tensors")
        view = schema.text(found["view"], "a view", 64)
        if str(WeightView.parse(view)) != view:
            raise malformed(f"unknown view {view!r}")
        tensors = {part: _tensor_from_json(part, each, tensor)[0] for part, each in parts.items()}
        grid = Grid(parse(schema.text(found["spec"], "a spec")), tensors, view)
    origins = schema.texts(row["origins"], "origins")
    return Weight(value, grid, origins, row.get("trainable") is True), place


def _tensor_from_json(
    name: str, row: Any, tensor: Callable[[str], Tensor], pick: Callable[[StoredTensor], Tensor] | None = None
) -> tuple[Tensor, StoredTensor]:
    schema.fields(row, f"tensor {name[:80]}", _TENSOR, ["stride", "origins", "grid", "trainable", "masked"])
    shape, dtype = schema.sizes(row["shape"], "a shape"), dtype_from_text(row["dtype"])
    source, way = tensor(schema.text(row["tensor"], "a tensor's name")), schema.text(row["layout"], "a layout", 256)
    masked = masked_from_json(row["masked"]) if pick is not None and "masked" in row else None
    place = StoredTensor(row["tensor"], source, name, way, masked)
    try:
        value = layout.restore(way, source, shape) if pick is None or masked is None else pick(place)
    except RuntimeError as error:
        raise malformed(f"{name[:80]!r} cannot be restored by {way!r}", str(error)[:200]) from None
    if tuple(value.shape) != shape or value.dtype != dtype:
        raise malformed(
            f"{name[:80]!r} is not as described", f"{value.dtype} {list(value.shape)}, not {dtype} {list(shape)}"
        )
    if "stride" in row:
        stride = schema.sizes(row["stride"], "strides")
        if len(stride) != len(shape) or not _dense(shape, stride):
            raise malformed(f"{name[:80]!r} has impossible strides")
        value = torch.empty_strided(shape, stride, dtype=dtype).copy_(value)
    return value, place


def _registrar(parse: Parse) -> Callable[[str], None]:
    known: set[str] = set()

    def register(spec: str) -> None:
        if spec in known:
            return
        try:
            named = spec_name(parse(spec))
        except SparcError as error:
            raise malformed(f"unknown encoding {spec[:120]!r}", error.diagnostic.what) from None
        if named != spec:
            raise malformed(f"encoding {spec[:120]!r} is not in its normal form", named)
        known.add(spec)

    return register
