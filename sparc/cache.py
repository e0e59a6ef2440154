"""Entries that are called again and again on a growing sequence: which outputs are the next call's inputs.

Such an entry takes `input_ids` `[batch, seq]`, `attention_mask` `[batch, past + seq]`, maybe `position_ids`
`[batch, seq]`, maybe `logits_to_keep` `[kept]` (the places whose logits are wanted) and one tensor for every slot.

The decoder of an encoder-decoder besides takes what the entry `encoder` made of the source, under the names of that
entry's outputs, and `encoder_attention_mask` `[batch, source]`: the same in every call.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparc import codes
from sparc.diag import ArtifactError

if TYPE_CHECKING:
    from sparc.program import Entry

TOKENS, MASK, POSITIONS, KEEP, LOGITS = "input_ids", "attention_mask", "position_ids", "logits_to_keep", "logits"
ENCODER, DECODER, SOURCE_MASK = "encoder", "decoder", "encoder_attention_mask"


@dataclass(frozen=True)
class CacheSlot:
    """A tensor that one call leaves for the next.

    Args:
        input: the input's name.
        output: the name of the output that takes its place in the next call.
        axis: the axis that grows by as many places as the call has tokens.
        kept: for other axes that were cut, the places of the captured model's tensor that are left, in order.
    """

    input: str
    output: str
    axis: int = 2
    kept: tuple[tuple[int, tuple[int, ...]], ...] = ()

    def cut(self, axis: int, places: Sequence[int]) -> "CacheSlot":
        """The slot with only some places of an axis as it is now."""
        known = dict(self.kept)
        known[axis] = tuple(known[axis][place] if axis in known else int(place) for place in places)
        return replace(self, kept=tuple(sorted(known.items())))


@dataclass(frozen=True)
class Cache:
    """The state of an entry, as explicit inputs and outputs.

    Args:
        slots: its tensors; all have the batch on axis 0.
        length: the greatest number of places, given by the model's position embeddings.
        source: inputs that stay as they are from call to call: what the entry `encoder` made, and its mask.
    """

    slots: tuple[CacheSlot, ...]
    length: int
    source: tuple[str, ...] = ()

    @property
    def inputs(self) -> list[str]:
        """The names of the input tensors."""
        return [slot.input for slot in self.slots]


def token_positions(mask: Tensor, count: int) -> Tensor:
    """The places of the last `count` tokens of every row, not counting hidden ones, `[batch, count]`, int64."""
    if count == 1:
        return (mask.sum(-1, keepdim=True) - 1).clamp(min=0)
    return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, mask.shape[1] - count :].contiguous()


def fit(entry: "Entry", tensors: Sequence[Tensor]) -> list[Tensor]:
    """The flat inputs of a call of the captured model as those of an entry whose cache was cut.

    Args:
        entry: the entry as it is now.
        tensors: one for each placeholder, with the shapes of the captured model; what is cut already stays.
    """
    slots = {slot.input: slot for slot in entry.cache.slots if slot.kept} if entry.cache is not None else {}
    fitted = []
    for name, tensor in zip(entry.signature.input_names, tensors, strict=True):
        for axis, places in slots[name].kept if name in slots else ():
            if tensor.shape[axis] != len(places):
                tensor = tensor.index_select(axis, torch.tensor(places))
        fitted.append(tensor)
    return fitted


def empty_slots(entry: "Entry", batch: int, length: int = 0) -> list[Tensor]:
    """A tensor of zeros for every slot of the cache, with `length` places."""
    assert entry.cache is not None
    types = dict(zip(entry.signature.input_names, (node.meta["val"] for node in entry.placeholders), strict=True))
    made = []
    for slot in entry.cache.slots:
        shape = [int(size) if isinstance(size, int) else 0 for size in types[slot.input].shape]
        shape[0], shape[slot.axis] = batch, length
        made.append(torch.zeros(shape, dtype=types[slot.input].dtype))
    return made


def complete(entry: "Entry", args: Sequence[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A call's inputs by name, with what was left out: nothing hidden, places counted, an empty cache, all logits.

    Args:
        entry: an entry with a cache.
        args: positional inputs.
        given: inputs by name.

    Raises:
        ArtifactError: SPARC506 when there are no tokens `[batch, seq]`.
    """
    signature = entry.signature
    named = {**dict(zip(signature.positional or signature.parameters, args, strict=False)), **given}
    tokens = named.get(TOKENS)
    if not isinstance(tokens, Tensor) or tokens.ndim != 2:
        raise ArtifactError(codes.CALL_MISMATCH, f"input {TOKENS!r} must be a tensor [batch, seq]")
    batch, count = tokens.shape
    past = "past_key_values"
    if past in signature.parameters and named.get(past) is None:
        place = signature.parameters.index(past)
        named[past] = signature.inputs[place].unflatten(empty_slots(entry, batch))
    if MASK in signature.parameters and named.get(MASK) is None:
        named[MASK] = torch.ones(batch, _past_length(entry, named[past]) + count, dtype=torch.int64)
    if POSITIONS in signature.parameters and named.get(POSITIONS) is None:
        named[POSITIONS] = token_positions(named[MASK], count)
    if KEEP in signature.parameters and named.get(KEEP) is None:
        named[KEEP] = torch.arange(count)
    return named


def _past_length(entry: "Entry", past: Any) -> int:
    assert entry.cache is not None
    leaves = torch.utils._pytree.tree_leaves(past)
    return int(leaves[0].shape[entry.cache.slots[0].axis]) if leaves and isinstance(leaves[0], Tensor) else 0
