"""Dependency groups: who belongs together, with which index, and why some cannot be cut."""

import pytest
import torch
from torch import Tensor, nn

from sparc.analysis.dependency import Group, groups
from sparc.capture import capture
from sparc.pass_base import PassContext
from sparc.passes.canonicalize import Canonicalize
from sparc.program import Program
from tests.architectures import ARCHITECTURES


def canonical(name: str) -> Program:
    built = ARCHITECTURES[name].build()
    program = capture(built.model, built.inputs, dynamic=built.dynamic)
    Canonicalize().run(program, PassContext())
    return program


def found(model: nn.Module, *inputs: Tensor) -> list[Group]:
    return [group for group in groups(capture(model.eval(), inputs)) if group.units > 1]


def members(group: Group) -> dict[str, tuple[int, bool]]:
    return {member.weight: (member.axis, member.read) for member in group.members}


def by_name(listed: list[Group]) -> dict[str, Group]:
    return {group.name: group for group in listed}


def test_a_grouped_decoder() -> None:
    listed = [group for group in groups(canonical("llama")) if "layers.1" not in group.name and group.units > 1]
    assert [str(group) for group in listed] == [
        "96 neuron of model.embed_tokens.weight[0], frozen: its positions matter to embedding",
        "32 hidden of model.embed_tokens.weight[1], rms_norm takes a statistic of it",
        "4 head_dim of model.rotary_emb.inv_freq[0]",
        "2 head of model.layers.0.self_attn.q_proj.weight[0]",
        "2 queries of a head of model.layers.0.self_attn.q_proj.weight[0]",
        "8 head_dim of model.layers.0.self_attn.v_proj.weight[0]",
        "64 neuron of model.layers.0.mlp.gate_proj.weight[0]",
        "96 neuron of lm_head.weight[0], frozen: it is an output of the program",
    ]
    heads, neurons, rotary = listed[3], listed[6], listed[2]
    path = "model.layers.0."
    assert members(heads) == {
        f"{path}self_attn.q_proj.weight": (0, False),
        f"{path}self_attn.k_proj.weight": (0, False),
        f"{path}self_attn.v_proj.weight": (0, False),
        f"{path}self_attn.o_proj.weight": (1, True),
    }
    assert heads.members[0].index.tolist() == [list(range(16)), list(range(16, 32))]  # two queries of eight channels
    assert heads.members[1].index.tolist() == [list(range(8)), list(range(8, 16))]
    assert members(neurons) == {
        f"{path}mlp.gate_proj.weight": (0, False),
        f"{path}mlp.up_proj.weight": (0, False),
        f"{path}mlp.down_proj.weight": (1, True),
    }
    keys = next(member for member in rotary.members if member.weight.endswith("0.self_attn.k_proj.weight"))
    assert keys.index[1].tolist() == [1, 5, 9, 13]  # both halves of both heads


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_attention_that_is_written_out_is_attention(name: str) -> None:
    """Capped scores and sinks are no `scaled_dot_product_attention`; what heads are is told all the same."""
    listed = [group for group in groups(canonical(name)) if "layers.1" not in group.name and group.units > 1]
    ours = [(group.units, group.kind, group.name) for group in listed if "attn" in group.name or "rotary" in group.name]
    path = "model.layers.0.self_attn"
    assert ours == [
        (4, "head_dim", "model.rotary_emb.inv_freq[0]"),
        (2, "head", f"{path}.q_proj.weight[0]"),
        (2, "queries of a head", f"{path}.q_proj.weight[0]"),
        (8, "head_dim", f"{path}.v_proj.weight[0]"),
    ]


def test_removing_an_expert_that_topk_sees_is_not_making_it_zero() -> None:
    """In gpt-oss the softmax runs over the chosen experts only, and a score of zero may be the greatest one."""
    experts = [group for group in groups(canonical("gpt_oss")) if group.kind == "expert"]
    assert {group.statistic for group in experts} == {"topk chooses among it"}
    assert not any(group.frozen for group in experts)


class Written(nn.Module):
    """Attention with a cap; its two heads of keys and values are repeated, or its only one is broadcast."""

    def __init__(self, heads: int, transposed: bool) -> None:
        super().__init__()
        self.query, self.both, self.out = nn.Linear(6, 32), nn.Linear(6, 16 * heads), nn.Linear(32, 6)
        self.heads, self.transposed = heads, transposed

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x).unflatten(-1, (4, 8)).transpose(1, 2)
        key, value = self.both(x).unflatten(-1, (2, self.heads, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.heads > 1:
            key, value = (each.repeat_interleave(4 // self.heads, 1) for each in (key, value))
        if self.transposed:
            scores = torch.tanh(key @ query.transpose(2, 3)).softmax(2).transpose(2, 3)
        else:
            scores = torch.tanh(query @ key.transpose(2, 3)).softmax(3)
        return self.out((scores @ value).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("heads", "queries"), [(1, 4), (2, 2)])
def test_repeated_keys_have_several_queries(heads: int, queries: int, transposed: bool) -> None:
    listed = found(Written(heads, transposed), torch.randn(2, 5, 6))
    kinds = [(group.units, group.kind) for group in listed if any(m.weight == "out.weight" for m in group.members)]
    assert kinds[:-1] == [*([(2, "head")] if heads > 1 else []), (queries, "queries of a head"), (8, "head_dim")]


def test_every_axis_of_every_weight_is_in_a_group() -> None:
    program = canonical("phi3")
    listed = groups(program)
    for name, weight in program.weights.items():
        for axis, size in enumerate(weight.shape):
            own = [m for group in listed for m in group.members if (m.weight, m.axis) == (name, axis)]
            covered = {int(place) for member in own for place in member.index.flatten()}
            assert covered == set(range(size))


class Dense(nn.Module):
    """A convolution, its result and input joined as in DenseNet, a batch norm, a depthwise and a grouped one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 1)
        self.norm, self.deep = nn.BatchNorm2d(10), nn.Conv2d(10, 10, 3, groups=10)
        self.grouped, self.last = nn.Conv2d(10, 8, 1, groups=2), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = self.deep(self.norm(torch.cat([x, self.second(x)], 1)))
        return self.last(self.grouped(x).mean((2, 3)))


def test_joined_depthwise_and_grouped_channels() -> None:
    """cat gives 4 + 6 channels, the grouped convolution cuts them into 2 * 5: only splitting serves both."""
    named = by_name(found(Dense(), torch.randn(2, 3, 8, 8)))
    assert "no common refinement" in named["first.weight[0]"].frozen
    out = next(group for group in named.values() if "last.weight" in members(group) and not group.frozen)
    assert (out.units, out.kind) == (4, "channel")
    assert members(out) == {"grouped.weight": (0, False), "grouped.bias": (0, False), "last.weight": (1, True)}
    assert out.members[0].index.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_a_residual_stream_is_one_group() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inner, self.back = nn.Linear(3, 6), nn.Linear(6, 9), nn.Linear(9, 6)
            self.head = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(x + self.back(torch.tanh(self.inner(x))))

    named = by_name(found(Residual(), torch.randn(4, 3)))
    stream = named["stem.weight[0]"]
    assert set(members(stream)) == {
        "stem.weight",
        "stem.bias",
        "inner.weight",
        "back.weight",
        "back.bias",
        "head.weight",
    }
    assert {name for name, (_, read) in members(stream).items() if read} == {"inner.weight", "head.weight"}
    assert named["inner.weight[0]"].units == 9


def test_a_tied_weight_joins_both_of_its_places() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.inner = nn.Embedding(20, 6), nn.Linear(6, 6)
            self.head = nn.Linear(6, 20, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.relu(self.inner(self.embedding(ids))))

    named = by_name(found(Tied(), torch.randint(0, 20, (2, 4))))
    hidden = named["embedding.weight[1]"]
    assert set(members(hidden)) == {"embedding.weight", "inner.weight", "inner.bias"}
    assert len(hidden.members) == 4  # both axes of `inner`
    assert not any(member.read for member in hidden.members if member.weight == "embedding.weight")


def through(function: object, size: int = 6) -> Group:
    """The channels between two linear layers with something between."""

    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(size, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(function(self.a(x)))  # type: ignore[operator]

    return by_name(found(Between(), torch.randn(4, 3)))["a.weight[0]"]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x.flip(-1), "its positions matter to flip"),
        (lambda x: x.roll(1, -1), "its positions matter to roll"),
        (lambda x: x.cumsum(-1), "its positions matter to cumsum"),
        (lambda x: torch.fft.rfft(x).abs(), "fft_rfft is not seen through"),
        (lambda x: x.sort(-1).values, "its positions matter to sort"),
        (lambda x: x[:, [0, 2, 1, 3, 4, 5]], "its positions matter to index"),
        (lambda x: x * x.select(1, 2).unsqueeze(1), "single positions of it are read (select)"),
        (lambda x: nn.functional.pad(x, (1, 0))[:, 1:], "it is padded"),
        (lambda x: x + torch.arange(6), "its positions matter to arange"),
        (lambda x: torch.tril(x.unsqueeze(1).expand(-1, 6, -1))[:, 0], "its positions matter to tril"),
    ],
)
def test_what_depends_on_positions_freezes(function: object, reason: str) -> None:
    assert reason in through(function, 4 if "fft" in reason else 6).frozen


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x.softmax(-1), "softmax runs over it"),
        (lambda x: x - x.mean(-1, keepdim=True), "mean runs over it"),
        (lambda x: nn.functional.layer_norm(x, (6,)), "layer_norm takes a statistic of it"),
        (lambda x: 1 / x, "reciprocal is not finite at zero"),
        (lambda x: x * torch.sigmoid(x).sum(-1, keepdim=True), "values that are not zero at zero weights"),
    ],
)
def test_what_runs_over_channels_is_told(function: object, reason: str) -> None:
    group = through(function)
    assert not group.frozen
    assert reason in group.statistic


@pytest.mark.parametrize(
    "function",
    [
        torch.relu,
        lambda x: torch.relu(x) ** 2 / (1 + torch.exp(-x)),
        lambda x: x * torch.tanh(x).sum(-1, keepdim=True),  # the tanh of zero is zero
        lambda x: x.reshape(4, 2, 3).transpose(1, 2).transpose(1, 2).flatten(1),
        lambda x: torch.cat(x.chunk(2, -1)[::-1], -1),
        lambda x: x.clamp(-1, 1),
    ],
)
def test_what_leaves_channels_to_themselves(function: object) -> None:
    group = through(function)
    assert (group.frozen, group.statistic) == ("", "")


def test_encoded_weights_freeze() -> None:
    from sparc.encoding.int_grid import IntGrid
    from sparc.passes.encode import Encode
    from sparc.passes.round import Round
    from tests.passes.models import run

    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    program = run(model, [torch.randn(2, 16)], Round(IntGrid(bits=8)), Encode())
    named = {member.weight: group for group in groups(program) for member in group.members}
    assert "decode is not seen through" in named["0.bias"].frozen
