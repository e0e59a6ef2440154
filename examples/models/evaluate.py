"""How close a compressed model stays to the original on held-out data; a model is any callable called like it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.models import images, minilm, smollm2, texts

Model = Callable[..., Any]


@dataclass(frozen=True)
class SentenceScore:
    """Agreement of sentence embeddings with the reference's, over `count` sentences."""

    mean_cosine: float
    min_cosine: float
    same_neighbour: float
    """Share of sentences whose nearest other sentence stays the same."""
    count: int


@dataclass(frozen=True)
class ImageScore:
    """Agreement of class logits with the reference's, over `count` crops."""

    top1_agreement: float
    mean_cosine: float
    min_cosine: float
    count: int


@torch.no_grad()
def sentence_embeddings(model: Model, sentences: Sequence[str], batch_size: int = 16) -> Tensor:
    """Return unit-length sentence embeddings, float32 [sentences, width]: the mean over real tokens, normalised.

    `model` is called with ``input_ids`` and ``attention_mask``; its output has ``last_hidden_state``, is a mapping with
    that key, or is a sequence that starts with it. Sentences are batched in order of length, returned in their own.
    """
    tokenizer = minilm.load_tokenizer()
    order = sorted(range(len(sentences)), key=lambda index: len(sentences[index]))
    rows: dict[int, Tensor] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        inputs = minilm.tokenize([sentences[index] for index in chosen], tokenizer)
        hidden = _tensor(model(**inputs), "last_hidden_state")
        mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        pooled = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        rows.update(zip(chosen, pooled, strict=True))
    return torch.stack([rows[index] for index in range(len(sentences))])


def compare_sentences(model: Model, reference: Model, sentences: Sequence[str] | None = None) -> SentenceScore:
    """Compare two MiniLM callables on the held-out sentences (or on `sentences`)."""
    chosen = texts.held_out_sentences() if sentences is None else sentences
    ours, theirs = sentence_embeddings(model, chosen), sentence_embeddings(reference, chosen)
    cosine = (ours * theirs).sum(-1)
    same = (_neighbours(ours) == _neighbours(theirs)).float().mean()
    return SentenceScore(cosine.mean().item(), cosine.min().item(), same.item(), len(chosen))


@torch.no_grad()
def image_logits(model: Model, crops: Tensor, batch_size: int = 10) -> Tensor:
    """Return float32 logits [crops, classes] of a callable that takes ``pixel_values`` [batch, 3, 224, 224]."""
    return torch.cat([_tensor(model(pixel_values=batch), "logits") for batch in torch.split(crops, batch_size)])


def compare_images(model: Model, reference: Model, crops: Tensor | None = None) -> ImageScore:
    """Compare two EfficientNet callables on the 430 held-out crops (or on `crops`)."""
    chosen = images.held_out_crops() if crops is None else crops
    ours, theirs = image_logits(model, chosen), image_logits(reference, chosen)
    cosine = F.cosine_similarity(ours, theirs, dim=-1)
    agreement = (ours.argmax(-1) == theirs.argmax(-1)).float().mean()
    return ImageScore(agreement.item(), cosine.mean().item(), cosine.min().item(), len(chosen))


@torch.no_grad()
def perplexity(model: Model, windows: Tensor | None = None, batch_size: int = 4) -> float:
    """Return exp(mean negative log-likelihood) of a SmolLM2 callable that takes ``input_ids`` and returns logits.

    Every window (by default 40 of 512 tokens, 20,480 in all) is scored on its own, from its second token on.
    """
    chosen = smollm2.held_out_tokens() if windows is None else windows
    total, count = 0.0, 0
    for ids in torch.split(chosen, batch_size):
        logits = _tensor(model(input_ids=ids), "logits")[:, :-1]
        targets = ids[:, 1:]
        total += F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum").item()
        count += targets.numel()
    return math.exp(total / count)


def _neighbours(embeddings: Tensor) -> Tensor:
    similarity = embeddings @ embeddings.T
    return similarity.fill_diagonal_(-math.inf).argmax(-1)


def _tensor(output: Any, name: str) -> Tensor:
    """Take the tensor called `name` from a model's output: a tensor itself, a mapping, a dataclass or a sequence."""
    if isinstance(output, Mapping):
        output = output[name]
    elif hasattr(output, name):
        output = getattr(output, name)
    elif isinstance(output, tuple | list):
        output = output[0]
    return output if isinstance(output, Tensor) else torch.as_tensor(output)
