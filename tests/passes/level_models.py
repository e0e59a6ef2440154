"""A small decoder with grouped queries, one matrix for queries, keys and values, and a tied head."""

import torch
from torch import nn
from torch.nn import functional as F

from sparc.capture import capture


class Layer(nn.Module):
    """Attention with heads of queries that share fewer of keys, and a gated feed-forward layer."""

    def __init__(self, queries=4, keys=2):
        super().__init__()
        self.queries, size = queries, 16 // queries
        self.sizes = [16, keys * size, keys * size]
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, sum(self.sizes)), nn.Linear(16, 16, bias=False)
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        q, k, v = (
            y.unflatten(-1, (-1, 16 // self.queries)).transpose(1, 2)
            for y in self.qkv(self.norm1(x)).split(self.sizes, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).flatten(-2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """Layers between an embedding and a head that is tied to it."""

    def __init__(self, *layers, states=False):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(20, 16), nn.Parameter(torch.randn(6, 16))
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(16)
        self.states = states

    def forward(self, ids):
        x, states = self.tokens(ids) + self.positions, []
        for layer in self.layers:
            x = layer(x)
            states.append(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return (logits, *states) if self.states else logits


IDS = torch.arange(12).reshape(2, 6)


@torch.no_grad()
def decoder(count=4, **options):
    torch.manual_seed(0)
    model = Decoder(*[Layer() for _ in range(count)], **options).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return capture(model, (IDS,))
