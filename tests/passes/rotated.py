"""Small language models of every kind that rotations meet, written out."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

WIDTH, HEAD, INNER, VOCABULARY = 12, 4, 24, 19


class Block(nn.Module):
    """Grouped attention (4 heads, 2 of keys and values) and a gated layer, each behind a norm."""

    def __init__(self, norm: Callable[[int], nn.Module], bias: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(WIDTH), norm(WIDTH)
        self.q = nn.Linear(WIDTH, 4 * HEAD, bias=bias)
        self.k, self.v = (nn.Linear(WIDTH, 2 * HEAD, bias=bias) for _ in range(2))
        self.o = nn.Linear(4 * HEAD, WIDTH, bias=bias)
        self.gate, self.up = (nn.Linear(WIDTH, INNER, bias=bias) for _ in range(2))
        self.down = nn.Linear(INNER, WIDTH, bias=bias)

    def attend(self, x: Tensor) -> Tensor:
        """Attention of a normed value `[batch, tokens, WIDTH]`."""
        q, k, v = (layer(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(mixed.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        y = self.norm2(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """Embeddings of tokens and positions, one block, a norm and a head.

    Args:
        norm: makes a norm of a width.
        bias: whether the linear layers have biases.
        tied: whether the head is the embedding.
        leak: what else becomes of the residual stream.
    """

    def __init__(
        self,
        norm: Callable[[int], nn.Module] = nn.RMSNorm,
        bias: bool = False,
        tied: bool = False,
        leak: Callable[[Any, Tensor], Any] | None = None,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(torch.randn(16, WIDTH))
        self.block, self.norm = Block(norm, bias), norm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=bias)
        self.leak = leak
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.ndim == 1:
                    parameter.normal_()
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Any:
        x = self.block(self.embedding(ids) + self.positions[: ids.shape[1]])
        logits = self.head(self.norm(x))
        return logits if self.leak is None else (logits, self.leak(self, x))


def example() -> tuple[Tensor]:
    """Two rows of seven tokens."""
    return (torch.arange(14).reshape(2, 7) % VOCABULARY,)
