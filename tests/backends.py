"""Models and helpers of the tests of the backend for torch.compile."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparc import SparcWarning
from sparc.backend import Backend


@contextmanager
def fresh_dynamo() -> Iterator[None]:
    """Nothing compiled before, the same weights every time, no gradients."""
    torch.compiler.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield
    torch.compiler.reset()


class Mlp(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """A small transformer layer with a causal mask."""

    def __init__(self, width=32, heads=4):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = Mlp(width)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = (each.view(b, t, self.heads, -1).transpose(1, 2) for each in self.qkv(self.norm(x)).split(c, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, c))
        return x + self.mlp(x)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def conv_net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 5),
    )  # fmt: skip


MODELS = {
    "mlp": (Mlp, lambda: (torch.randn(4, 32),)),
    "conv": (conv_net, lambda: (torch.randn(2, 3, 8, 8),)),
    "transformer": (Transformer, lambda: (torch.randint(0, 50, (2, 6)),)),
}


def compiled(model, *, recipe="dense", target="reference", **options):
    """The compiled model and its backend."""
    backend = Backend(recipe=recipe, target=target)
    return torch.compile(model, backend=backend, **options), backend


def signal(expected, actual):
    """Signal to noise in dB."""
    return float(10 * torch.log10(expected.square().sum() / (expected - actual).square().sum()))


def reasons(backend):
    return [diagnostic.code.id for fragment in backend.fragments for diagnostic in fragment.diagnostics]


class Views(Mlp):
    """Results of every kind."""

    def forward(self, x, factor=2, flag=True, shift=0.5):
        y = super().forward(x) * factor + (shift if flag else 0)
        return y, y.view(-1), x.t(), None, x, x.shape[0] * factor, y.t().exp(), y.sum(0), (y[:, :3], "text")


def refused(model, *inputs, **options):
    """The codes of what a compiled model fell back for; it computes what the model computes."""
    fast, backend = compiled(model, **options)
    given = [each.clone() for each in inputs]
    torch.manual_seed(1)
    with pytest.warns(SparcWarning) as said:
        actual = fast(*inputs)
    torch.manual_seed(1)
    torch.testing.assert_close(actual, model(*given), equal_nan=True)
    torch.testing.assert_close(inputs, tuple(given))
    assert not any(fragment.compiled for fragment in backend.fragments)
    assert all("runs in eager torch" in str(each.message) for each in said)
    fast(*inputs)
    return reasons(backend)
