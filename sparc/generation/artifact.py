"""What artifacts with a cache can do: sessions, generated tokens, and the settings that lie beside the model."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparc import codes
from sparc.diag import ArtifactError
from sparc.generation.attachments import SETTINGS, attached_json
from sparc.generation.generate import Ending, stream_tokens
from sparc.generation.sampling import Sampling
from sparc.generation.session import ExplicitCache, Session, check_prompt, check_room
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


def open_session(artifact: "Artifact", batch: int = 1, length: int | None = None) -> Session:
    """A new session of `batch` sequences.

    Args:
        artifact: compiled with `task="text-generation"`.
        batch: how many sequences.
        length: places to make room for; by default as many as the model knows.

    Raises:
        ArtifactError: SPARC511 for more places than that, SPARC513 when the artifact does not generate.
    """
    name, entry = cached_entry(artifact)
    assert entry.cache is not None
    length = entry.cache.length if length is None else length
    check_room(length, entry.cache.length)
    own = getattr(artifact.emission, "session", None)
    run = own(name, batch, length, threads=artifact.threads) if own is not None else None
    if run is None:
        run = ExplicitCache(entry, batch, lambda tensors: artifact.run_flat(tensors, name))
    return Session(entry, run, batch, length)


def stream(
    artifact: "Artifact",
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    session: Session | None = None,
    **options: Any,
) -> Iterator[Tensor]:
    """Yield the next token of every sequence, int64 `[batch]`; see `generate` for the arguments and errors."""
    sampling, ending, generator = _read_options(options, attached_json(artifact, SETTINGS))
    _, entry = cached_entry(artifact)
    tokens, mask = check_prompt(input_ids, attention_mask, vocabulary(entry))
    if session is None:
        assert entry.cache is not None
        wanted = tokens.shape[1] + ending.max_new_tokens
        check_room(wanted - 1, entry.cache.length)
        session = open_session(artifact, tokens.shape[0], min(wanted, entry.cache.length))
    return stream_tokens(session, tokens, mask, sampling, ending, generator)


def generate(artifact: "Artifact", input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
    """Continue prompts; the arguments are those of `generate` in transformers.

    Args:
        artifact: compiled with `task="text-generation"`.
        input_ids: int64 `[batch, seq]`; padding may be on either side.
        attention_mask: 1 where a token counts; all by default.
        options: `max_new_tokens` (20), `do_sample`, `temperature`, `top_k`, `top_p`, `eos_token_id` (one or several),
            `pad_token_id`, `seed` of the random numbers, and `session` to continue one. What is not given is as the
            model's generation_config.json says.

    Returns:
        The prompts followed by the new tokens, int64 `[batch, seq + new]`.

    Raises:
        ArtifactError: SPARC209 for an option that does not exist, SPARC511 when prompt and new tokens do not fit,
            SPARC512 for a prompt that cannot be continued, SPARC513 when the artifact does not generate.
    """
    chosen = list(stream(artifact, input_ids, attention_mask, **options))
    return torch.cat([input_ids.long(), torch.stack(chosen, dim=1)], dim=1)


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
