"""Every translation of our own table computes what torch computes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.codegen.emitting import check

torch.manual_seed(0)
X = torch.randn(2, 3, 4)
Y = torch.randn(2, 3, 4)


class Calls(nn.Module):
    """A module around a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, a: Tensor, b: Tensor) -> Any:
        return self.function(a, b)


ARITHMETIC = {
    "add": lambda a, b: (a + b, a + 2, torch.add(a, b, alpha=3)),
    "add_promotes": lambda a, b: (a + (b * 4).int(), (a * 4).int() + 1.5, (b > 0) + (a > 0)),
    "sub": lambda a, b: (a - b, 2 - a, a - 1),
    "mul": lambda a, b: (a * b, a * 0.5, (a > 0) * (b > 0), (a > 0) * b),
    "div": lambda a, b: (a / b, a / 2, (a * 4).int() / 3),
    "div_rounded": lambda a, b: (torch.div(a, 0.3, rounding_mode="floor"), torch.div(a, 0.3, rounding_mode="trunc")),
    "integer_division": lambda a, b: ((a * 9).int() // 4, torch.div((a * 9).int(), 4, rounding_mode="trunc")),
    "remainder": lambda a, b: (a % 0.3, (a * 9).int() % 4, torch.fmod(a, 0.3), torch.fmod((a * 9).int(), 4)),
    "pow": lambda a, b: (a**2, a**3, a.abs() ** 0.5, a.abs() ** 1.7, a.abs() ** b, 2**a),
    "unary": lambda a, b: (a.abs(), -a, a.exp(), a.sin(), a.cos(), a.erf(), a.sigmoid(), a.tanh(), a.sign(), a.atan()),
    "positive": lambda a, b: [
        f(a.abs() + 0.1) for f in (torch.sqrt, torch.rsqrt, torch.log, torch.log2, torch.log10, torch.log1p)
    ],
    "rounding": lambda a, b: (a.floor(), a.ceil(), a.round(), a.trunc(), (a * 9).int().floor()),
    "compare": lambda a, b: (a > b, a >= 0, a < b, a <= 0.5, a == b, a != b, a.eq(0)),
    "compare_promotes": lambda a, b: ((a * 4).int() > 0.5, (a * 4).int() == (b * 4).long()),
    "logic": lambda a, b: ((a > 0) & (b > 0), (a > 0) | (b > 0), (a > 0) ^ (b > 0), ~(a > 0), torch.logical_not(a)),
    "bits": lambda a, b: ((a * 9).int() & 3, (a * 9).int() | 4, (a * 9).int() ^ 5, ~(a * 9).int()),
    "where": lambda a, b: (torch.where(a > 0, a, b), torch.where(a > 0, a, 0.0), a.masked_fill(a > 0, -1)),
    "clamp": lambda a, b: (
        a.clamp(-0.5, 0.5),
        a.clamp(min=0),
        a.clamp(max=0.1),
        a.clamp(b, b + 1),
        (a * 4).int().clamp(0, 2),
    ),
    "extrema": lambda a, b: (torch.minimum(a, b), torch.maximum(a, b), torch.max(a, b)),
    "addcmul": lambda a, b: torch.addcmul(a, a, b, value=0.5),
    "nonfinite": lambda a, b: (torch.isnan(a / (a - a)), torch.isinf(a / 0)),
    "expm1": lambda a, b: torch.expm1(a),
}
ACTIVATION = {
    name: (lambda f: lambda a, b: f(a * 4))(getattr(F, name))
    for name in (
        "relu",
        "gelu",
        "silu",
        "relu6",
        "hardtanh",
        "hardsigmoid",
        "hardswish",
        "leaky_relu",
        "elu",
        "selu",
        "mish",
        "softplus",
        "logsigmoid",
    )
} | {
    "gelu_tanh": lambda a, b: F.gelu(a * 4, approximate="tanh"),
    "softplus_beta": lambda a, b: F.softplus(a * 4, beta=2, threshold=3),
    "softmax": lambda a, b: (
        a.softmax(-1),
        a.softmax(1),
        a.log_softmax(-1),
        (a * 4).int().softmax(-1, dtype=torch.float32),
    ),
    "glu": lambda a, b: F.glu(a, -1),
    "prelu": lambda a, b: F.prelu(a, b[0, :, 0]),
    "dropout": lambda a, b: F.dropout(a, 0.5, training=False),
}
SHAPE = {
    "view": lambda a, b: (
        a.view(6, 4),
        a.reshape(-1),
        a.flatten(1),
        a[:, None],
        a.unsqueeze(-1).squeeze(-1),
        a.unflatten(-1, (2, 2)),
    ),
    "transpose": lambda a, b: (a.transpose(1, 2), a.permute(2, 0, 1), a[0].t(), a.mT),
    "expand": lambda a, b: (a[:, :1].expand(2, 5, 4), a[0].expand(3, -1, -1), a.broadcast_to(7, 2, 3, 4)),
    "repeat": lambda a, b: (a.repeat(2, 1, 3), a.repeat(2, 1, 1, 1)),
    "slice": lambda a, b: (a[:, 1:], a[..., ::2], a[:, -2:-1], a[:, 5:], a.narrow(1, 1, 2), a.narrow(1, -2, 2)),
    "select": lambda a, b: (a[1], a[:, -1], a[..., 0]),
    "split": lambda a, b: (*a.split(2, -1), *a.split([1, 3], -1), *a.chunk(2, 1), *a.unbind(1), *a.tensor_split(3, -1)),
    "cat": lambda a, b: (
        torch.cat([a, b], 1),
        torch.cat([a, (b * 4).int()], -1),
        torch.stack([a, b], 1),
        torch.stack([a, b], -1),
    ),
    "flip": lambda a, b: (a.flip(0), a.flip([1, 2])),
    "roll": lambda a, b: (a.roll(1, 1), a.roll((1, -2), (1, 2)), a.roll(5, 1)),
    "pad": lambda a, b: (
        F.pad(a, (1, 2)),
        F.pad(a, (1, 0, 0, 2), value=3),
        F.pad(a, (1, 2), mode="reflect"),
        F.pad(a, (1, 1), mode="replicate"),
        F.pad(a, (-1, 1)),
        F.pad(a, (1, 1), mode="circular"),
    ),
    "unfold": lambda a, b: (a.unfold(2, 2, 1), a.unfold(1, 2, 1)),
}
CREATE = {
    "fill": lambda a, b: (
        torch.zeros(2, 3) + a[0, :2, :3],
        torch.ones_like(a) * a,
        a.new_full((2, 1, 1), 7.0) + a,
        torch.full((3, 1), 5),
    ),
    "arange": lambda a, b: (
        torch.arange(4) + a,
        torch.arange(0, 2, 0.5) + a,
        torch.arange(1, 5, dtype=torch.float32) * a,
    ),
    "triangle": lambda a, b: (a.tril(), a.triu(1), (a > 0).tril(-1), torch.ones(3, 3).tril() @ a[0]),
    "cast": lambda a, b: (
        a.int(),
        a.double(),
        a.half(),
        a.bool(),
        (a > 0).float(),
        a.to(torch.int64),
        a.type_as(b.double()),
    ),
    "one_hot": lambda a, b: F.one_hot((a.abs() * 2).long().clamp(max=4), 5),
    "linspace": lambda a, b: torch.linspace(0, 1, 4) + a,
    "scalar": lambda a, b: a + torch.tensor(3.0),
}
REDUCTION = {
    "sums": lambda a, b: (
        a.sum(),
        a.sum(-1),
        a.mean((0, 2), keepdim=True),
        a.mean(),
        (a > 0).sum(1),
        a.prod(-1),
        a.logsumexp(-1),
    ),
    "extrema": lambda a, b: (a.amax(-1), a.amin((0, 1)), a.max(), a.min(), *a.max(-1), *a.min(1, keepdim=True)),
    "arg": lambda a, b: (a.argmax(-1), a.argmin(1, keepdim=True), a.argmax()),
    "quantifiers": lambda a, b: ((a > 0).any(), (a > 0).all(-1), (a > -9).all(), a.any(1)),
    "variance": lambda a, b: (a.var(-1), a.std(1, correction=0), a.var((1, 2), keepdim=True), a.std()),
    "norms": lambda a, b: (a.norm(dim=-1), a.norm(p=1, dim=1), torch.linalg.vector_norm(a), F.normalize(a, dim=-1)),
    "cumsum": lambda a, b: (a.cumsum(1), (a > 0).cumsum(-1)),
    "order": lambda a, b: (*a.topk(2), *a.sort(1), *a.sort(-1, descending=True), a.argsort(-1)),
}
MATRIX = {
    "matmul": lambda a, b: (a @ b.mT, a[0] @ b[0].t(), torch.bmm(a, b.mT), a @ b[0, 0], a[0, 0].dot(b[0, 0])),
    "addmm": lambda a, b: (
        torch.addmm(a[0, :, :3], a[0], b[0].t(), alpha=2, beta=0.5),
        torch.baddbmm(a[:, :, :3], a, b.mT, beta=0),
    ),
    "einsum": lambda a, b: torch.einsum("bij, bkj -> bik", a, b),
    "outer": lambda a, b: torch.outer(a[0, 0], b[0, 0]),
    "norms": lambda a, b: (
        F.layer_norm(a, (4,)),
        F.layer_norm(a, (3, 4), b[0], a[0]),
        F.rms_norm(a, (4,), b[0, 0], 1e-5),
    ),
    "channel_norms": lambda a, b: (
        F.group_norm(a.repeat(1, 2, 1), 2),
        F.instance_norm(a),
        F.batch_norm(a, b[0, :, 0], b[0, :, 1].abs()),
    ),
}
INDEX = {
    "gather": lambda a, b: (
        a.gather(1, (b > 0).long()),
        a.index_select(1, torch.tensor([2, 0])),
        a[:, torch.tensor([2, 0])],
    ),
    "index": lambda a, b: (
        a[torch.tensor([1, 0]), torch.tensor([2, 1])],
        a[:, torch.tensor([1, 0]), torch.tensor([2, 1])],
        a[torch.tensor([[1], [0]]), :, torch.tensor([2, 1])],
    ),
    "mask": lambda a, b: (a[a > 0], a[b[:, 0, 0] > -9], a.masked_select(b > 0), (a > 0).nonzero()),
    "put": lambda a, b: (
        a.index_put((torch.tensor([1, 0]),), b[0]),
        a.index_put((torch.tensor([1, 1]),), b[0], accumulate=True),
    ),
    "scatter": lambda a, b: (
        a.scatter(1, (b > 0).long(), b),
        a.scatter(1, (b[:, :1] > 0).long(), 9.0),
        a.scatter_add(1, (b > 0).long(), b),
    ),
    "slice_scatter": lambda a, b: (
        a.slice_scatter(b[:, :2], 1, 1, 3),
        a.slice_scatter(b[:, :1], 1, 0, 1),
        a.select_scatter(b[:, 0], 1, 2),
    ),
}
COMPLEX = {
    "rotary": lambda a, b: torch.view_as_real(
        torch.view_as_complex(a.reshape(2, 3, 2, 2))
        * torch.polar(torch.ones_like(b[0, :, :2]), b[0, :, :2]).unsqueeze(-3)
    ),
    "products": lambda a, b: (
        torch.view_as_real(torch.polar(a, b) * 0.5),
        torch.view_as_real(2 * torch.polar(a, b)),
        torch.view_as_real(a[0] * torch.polar(a, b)),
        torch.view_as_real(torch.polar(a[0], b[0]) * torch.polar(b, a)),
        torch.view_as_real(torch.polar(a, b).unsqueeze(-1)),
    ),
}
GROUPS = {
    "arithmetic": ARITHMETIC,
    "activation": ACTIVATION,
    "shape": SHAPE,
    "create": CREATE,
    "reduction": REDUCTION,
    "matrix": MATRIX,
    "index": INDEX,
    "complex": COMPLEX,
}
CASES = [
    pytest.param(function, id=f"{group}-{name}") for group, each in GROUPS.items() for name, function in each.items()
]


@pytest.mark.parametrize("function", CASES)
def test_static(function: Callable[..., Any]) -> None:
    check(Calls(function), (X, Y))
