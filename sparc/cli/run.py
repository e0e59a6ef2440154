"""`sparc run`: an artifact that generates continues a prompt, streaming text."""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.text import Text

from sparc.cli.output import err, print_json
from sparc.cli.root import ArtifactFolder, AsJson, Threads
from sparc.generation.text import chat_prompt, growing_text, read_tokenizer

if TYPE_CHECKING:
    pass

_INTERRUPTED = 130


@dataclass
class Clock:
    """When the tokens of one sequence came.

    Args:
        prompt: how many tokens the prompt has.
        begun: when it was fed.
        times: when each new token came.
    """

    prompt: int
    begun: float = field(default_factory=time.perf_counter)
    times: list[float] = field(default_factory=list)

    def watch(self, tokens: Iterator[torch.Tensor]) -> Iterator[int]:
        """Pass the tokens of one sequence on."""
        for token in tokens:
            self.times.append(time.perf_counter())
            yield int(token)

    def figures(self) -> dict[str, Any]:
        """Tokens and tokens per second, of the prompt and of what came after the first new token."""
        first = self.times[0] - self.begun if self.times else None
        rest = self.times[-1] - self.times[0] if len(self.times) > 1 else None
        return {
            "prompt_tokens": self.prompt,
            "new_tokens": len(self.times),
            "prefill_tokens_per_second": self.prompt / first if first else None,
            "decode_tokens_per_second": (len(self.times) - 1) / rest if rest else None,
        }


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("run")(run)


def run(
    folder: ArtifactFolder,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to continue; - reads standard input.")],
    chat: Annotated[bool, typer.Option(help="Put the prompt into the model's chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At the latest, stop after so many tokens.")] = 64,
    sample: Annotated[bool, typer.Option(help="Draw tokens instead of taking the likeliest.")] = False,
    temperature: Annotated[float | None, typer.Option(help="Divides the logits.", show_default="the model's")] = None,
    top_k: Annotated[int | None, typer.Option(help="Only the k likeliest tokens.", show_default="the model's")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Only the likeliest tokens of this probability together.", show_default="the model's"),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the random numbers.", show_default="none")] = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt with an artifact compiled for text generation, and say how fast that was."""
    from sparc import api

    artifact = api.load(folder)
    artifact.threads = threads
    tokenizer = read_tokenizer(artifact)
    given = sys.stdin.read() if prompt == "-" else prompt
    text = chat_prompt(artifact, [{"role": "user", "content": given}]) if chat else given
    ids = torch.tensor([tokenizer.encode(text).ids], dtype=torch.int64)
    tokens = artifact.stream(
        ids, max_new_tokens=max_new_tokens, do_sample=sample, temperature=temperature, top_k=top_k, top_p=top_p,
        seed=seed,
    )  # fmt: skip
    clock = Clock(ids.shape[1])
    pieces, interrupted = _show(growing_text(tokenizer, clock.watch(tokens)), silent=as_json)
    if as_json:
        print_json({"text": "".join(pieces), **clock.figures()})
    else:
        _print_speed(clock.figures())
    if interrupted:
        raise typer.Exit(_INTERRUPTED)


def _show(pieces: Iterator[str], *, silent: bool) -> tuple[list[str], bool]:
    """Print text as it comes; Ctrl-C ends it, and what was said stays."""
    shown: list[str] = []
    try:
        for piece in pieces:
            shown.append(piece)
            if not silent:
                sys.stdout.write(piece)
                sys.stdout.flush()
    except KeyboardInterrupt:
        return shown, True
    finally:
        if not silent:
            sys.stdout.write("\n")
    return shown, False


def _print_speed(figures: dict[str, Any]) -> None:
    prefill, decode = (figures[f"{kind}_tokens_per_second"] for kind in ("prefill", "decode"))
    parts = [f"prompt {figures['prompt_tokens']} tokens" + (f", {prefill:.0f} tokens/s" if prefill else "")]
    parts.append(f"{figures['new_tokens']} new" + (f", {decode:.1f} tokens/s" if decode else ""))
    err().print(Text("; ".join(parts), style="dim"))
