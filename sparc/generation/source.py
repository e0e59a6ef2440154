"""What an encoder-decoder reads: the source, encoded once, and the token that its decoder begins with."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparc import codes
from sparc.cache import DECODER, ENCODER, MASK, SOURCE_MASK, TOKENS
from sparc.diag import ArtifactError, CaptureError
from sparc.generation.attachments import CONFIG, SETTINGS, json_object
from sparc.generation.decoder import named_call
from sparc.generation.generate import Ending, stream_tokens
from sparc.generation.sampling import Sampling
from sparc.generation.session import ExplicitCache, RunFlat, Session
from sparc.program import Entry, Program
from sparc.samples import bind

if TYPE_CHECKING:
    from sparc.artifact import Artifact

_OWN_TOKENS = 16
_IGNORED_LABEL = -100


def start_token(attachments: Mapping[str, bytes]) -> int | None:
    """`decoder_start_token_id` by the settings of a model, else its `bos_token_id`, as transformers has it."""
    settings = [json_object(attachments, name) for name in (SETTINGS, CONFIG)]
    for name in ("decoder_start_token_id", "bos_token_id"):
        for given in settings:
            if isinstance(given.get(name), int):
                return int(given[name])
    return None


def begin_target(artifact: "Artifact", batch: int) -> Tensor:
    """The first token of every sequence that a decoder makes, int64 `[batch, 1]`.

    Raises:
        ArtifactError: SPARC513 when the artifact's settings do not say.
    """
    start = start_token(artifact.attachments)
    if start is None:
        raise ArtifactError(codes.NO_GENERATION, f"{SETTINGS} has no decoder_start_token_id")
    return torch.full((batch, 1), start, dtype=torch.int64)


def forced_tokens(settings: Mapping[str, Any], count: int) -> dict[int, int]:
    """The tokens that a model's settings prescribe, by their place among `count` new ones."""
    places = {"forced_bos_token_id": 0, "forced_eos_token_id": count - 1}
    found = {place: settings.get(name) for name, place in places.items()}
    first = {place: value[0] if isinstance(value, list) and value else value for place, value in found.items()}
    return {place: value for place, value in first.items() if isinstance(value, int)}


def encode_source(artifact: "Artifact", tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """What the artifact's decoder takes in every call.

    Args:
        artifact: of an encoder-decoder.
        tokens: int64 `[batch, source]`.
        mask: 1 where a token counts, int64 `[batch, source]`.

    Raises:
        ArtifactError: SPARC506 for a source longer than the model knows, SPARC513 when there is no encoder.
    """
    if ENCODER not in artifact.program.entries:
        raise ArtifactError(codes.NO_GENERATION, f"the artifact has no entry {ENCODER!r}")
    return _encode(artifact.program.entries[ENCODER], lambda given: artifact.run_flat(given, ENCODER), tokens, mask)


def _encode(encoder: Entry, run: RunFlat, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
    given = {TOKENS: tokens, MASK: mask}
    results = run([given[name] for name in encoder.signature.input_names])
    return {**dict(zip(encoder.signature.output_names, results, strict=True)), SOURCE_MASK: mask}


def entry_calls(program: Program, item: Any, *, start: int) -> dict[str, dict[str, Any]]:
    """An item of data as a call of the encoder and one of the decoder, after what the encoder makes of the item.

    Args:
        program: the captured encoder-decoder.
        item: what a tokenizer returns; with `decoder_input_ids`, or `labels` from which they follow. Without, the
            decoder reads the first tokens that it generates itself.
        start: the decoder's first token.

    Raises:
        CaptureError: SPARC102 when the item holds no such tokens.
    """
    named = named_call(item)
    if isinstance(named.get(TOKENS), Tensor):
        named.setdefault(MASK, torch.ones_like(named[TOKENS]))
    tensors = bind(program, named, ENCODER)
    entry = program.entries[ENCODER]
    given = dict(zip(entry.signature.input_names, tensors, strict=True))
    try:
        source = _encode(entry, lambda flat: program.run_flat(list(flat), entry=ENCODER), given[TOKENS], given[MASK])
    except (IndexError, RuntimeError) as error:
        why = str(error).splitlines()[0][:300]
        raise CaptureError(codes.INPUTS_MISSING, "an item of data= cannot be encoded", why=why) from None
    tokens = _target(item, start)
    if tokens is None:
        tokens = _own_tokens(program, source, start)
    decoder = program.entries[DECODER]
    return {ENCODER: named, DECODER: {TOKENS: tokens, **source_arguments(decoder, source)}}


def source_arguments(decoder: Entry, source: Mapping[str, Tensor]) -> dict[str, Any]:
    """The flat tensors of a source as the decoder's arguments."""
    place = decoder.signature.parameters.index("cross")
    names = [name for name in decoder.signature.input_names if name.startswith("cross.")]
    cross = decoder.signature.inputs[place].unflatten([source[name] for name in names])
    return {SOURCE_MASK: source[SOURCE_MASK], "cross": cross}


def _target(item: Any, start: int) -> Tensor | None:
    """The decoder's tokens that an item of data gives, int64 `[batch, count]`."""
    if not isinstance(item, Mapping):
        return None
    tokens, labels = item.get("decoder_input_ids"), item.get("labels")
    for name, each in (("decoder_input_ids", tokens), ("labels", labels)):
        if each is not None and not (isinstance(each, Tensor) and each.ndim == 2):
            raise CaptureError(codes.INPUTS_MISSING, f"{name!r} in data= are no tokens [batch, count]")
    if tokens is not None or labels is None:
        return tokens
    shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == _IGNORED_LABEL, start)  # what comes before does not see it


def _own_tokens(program: Program, source: Mapping[str, Tensor], start: int) -> Tensor:
    """What the decoder reads while it generates greedily, int64 `[batch, count]`."""
    entry, batch = program.entries[DECODER], source[SOURCE_MASK].shape[0]
    assert entry.cache is not None
    count = min(_OWN_TOKENS, entry.cache.length)
    run = ExplicitCache(entry, batch, lambda flat: program.run_flat(list(flat), entry=DECODER))
    first = torch.full((batch, 1), start, dtype=torch.int64)
    chosen = stream_tokens(Session(entry, run, batch, count, source), first, None, Sampling(), Ending(count))
    return torch.cat([first, *(each[:, None] for each in chosen)], dim=1)[:, :count]
