"""Small models whose products have everything around them that kernels take."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """A root-mean-square normalisation with a random gain."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.gain, 1e-5)


class Decoder(nn.Module):
    """A block of a language model: grouped heads, a gated layer, residual sums."""

    def __init__(self, width: int = 64, heads: int = 4, inner: int = 96) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = RMSNorm(width), RMSNorm(width)
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width // 2, bias=False)
        self.v = nn.Linear(width, width // 2, bias=False)
        self.o = nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        y = self.before(x)
        q = self.q(y).view(batch, length, self.heads, -1).transpose(1, 2)
        k = self.k(y).view(batch, length, self.heads // 2, -1).transpose(1, 2)
        v = self.v(y).view(batch, length, self.heads // 2, -1).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(batch, length, width))
        y = self.between(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class LanguageModel(nn.Module):
    """An embedding, a block, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.block = nn.Embedding(100, 64), Decoder()
        self.norm, self.head = RMSNorm(64), nn.Linear(64, 100, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.block(self.embedding(ids))))


class Encoder(nn.Module):
    """A layer normalisation read by one product alone, biases, gelu, a residual sum."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(width), nn.Linear(width, 80), nn.Linear(80, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(F.gelu(self.inner(self.norm(x))))


class Convolutions(nn.Module):
    """A window with stride and padding, a pointwise convolution with a residual sum, a grouped one, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.window = nn.Conv2d(3, 20, 3, stride=2, padding=1)
        self.pointwise = nn.Conv2d(20, 20, 1)
        self.grouped = nn.Conv2d(20, 20, 3, padding=1, groups=20)
        self.head = nn.Linear(20, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu6(self.window(image))
        x = x + F.hardswish(self.pointwise(x))
        return self.head(self.grouped(x).mean((2, 3)))


class Experts(nn.Module):
    """Stacked experts `[experts, in, out]`, all of which read every token; a router weighs their results."""

    def __init__(self, width: int = 48, inner: int = 40, experts: int = 3) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.gate = nn.Parameter(torch.randn(experts, width, inner) / width**0.5)
        self.up = nn.Parameter(torch.randn(experts, width, inner) / width**0.5)
        self.down = nn.Parameter(torch.randn(experts, inner, width) / inner**0.5)
        self.bias = nn.Parameter(torch.randn(experts, width))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        shares = self.router(flat).softmax(-1).t().unsqueeze(-1)
        each = flat.expand(len(self.gate), -1, -1)
        inner = F.silu(torch.bmm(each, self.gate)) * torch.bmm(each, self.up)
        result = torch.baddbmm(self.bias.unsqueeze(1), inner, self.down)
        return (result * shares).sum(0).view(x.shape)


def example(model: nn.Module) -> tuple[Tensor, ...]:
    """Inputs of one of these models, in half precision."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(model, LanguageModel):
        return (torch.randint(0, 100, (1, 7), generator=generator),)
    shape = (2, 3, 11, 13) if isinstance(model, Convolutions) else (2, 5, 48)
    return (torch.randn(shape, generator=generator).half(),)


def build(kind: type[nn.Module]) -> nn.Module:
    """A model in half precision, the same every time."""
    torch.manual_seed(0)
    return kind().half().eval()
