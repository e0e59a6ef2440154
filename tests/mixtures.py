"""A mixture of experts whose routing is an input, so that tests can say which expert gets which rows."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations import moe  # noqa: F401 - defines transformers::grouped_mm_fallback

from sparc import grouped  # noqa: F401 - defines sparc::grouped_linear

EXPERTS, WIDTH, INNER = 4, 32, 48
ROUTES = {
    "one token": [2],
    "an expert without tokens": [0, 3, 3, 1, 0, 1, 3],
    "an expert with all tokens": [2] * 7,
    "33 tokens": [(5 * token) % EXPERTS for token in range(33)],
}


class Mixture(nn.Module):
    """Gated units; `experts` `[tokens]` says which one a row of `x` `[tokens, 32]` meets.

    Args:
        spelling: `grouped_linear`; `grouped_mm` with weights `[experts, out, in]` that are transposed; `stored`, with
            weights stored as `[experts, in, out]`.
    """

    def __init__(self, spelling: str = "grouped_linear") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = (EXPERTS, 2 * INNER, WIDTH), (EXPERTS, WIDTH, INNER)
        up, down = (torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for shape in shapes)
        self.spelling = spelling
        self.up = nn.Parameter(up.mT.contiguous() if spelling == "stored" else up)
        self.down = nn.Parameter(down.mT.contiguous() if spelling == "stored" else down)

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        order = torch.argsort(experts, stable=True)
        ends = (experts[:, None] <= torch.arange(EXPERTS)).sum(0).to(torch.int32)
        gate, up = self.product(x[order], self.up, ends).chunk(2, dim=-1)
        result = self.product(F.silu(gate) * up, self.down, ends)
        return torch.zeros_like(result).index_copy(0, order, result)

    def product(self, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        if self.spelling == "grouped_linear":
            return torch.ops.sparc.grouped_linear(x, weight, ends)  # type: ignore[no-any-return]
        matrices = weight if self.spelling == "stored" else weight.transpose(-2, -1)
        if x.dtype == torch.bfloat16:  # the only one that torch.export knows the type of
            return torch._grouped_mm(x, matrices, offs=ends)
        return torch.ops.transformers.grouped_mm_fallback(x, matrices, ends)  # type: ignore[no-any-return]


def inputs(route: str) -> tuple[Tensor, Tensor]:
    """Rows and their experts."""
    experts = torch.tensor(ROUTES[route])
    return torch.randn(len(experts), WIDTH, generator=torch.Generator().manual_seed(1)), experts


DYNAMIC = {"x": {0: "tokens"}, "experts": {0: "tokens"}}


class Routed(nn.Module):
    """Gated units behind a router, spelt as transformers spells them; `twist` makes it something else.

    Args:
        twist: `activation`, `halves`, `return`, `repeated`: another activation, the other half activated, rows that go
            back elsewhere, experts that may be chosen twice; empty for none.
    """

    def __init__(self, twist: str = "") -> None:
        super().__init__()
        mixture = Mixture()
        generator = torch.Generator().manual_seed(2)
        self.router = nn.Parameter(torch.randn(EXPERTS, WIDTH, generator=generator))
        self.up = nn.Parameter(mixture.up.data[:, :64].clone())  # 32 columns are a block for each of the weights
        self.down = nn.Parameter(mixture.down.data[..., :32].clone())
        self.twist = twist

    def forward(self, x: Tensor) -> Tensor:
        shares, chosen = torch.topk(F.linear(x, self.router).softmax(-1), 2)
        if self.twist == "repeated":
            chosen = chosen // 2
        experts, place = torch.sort(chosen.reshape(-1))
        ends = torch.cumsum(torch.histc(experts.float(), EXPERTS, 0, EXPERTS - 1), 0, dtype=torch.int32)
        rows = torch.ops.sparc.grouped_linear(x[place // 2], self.up, ends)
        result = torch.ops.sparc.grouped_linear(self.unit(self.biased(rows, self.up, experts)), self.down, ends)
        result = self.biased(result, self.down, experts)
        weighted = result * shares.reshape(-1)[place].unsqueeze(-1)
        back = torch.empty_like(place)
        back[place] = torch.arange(place.shape[0])
        back = back.flip(0) if self.twist == "return" else back
        return weighted[back].reshape(x.shape[0], 2, WIDTH).sum(1)

    def unit(self, rows: Tensor) -> Tensor:
        gate, up = rows.chunk(2, dim=-1)
        gate, up = (up, gate) if self.twist == "halves" else (gate, up)
        return (F.gelu if self.twist == "activation" else F.silu)(gate) * up

    def biased(self, rows: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
        return rows


class Clamped(Routed):
    """The same with biases, gate and line in turns, and both clamped, as gpt-oss has it; twisted by `bounds`."""

    def __init__(self, twist: str = "") -> None:
        super().__init__(twist)
        generator = torch.Generator().manual_seed(4)
        self.up_bias, self.down_bias = (
            nn.Parameter(torch.randn(weight.shape[:2], generator=generator)) for weight in (self.up, self.down)
        )

    def unit(self, rows: Tensor) -> Tensor:
        gate, line = rows[..., ::2], rows[..., 1::2]
        gate, line = gate.clamp(max=1.5), line.clamp(min=-1.0 if self.twist == "bounds" else -1.5, max=1.5)
        return (line + 1) * (gate * torch.sigmoid(gate * 1.702))

    def biased(self, rows: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
        bias = self.up_bias if weight is self.up else self.down_bias
        return rows + bias[experts]
