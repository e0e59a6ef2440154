"""Generating tokens with a session: a prompt in, tokens out one by one."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparc import codes
from sparc.diag import ArtifactError
from sparc.generation.sampling import Sampling
from sparc.generation.session import Session, check_prompt, check_room


@dataclass(frozen=True)
class Ending:
    """When a sequence ends.

    Args:
        max_new_tokens: at the latest after so many tokens.
        eos: tokens that end a sequence.
        pad: what follows the end of a sequence while others go on.
        forced: tokens that are not chosen but given, by how many were generated before.
    """

    max_new_tokens: int = 20
    eos: tuple[int, ...] = ()
    pad: int = 0
    forced: Mapping[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ArtifactError(codes.BAD_OPTION, f"max_new_tokens={self.max_new_tokens}", why="it must be at least 1")


def stream_tokens(
    session: Session,
    tokens: Tensor,
    mask: Tensor | None,
    sampling: Sampling,
    ending: Ending,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Feed a prompt, then yield the next token of every sequence, int64 `[batch]`, until all have ended.

    The last token yielded is not fed: it is pending in the session, which can be continued.

    Raises:
        ArtifactError: SPARC511 when prompt and new tokens do not fit into the session, SPARC512 for a bad prompt.
    """
    tokens, mask = check_prompt(tokens, mask)
    if tokens.shape[0] != session.batch:
        what = f"the prompt has {tokens.shape[0]} rows, the session {session.batch}"
        raise ArtifactError(codes.BAD_PROMPT, what)
    waiting = 0 if session.pending is None else session.pending.shape[1]
    check_room(session.used + waiting + tokens.shape[1] + ending.max_new_tokens - 1, session.length)
    ended = torch.zeros(session.batch, dtype=torch.bool)
    logits = session.feed(tokens, mask)
    for count in range(1, ending.max_new_tokens + 1):
        chosen = sampling.choose(logits, generator)
        if count - 1 in ending.forced:
            chosen = torch.full_like(chosen, ending.forced[count - 1])
        chosen = chosen.masked_fill(ended, ending.pad)
        session.pending = chosen[:, None]
        yield chosen
        for token in ending.eos:
            ended |= chosen == token
        if count == ending.max_new_tokens or bool(ended.all()):
            return
        logits = session.feed(tokens.new_empty(session.batch, 0))
