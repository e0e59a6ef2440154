"""Chat with SmolLM2-135M, compressed: answers stream in the terminal.

python -m examples.chat [--recipe w4] [--folder out] [--prompt "..."]

The first start compiles the model into the folder; later starts load it. A conversation keeps its cache: only what is
new is computed. Ctrl-C ends an answer, an empty line the conversation.
"""

from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import typer
from rich.console import Console

import sparc
from examples.models import smollm2
from sparc.generation.text import attach_tokenizer, chat_prompt, growing_text, read_tokenizer

MESSAGES = Console(stderr=True)
MAX_NEW_TOKENS = 256


def compiled(recipe: str, folder: Path) -> sparc.Artifact:
    """The artifact in a folder, made if it is not there yet."""
    if not (folder / "manifest.json").exists():
        MESSAGES.print(f"compiling SmolLM2 with {recipe} into {folder}")
        calibration = [{"input_ids": batch} for batch in torch.split(smollm2.calibration_tokens(), 2)]
        artifact = sparc.compile(
            smollm2.load_causal(), task="text-generation", recipe=recipe, data=calibration, measure=False
        )
        attach_tokenizer(artifact, smollm2.chat_tokenizer())
        artifact.save(folder)
    return sparc.load(folder)


class Chat:
    """A conversation."""

    def __init__(self, artifact: sparc.Artifact) -> None:
        """Args: an artifact with a tokenizer and a chat template."""
        self._artifact = artifact
        self._tokenizer = read_tokenizer(artifact)
        self._session = artifact.session(length=2048)
        self._messages: list[dict[str, str]] = []
        self._fed: list[int] = []

    def answer(self, question: str) -> Iterator[str]:
        """Ask, and yield the answer piece by piece; what was computed for earlier turns is not computed again."""
        self._messages.append({"role": "user", "content": question})
        ids = self._tokenizer.encode(chat_prompt(self._artifact, self._messages)).ids
        known = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, self._fed, strict=False)))
        self._session.cut(min(known, self._session.used))
        self._fed = list(ids)
        said: list[str] = []
        new = torch.tensor([ids[self._session.used :]])
        tokens = self._artifact.stream(new, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, session=self._session)
        try:
            for piece in growing_text(self._tokenizer, self._remember(tokens)):
                said.append(piece)
                yield piece
        finally:
            self._messages.append({"role": "assistant", "content": "".join(said).strip()})

    def _remember(self, tokens: Iterator[torch.Tensor]) -> Iterator[int]:
        for token in tokens:
            self._fed.append(int(token))
            yield self._fed[-1]


def show(pieces: Iterator[str]) -> None:
    """Print an answer as it comes; Ctrl-C ends it."""
    console = Console(highlight=False, markup=False)
    try:
        for piece in pieces:
            console.print(piece, end="")
    except KeyboardInterrupt:
        console.print(" …", end="")
    console.print()


def main(recipe: str = "w4", folder: Path | None = None, prompt: str | None = None) -> None:
    """Chat, or answer one prompt."""
    with TemporaryDirectory() as temporary:
        chat = Chat(compiled(recipe, folder or Path(temporary) / "chat"))
        if prompt is not None:
            show(chat.answer(prompt))
            return
        while question := MESSAGES.input("[bold]you:[/] ").strip():
            show(chat.answer(question))


if __name__ == "__main__":
    typer.run(main)
