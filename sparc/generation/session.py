"""A batch of sequences that grows: the tokens seen so far, and the runtime's cache of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sparc import codes
from sparc.cache import KEEP, LOGITS, MASK, POSITIONS, TOKENS, empty_slots, token_positions
from sparc.diag import ArtifactError
from sparc.program import Entry

RunFlat = Callable[[Sequence[Tensor]], list[Tensor]]


class CachedRun(Protocol):
    """An entry together with its cache, which stays where the runtime wants it."""

    @property
    def length(self) -> int:
        """How many places of the cache are used."""
        ...

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run on every input that is no slot of the cache; returns every output that is none."""
        ...

    def reset(self) -> None:
        """Forget everything."""
        ...

    def cut(self, places: int) -> None:
        """Keep the first `places` places only."""
        ...


class ExplicitCache:
    """A cache handed over as ordinary tensors, in any runtime."""

    def __init__(self, entry: Entry, batch: int, run: RunFlat) -> None:
        """Args: an entry with a cache, the number of sequences, and what runs it on one tensor per input."""
        assert entry.cache is not None
        self._entry, self._cache, self._batch, self._run = entry, entry.cache, batch, run
        self.reset()

    def reset(self) -> None:
        """See `CachedRun`."""
        self._slots = dict(zip(self._cache.inputs, empty_slots(self._entry, self._batch), strict=True))

    @property
    def length(self) -> int:
        """See `CachedRun`."""
        slot = self._cache.slots[0]
        return self._slots[slot.input].shape[slot.axis]

    def cut(self, places: int) -> None:
        """See `CachedRun`."""
        self._slots = {slot.input: self._slots[slot.input].narrow(slot.axis, 0, places) for slot in self._cache.slots}

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `CachedRun`."""
        given = {**tensors, **self._slots}
        signature = self._entry.signature
        results = self._run([given[name].contiguous() for name in signature.input_names])
        outputs = dict(zip(signature.output_names, results, strict=True))
        self._slots = {slot.input: outputs.pop(slot.output) for slot in self._cache.slots}
        return outputs


class Session:
    """Sequences that were fed to a model, and can be continued.

    Attributes:
        mask: which places hold a token, int64 `[batch, places]`.
        pending: tokens that were generated but not yet fed, `[batch, 1]`; the next feed begins with them.
    """

    def __init__(
        self, entry: Entry, run: CachedRun, batch: int, length: int, source: Mapping[str, Tensor] | None = None
    ) -> None:
        """Args: an entry with a cache, how it is run, the number of sequences, the greatest number of places, and what
        the entry takes of an encoded source.
        """
        self._entry, self._run, self._source = entry, run, dict(source or {})
        self.batch, self.length = batch, length
        self.mask = torch.zeros(batch, 0, dtype=torch.int64)
        self.pending: Tensor | None = None

    @property
    def used(self) -> int:
        """How many places are used."""
        return self.mask.shape[1]

    def feed(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Append tokens to every sequence.

        Args:
            tokens: int64 `[batch, count]`.
            mask: which of them count, int64 `[batch, count]`; the last one of every row must.

        Returns:
            The logits after the last token, `[batch, vocabulary]`.

        Raises:
            ArtifactError: SPARC511 when they do not fit.
        """
        mask = torch.ones_like(tokens) if mask is None else mask
        if self.pending is not None:
            waiting = torch.ones_like(self.pending)
            empty = tokens.shape[1] == 0
            tokens = self.pending if empty else torch.cat([self.pending, tokens], dim=1)
            mask = waiting if empty else torch.cat([waiting, mask], dim=1)
            self.pending = None
        count = tokens.shape[1]
        check_room(self.used + count, self.length)
        self.mask = torch.cat([self.mask, mask], dim=1)
        offered = {
            TOKENS: tokens,
            MASK: self.mask,
            POSITIONS: token_positions(self.mask, count),
            KEEP: torch.tensor([count - 1]),
            **self._source,
        }
        names = self._entry.signature.input_names
        logits = self._run({name: value for name, value in offered.items() if name in names})[LOGITS]
        return logits[:, -1]

    def cut(self, places: int) -> None:
        """Forget all but the first `places` places.

        Raises:
            ArtifactError: SPARC511 when there are fewer.
        """
        if not 0 <= places <= self.used:
            raise ArtifactError(codes.CACHE_FULL, f"the session has {self.used} places, not {places}")
        self._run.cut(places)
        self.mask, self.pending = self.mask[:, :places], None


def check_room(wanted: int, length: int) -> None:
    """Raises ArtifactError SPARC511 when `wanted` places do not fit into `length`."""
    if wanted > length:
        why = f"{wanted} places are needed, there are {length}"
        raise ArtifactError(codes.CACHE_FULL, "prompt and new tokens do not fit into the cache", why=why)


def check_prompt(tokens: Any, mask: Any, vocabulary: int | None = None) -> tuple[Tensor, Tensor]:
    """A prompt's tokens and mask, int64 `[batch, count]`, with what is hidden moved to the front of each row.

    So every row ends with its last token, wherever the tokenizer put the padding. The arguments and errors are those of
    `check_tokens`.
    """
    tokens, mask = check_tokens(tokens, mask, vocabulary)
    order = mask.argsort(dim=1, stable=True)
    return (tokens * mask).gather(1, order), mask.gather(1, order)


def check_tokens(tokens: Any, mask: Any, vocabulary: int | None = None) -> tuple[Tensor, Tensor]:
    """Tokens and their mask, int64 `[batch, count]`, where they are.

    Args:
        tokens: `[batch, count]`.
        mask: 1 where a token counts, or None.
        vocabulary: how many tokens there are, if known.

    Raises:
        ArtifactError: SPARC512 for other shapes and types, an empty row, and tokens that do not exist.
    """
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
        raise ArtifactError(codes.BAD_PROMPT, "input_ids are int64 tokens [batch, seq]", why=_described(tokens))
    if mask is None:
        mask = torch.ones_like(tokens)
    if not isinstance(mask, Tensor) or mask.shape != tokens.shape:
        raise ArtifactError(codes.BAD_PROMPT, "attention_mask has the shape of input_ids", why=_described(mask))
    visible = mask != 0
    empty = (~visible.any(1)).nonzero().flatten().tolist() if tokens.shape[0] else [0]
    if empty:
        raise ArtifactError(codes.BAD_PROMPT, f"row {empty[0]} of the prompt has no token")
    outside = (tokens < 0) | (tokens >= vocabulary) if vocabulary is not None else tokens < 0
    if bool((outside & visible).any()):
        worst = int(tokens[outside & visible][0])
        raise ArtifactError(codes.BAD_PROMPT, f"there is no token {worst}", why=f"the vocabulary has {vocabulary}")
    return tokens.long().masked_fill(outside, 0), visible.long()


def _described(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else f"got {type(value).__name__}"
