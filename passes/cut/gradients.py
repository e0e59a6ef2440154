"""Gradients of a loss with respect to weights, over calibration data."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparc import codes
from sparc.cache import KEEP, LOGITS, MASK, TOKENS
from sparc.diag import PassError
from sparc.execute import execute
from sparc.program import Entry, Program

PROJECTION, NEXT_TOKEN = "projection", "next_token"
MOST_BATCHES = 16
PROBES = 2


def gradients(
    program: Program, names: Iterable[str], batches: Mapping[str, Sequence[list[Tensor]]], loss: str
) -> Iterator[Mapping[str, Tensor]]:
    """Gradients of a loss, one mapping from weights' names at a time; a weight that does not matter to it is left out.

    Args:
        program: is run forwards and backwards, once per batch; for `projection`, backwards twice.
        names: the weights.
        batches: for each entry, flat inputs; at most 16 batches of each are used.
        loss: `projection`, a standard normal projection of all floating outputs, so that squared gradients are on
            average those of the outputs' Jacobian (Hutchinson 1989); `next_token`, the cross entropy of `logits`
            `[batch, seq, vocabulary]` at each place against the token behind it in `input_ids`; or the name of an
            output of one number.

    Raises:
        PassError: SPARC209 when the program has no such loss.
    """
    wanted = [name for name in dict.fromkeys(names) if program.weights[name].is_floating_point()]
    tracked = {name: program.weights[name].detach().requires_grad_() for name in wanted}
    weights = {**program.weights, **tracked}
    generator = torch.Generator().manual_seed(0)
    found = False
    for name, inputs in batches.items():
        entry = program.entries[name]
        for tensors in inputs[:MOST_BATCHES]:
            outputs = dict(zip(entry.signature.output_names, _run(entry, weights, tensors), strict=True))
            losses = list(_losses(entry, tensors, outputs, loss, generator))
            found = found or bool(losses)
            for index, each in enumerate(losses):
                if not each.requires_grad:
                    continue
                kept = index + 1 < len(losses)
                slopes = torch.autograd.grad(each, list(tracked.values()), retain_graph=kept, allow_unused=True)
                yield {name: slope for name, slope in zip(tracked, slopes, strict=True) if slope is not None}
    if not found:
        raise PassError(codes.BAD_OPTION, f"the program has no loss {loss!r}", hint=_HINT)


_HINT = "projection, next_token for a model of input_ids and logits, or the name of an output of one number"


def _run(entry: Entry, weights: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> list[Any]:
    return execute(entry.graph, weights, tensors, grad=True)


def _losses(
    entry: Entry, tensors: Sequence[Tensor], outputs: Mapping[str, Any], loss: str, generator: torch.Generator
) -> Iterator[Tensor]:
    if loss == PROJECTION:
        inner = {slot.output for slot in entry.cache.slots} if entry.cache is not None else set()
        values = [value for name, value in outputs.items() if name not in inner and _is_smooth(value)]
        for _ in range(PROBES if values else 0):
            yield sum(((each * _normal(each, generator)).sum().float() for each in values), torch.zeros(()))
    elif loss == NEXT_TOKEN:
        given = dict(zip(entry.signature.input_names, tensors, strict=True))
        if TOKENS in given and isinstance(outputs.get(LOGITS), Tensor) and outputs[LOGITS].ndim == 3:
            yield next_token_loss(outputs[LOGITS], given[TOKENS], given.get(MASK), given.get(KEEP))
    elif isinstance(outputs.get(loss), Tensor) and outputs[loss].numel() == 1:
        yield outputs[loss].float().sum()


def next_token_loss(logits: Tensor, tokens: Tensor, mask: Tensor | None = None, places: Tensor | None = None) -> Tensor:
    """The mean cross entropy of each place's logits against the token behind it.

    Args:
        logits: `[batch, kept, vocabulary]`.
        tokens: int64 `[batch, seq]`.
        mask: 1 where a token counts, `[batch, past + seq]`.
        places: which places the logits are of, `[kept]`; the first ones by default.
    """
    count = tokens.shape[1]
    places = torch.arange(logits.shape[1]) if places is None else places % count
    predicts = places + 1 < count
    targets = tokens[:, places[predicts] + 1]
    if mask is not None:
        targets = targets.masked_fill(mask[:, mask.shape[1] - count :][:, places[predicts] + 1] == 0, -100)
    if not bool((targets >= 0).any()):
        return logits.sum() * 0  # no place has a token behind it
    return F.cross_entropy(logits[:, predicts].flatten(0, 1).float(), targets.flatten(), ignore_index=-100)


def _is_smooth(value: Any) -> bool:
    """Whether a value is a number that could have a gradient: one without any is a loss that no weight reaches."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.requires_grad)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like.dtype)
