"""Tokens as text: the tokenizer that lies beside a model, prompts of a chat, and text that grows token by token."""

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparc import codes
from sparc.checkpoint.base import Checkpoint
from sparc.diag import ArtifactError
from sparc.generation.attachments import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, TOKENIZER_FILES, attached_json

if TYPE_CHECKING:
    from sparc.artifact import Artifact

_FILE_LIMIT = 1 << 27
_INCOMPLETE = "\ufffd"  # what an unfinished character decodes to


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The tokenizer's files in a model's folder, by name."""
    paths = [folder / name for name in TOKENIZER_FILES]
    return {path.name: path.read_bytes() for path in paths if path.is_file() and path.stat().st_size <= _FILE_LIMIT}


def tokenizer_of(tokenizer: Any) -> dict[str, bytes]:
    """A tokenizer's files by name.

    Args:
        tokenizer: of transformers, or a `tokenizers.Tokenizer`.

    Raises:
        ArtifactError: SPARC513 when it is neither.
    """
    if hasattr(tokenizer, "save_pretrained"):
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            found = tokenizer_files(Path(folder))
    elif hasattr(tokenizer, "to_str"):
        found = {TOKENIZER: tokenizer.to_str().encode()}
    else:
        found = {}
    if TOKENIZER not in found:
        what = f"{type(tokenizer).__name__} cannot be written as {TOKENIZER}"
        raise ArtifactError(codes.NO_GENERATION, what, hint="use a fast tokenizer of transformers")
    return found


def checkpoint_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The files of a checkpoint's tokenizer and chat template, as far as it has them."""
    found = tokenizer_of(checkpoint.tokenizer) if checkpoint.tokenizer is not None else {}
    if checkpoint.chat is not None:
        found[CHAT_TEMPLATE] = checkpoint.chat.encode()
    return found


def attach_tokenizer(artifact: "Artifact", tokenizer: Any) -> None:
    """Put a tokenizer beside an artifact, to be saved with it.

    Args:
        artifact: any artifact.
        tokenizer: of transformers, or a `tokenizers.Tokenizer`.

    Raises:
        ArtifactError: SPARC513 when it is neither.
    """
    artifact.attachments.update(tokenizer_of(tokenizer))


def read_tokenizer(artifact: "Artifact") -> Any:
    """The artifact's tokenizer, a `tokenizers.Tokenizer`.

    Raises:
        ArtifactError: SPARC513 when there is none, it is damaged, or the package tokenizers is not installed.
    """
    if TOKENIZER not in artifact.attachments:
        hint = "compile from a folder that holds tokenizer.json, or call attach_tokenizer"
        raise ArtifactError(codes.NO_GENERATION, "the artifact has no tokenizer", hint=hint)
    try:
        from tokenizers import Tokenizer
    except ImportError:
        why = "the package tokenizers is not installed"
        raise ArtifactError(codes.NO_GENERATION, why, hint="pip install tokenizers") from None
    try:
        return Tokenizer.from_str(artifact.attachments[TOKENIZER].decode())
    except Exception as error:  # tokenizers raises plain Exception
        why = str(error)[:200]
        raise ArtifactError(codes.NO_GENERATION, f"{TOKENIZER} cannot be read", why=why) from None


def chat_prompt(artifact: "Artifact", messages: Sequence[Mapping[str, str]]) -> str:
    """The prompt of a conversation, by the model's own template, up to where the answer begins.

    The template runs in a sandbox.

    Args:
        artifact: with a chat template among its attachments.
        messages: each with `role` (`system`, `user` or `assistant`) and `content`.

    Raises:
        ArtifactError: SPARC513 when there is no template, or it fails.
    """
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    config = attached_json(artifact, TOKENIZER_CONFIG)
    template = artifact.attachments.get(CHAT_TEMPLATE, b"").decode(errors="replace") or config.get("chat_template")
    if not isinstance(template, str):
        raise ArtifactError(codes.NO_GENERATION, "the artifact has no chat template", hint="give a plain prompt")
    special = {name: _content(value) for name, value in config.items() if name.endswith("_token")}
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    try:
        return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **special)
    except TemplateError as error:
        raise ArtifactError(codes.NO_GENERATION, "the chat template failed", why=str(error)[:200]) from None


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def growing_text(tokenizer: Any, tokens: Iterable[int]) -> Iterator[str]:
    """The text of each token as soon as it is certain: characters of several tokens come with the last of them.

    Args:
        tokenizer: with `decode`.
        tokens: one after another.
    """
    known: list[int] = []
    start = 0  # everything before is settled; a few tokens are decoded together, since spaces depend on neighbours
    shown = ""
    for token in tokens:
        known.append(token)
        text = tokenizer.decode(known[start:])
        if text.endswith(_INCOMPLETE):
            yield ""
            continue
        yield text[len(shown) :]
        start, shown = len(known) - 1, tokenizer.decode(known[-1:])
    rest = tokenizer.decode(known[start:])
    if rest.endswith(_INCOMPLETE):
        yield rest[len(shown) :]
