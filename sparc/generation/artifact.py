"""What artifacts with a cache can do: sessions, generated tokens, and the settings that lie beside the model."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparc import codes
from sparc.cache import SOURCE_MASK
from sparc.diag import ArtifactError
from sparc.generation.attachments import SETTINGS, attached_json
from sparc.generation.generate import Ending, stream_tokens
from sparc.generation.sampling import Sampling
from sparc.generation.session import ExplicitCache, Session, check_prompt, check_room, check_tokens
from sparc.generation.source import begin_target, encode_source, forced_tokens
from sparc.program import Entry
from sparc.suggest import hint

if TYPE_CHECKING:
    from sparc.artifact import Artifact

_OPTIONS = ("max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "eos_token_id", "pad_token_id", "seed")
_IGNORED = ("token_type_ids",)  # tokenizers return them for models that do not take them


def cached_entry(artifact: "Artifact") -> tuple[str, Entry]:
    """The entry that generates, and its name.

    Raises:
        ArtifactError: SPARC513 when no entry has a cache.
    """
    for name, entry in artifact.program.entries.items():
        if entry.cache is not None:
            return name, entry
    raise ArtifactError(codes.NO_GENERATION, "the artifact has no entry with a cache")


def open_session(
    artifact: "Artifact",
    batch: int = 1,
    length: int | None = None,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Session:
    """A new session of `batch` sequences.

    Args:
        artifact: compiled with `task="text-generation"`.
        batch: how many sequences; with a source as many as it has rows.
        length: places to make room for; by default as many as the model knows.
        input_ids: what an encoder-decoder reads, int64 `[batch, source]`: encoded here, once. What is fed to the
            session are then tokens of the decoder, the first of which is the model's `decoder_start_token_id`.
        attention_mask: 1 where a token of the source counts; all by default.

    Raises:
        ArtifactError: SPARC506 for a source longer than the model knows, SPARC511 for more places than that, SPARC512
            for a bad source, SPARC513 when the artifact does not generate.
    """
    name, entry = cached_entry(artifact)
    assert entry.cache is not None
    source: dict[str, Tensor] = {}
    if entry.cache.source:
        source = encode_source(artifact, *check_tokens(input_ids, attention_mask, vocabulary(entry)))
        batch = source[SOURCE_MASK].shape[0]
    elif input_ids is not None:
        raise ArtifactError(codes.BAD_PROMPT, "the artifact has no encoder", hint="feed the prompt to the session")
    length = entry.cache.length if length is None else length
    check_room(length, entry.cache.length)
    own = getattr(artifact.emission, "session", None)
    run = own(name, batch, length, threads=artifact.threads) if own is not None else None
    if run is None:
        run = ExplicitCache(entry, batch, lambda tensors: artifact.run_flat(tensors, name))
    return Session(entry, run, batch, length, source)


def stream(
    artifact: "Artifact",
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    session: Session | None = None,
    **options: Any,
) -> Iterator[Tensor]:
    """Yield the next token of every sequence, int64 `[batch]`; see `generate` for the arguments and errors."""
    return _begin(artifact, input_ids, attention_mask, session, options)[1]


def _begin(
    artifact: "Artifact", input_ids: Tensor, mask: Tensor | None, session: Session | None, options: dict[str, Any]
) -> tuple[Tensor, Iterator[Tensor]]:
    """The tokens that are continued, and those that follow."""
    settings = attached_json(artifact, SETTINGS)
    sampling, ending, generator = _read_options(options, settings)
    _, entry = cached_entry(artifact)
    assert entry.cache is not None
    tokens, source = input_ids, {}
    if entry.cache.source and session is None:
        source = {"input_ids": input_ids, "attention_mask": mask}
        check_tokens(input_ids, mask, vocabulary(entry))
        tokens, mask = begin_target(artifact, input_ids.shape[0]), None
        ending = replace(ending, forced=forced_tokens(settings, ending.max_new_tokens))
    prompt, mask = check_prompt(tokens, mask, vocabulary(entry))
    if session is None:
        wanted = prompt.shape[1] + ending.max_new_tokens
        check_room(wanted - 1, entry.cache.length)
        session = open_session(artifact, prompt.shape[0], min(wanted, entry.cache.length), **source)
    return tokens.long(), stream_tokens(session, prompt, mask, sampling, ending, generator)


def generate(artifact: "Artifact", input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
    """Continue prompts; the arguments are those of `generate` in transformers.

    Args:
        artifact: compiled with `task="text-generation"`.
        input_ids: int64 `[batch, seq]`; padding may be on either side. For an encoder-decoder the source, or with
            `session` tokens of the decoder.
        attention_mask: 1 where a token counts; all by default.
        options: `max_new_tokens` (20), `do_sample`, `temperature`, `top_k`, `top_p`, `eos_token_id` (one or several),
            `pad_token_id`, `seed` of the random numbers, and `session` to continue one. What is not given is as the
            model's generation_config.json says.

    Returns:
        The prompts followed by the new tokens, int64 `[batch, seq + new]`; of an encoder-decoder
        `decoder_start_token_id` followed by the new tokens.

    Raises:
        ArtifactError: SPARC209 for an option that does not exist, SPARC506 for a source longer than the model knows,
            SPARC511 when prompt and new tokens do not fit, SPARC512 for a prompt that cannot be continued, SPARC513
            when the artifact does not generate.
    """
    tokens, chosen = _begin(artifact, input_ids, attention_mask, options.pop("session", None), options)
    return torch.cat([tokens, torch.stack(list(chosen), dim=1)], dim=1)


def vocabulary(entry: Entry) -> int | None:
    """How many tokens there are: the logits' last axis."""
    place = entry.signature.output_names.index("logits")
    size = entry.output.args[0][place].meta["val"].shape[-1]  # type: ignore[index,union-attr]
    return size if isinstance(size, int) else None


def _read_options(
    options: dict[str, Any], defaults: Mapping[str, Any]
) -> tuple[Sampling, Ending, torch.Generator | None]:
    for name in options:
        if name not in (*_OPTIONS, *_IGNORED):
            raise ArtifactError(
                codes.BAD_OPTION, f"generate() has no option {name!r}", hint=hint(name, _OPTIONS, kind="options")
            )

    def value(name: str, otherwise: Any) -> Any:
        found = options.get(name)
        if found is None:
            found = defaults.get(name)
        return otherwise if found is None else found

    eos = _tokens(value("eos_token_id", ()))
    pad = value("pad_token_id", eos[0] if eos else 0)
    sampling = Sampling(
        bool(value("do_sample", False)), float(value("temperature", 1.0)), int(value("top_k", 50)),
        float(value("top_p", 1.0)),
    )  # fmt: skip
    seed = options.get("seed")
    generator = None if seed is None else torch.Generator().manual_seed(int(seed))
    return sampling, Ending(int(value("max_new_tokens", 20)), eos, int(pad)), generator


def _tokens(given: int | Iterable[int]) -> tuple[int, ...]:
    return (given,) if isinstance(given, int) else tuple(given)
