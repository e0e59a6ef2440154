"""An entry's cache as JSON, checked on reading."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sparc.cache import Cache, CacheSlot
from sparc.serialize import schema
from sparc.serialize.schema import malformed

if TYPE_CHECKING:
    from sparc.program import Entry

_LONGEST = 1 << 40


def cache_to_json(cache: Cache) -> dict[str, Any]:
    """JSON-ready values."""
    described: dict[str, Any] = {
        "length": cache.length,
        "slots": [_slot_to_json(slot) for slot in cache.slots],
    }
    return {**described, **({"source": list(cache.source)} if cache.source else {})}


def _slot_to_json(slot: CacheSlot) -> list[Any]:
    kept = [[axis, list(places)] for axis, places in slot.kept]
    return [slot.input, slot.output, slot.axis, *([kept] if kept else [])]


def _kept_from_json(rows: Any, slot: CacheSlot, shape: Sequence[Any]) -> tuple[tuple[int, tuple[int, ...]], ...]:
    kept: dict[int, tuple[int, ...]] = {}
    for row in schema.items(rows, "the kept places of a cache"):
        if not isinstance(row, list) or len(row) != 2:
            raise malformed("the kept places of a cache are malformed")
        axis = schema.integer(row[0], "an axis", 1)
        places = tuple(schema.integer(place, "a place", 0) for place in schema.items(row[1], "places"))
        if axis >= len(shape) or axis in kept or axis == slot.axis or shape[axis] != len(places):
            raise malformed(f"{slot.input[:80]!r} does not have the places that it is said to have kept")
        kept[axis] = places
    return tuple(sorted(kept.items()))


def cache_from_json(described: Any, entry: "Entry") -> Cache:
    """The inverse of `cache_to_json`, for an entry whose graph has been read.

    Raises:
        ArtifactError: SPARC503 when a slot names no input or output, or an axis that they do not have, or the source
            no input.
    """
    found = schema.fields(described, "a cache", ["length", "slots"], ["source"])
    length = schema.integer(found["length"], "a cache's length", 1)
    if length > _LONGEST:
        raise malformed(f"a cache has {length} places")
    inputs = dict(zip(entry.signature.input_names, entry.placeholders, strict=True))
    outputs = dict(zip(entry.signature.output_names, entry.output.args[0], strict=True))  # type: ignore[arg-type]
    slots = []
    for row in schema.items(found["slots"], "a cache's slots"):
        if not isinstance(row, list) or len(row) not in (3, 4):
            raise malformed("a slot of a cache is malformed")
        slot = CacheSlot(
            schema.text(row[0], "an input"), schema.text(row[1], "an output"), schema.integer(row[2], "an axis", 1)
        )
        if slot.input not in inputs or slot.output not in outputs:
            raise malformed(f"a slot of a cache names {slot.input[:80]!r} and {slot.output[:80]!r}")
        given, made = inputs[slot.input].meta["val"], outputs[slot.output].meta["val"]  # type: ignore[union-attr]
        if not slot.axis < given.ndim == made.ndim or given.dtype != made.dtype:
            raise malformed(f"{slot.input[:80]!r} and {slot.output[:80]!r} are no slot of a cache")
        slots.append(replace(slot, kept=_kept_from_json(row[3], slot, given.shape)) if len(row) == 4 else slot)
    if len({slot.input for slot in slots}) != len(slots) or len({slot.output for slot in slots}) != len(slots):
        raise malformed("two slots of a cache name one tensor")
    source = tuple(schema.text(name, "an input") for name in schema.items(found.get("source", []), "a source"))
    if len({*source, *(slot.input for slot in slots)}) != len(source) + len(slots) or not inputs.keys() >= {*source}:
        raise malformed("a cache's source is not of inputs of its own")
    return Cache(tuple(slots), length, source)
