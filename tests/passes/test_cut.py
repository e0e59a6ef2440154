"""Cutting: zero weights and no weights compute the same, sizes follow, and what cannot be cut is refused."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparc.analysis import coupling_rules
from sparc.analysis.dependency import groups
from sparc.capture import capture
from sparc.diag import PassError
from sparc.passes.cut import cut, cut_groups, mask
from sparc.program import Program
from tests.architectures import ARCHITECTURES
from tests.passes.cutting import canonical, check_every_group, cuttable, error


def architecture(name: str) -> tuple[Program, list[Tensor]]:
    built = ARCHITECTURES[name].build().enlivened()
    program = canonical(built.model, built.inputs, built.dynamic)
    return program, program.main.signature.bind((), dict(built.inputs))


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        pytest.param("llama", {"head", "queries of a head", "head_dim", "neuron"}, marks=pytest.mark.slow),
        ("phi3", {"head", "queries of a head", "head_dim", "neuron"}),
        pytest.param("gpt_neox", {"head", "head_dim", "neuron"}, marks=pytest.mark.slow),
        ("gpt2", {"head", "head_dim", "neuron"}),
        ("efficientnet", {"channel"}),
        ("regnet", {"channel"}),
    ],
)
def test_zero_weights_and_no_weights_are_the_same(name: str, kinds: set[str]) -> None:
    program, flat = architecture(name)
    assert {group.kind for group in check_every_group(program, flat)} == kinds


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_zero_weights_and_no_weights_are_the_same_everywhere(name: str) -> None:
    program, flat = architecture(name)
    check_every_group(program, flat)


class Drawn(nn.Module):
    """A stack of drawn layers on channels: convolutions of all kinds, residuals, joins, splits, gates, norms."""

    def __init__(self, layers: list[str], image: bool) -> None:
        super().__init__()
        self.layers, self.image, width = layers, image, 8
        self.inner = nn.ModuleList()
        self.start = self.product(3, width)
        for layer in layers:
            made = {
                "plain": lambda w: [self.product(w, 12)],
                "residual": lambda w: [self.product(w, 12), self.product(12, w)],
                "join": lambda w: [self.product(w, 4)],
                "gate": lambda w: [self.product(w, 2 * w)],
                "grouped": lambda w: [self.product(w, 2 * w, groups=2)],
                "deep": lambda w: [self.product(w, w, groups=w)],
                "norm": lambda w: [nn.BatchNorm2d(w) if image else nn.BatchNorm1d(w)],
                "turn": lambda w: [],
                "heads": lambda w: [self.product(w, 3 * w)],
            }[layer](width)
            self.inner.append(nn.ModuleList(made))
            width = {"plain": 12, "join": width + 4, "grouped": 2 * width}.get(layer, width)
        self.last = self.product(width, 5)

    def product(self, inputs: int, outputs: int, groups: int = 1) -> nn.Module:
        if not self.image:
            return nn.Linear(inputs, outputs)
        return nn.Conv2d(inputs, outputs, 3 if groups > 1 else 1, padding=1 if groups > 1 else 0, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        for layer, inner in zip(self.layers, self.inner, strict=True):
            if layer == "residual":
                x = x + inner[1](torch.relu(inner[0](x)))
            elif layer == "join":
                x = torch.cat([torch.tanh(x), inner[0](x)], 1)
            elif layer == "gate":
                a, b = inner[0](x).chunk(2, 1)
                x = nn.functional.silu(a) * b
            elif layer == "turn":
                a, b = x.chunk(2, 1)
                x = x * 0.5 + torch.cat([-b, a], 1)
            elif layer == "heads":
                x = self.attend(inner[0](x))
            else:
                x = nn.functional.gelu(inner[0](x))
        return self.last(x)

    def attend(self, x: Tensor) -> Tensor:
        """Attention between the rows of the batch, with two heads."""
        rows = x if not self.image else x.movedim(1, -1).flatten(0, 2)
        query, key, value = rows.reshape(len(rows), 3, 2, -1).permute(1, 2, 0, 3)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        mixed = mixed.transpose(0, 1).reshape(len(rows), -1)
        return mixed if not self.image else mixed.reshape(len(x), *x.shape[2:], -1).movedim(-1, 1)


LINEAR = ["plain", "residual", "join", "gate", "norm", "turn", "heads"]


@given(st.lists(st.sampled_from(LINEAR), min_size=1, max_size=4))
@settings(max_examples=12, deadline=None)
def test_drawn_layers(layers: list[str]) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3)
    assert check_every_group(canonical(Drawn(layers, False), (x,)), [x])


@given(st.lists(st.sampled_from([*LINEAR, "grouped", "deep"]), min_size=1, max_size=4))
@settings(max_examples=12, deadline=None)
def test_drawn_convolutions(layers: list[str]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4)
    assert check_every_group(canonical(Drawn(layers, True), (x,)), [x])


def mlp() -> tuple[Program, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    return capture(nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3)).eval(), (x,)), x


def test_a_cut_does_not_equal_another_one() -> None:
    """The comparison sees which units are gone."""
    program, x = mlp()
    sliced, masked = program.clone(), program.clone()
    cut(sliced, groups(sliced)[0], [0, 1, 2])
    mask(masked, groups(masked)[0], [0, 1, 3])
    assert error(sliced, masked, [x]) > 1e-3


def test_everything_at_once() -> None:
    program, flat = architecture("llama")
    found = [group for group in groups(program) if not group.frozen and group.units > 1]
    cut_groups(program, {group: range(group.units // 2) for group in found})
    weights = program.weights
    assert weights["model.embed_tokens.weight"].shape == (96, 16)
    # one head of keys, one query for it, two of four pairs of channels
    assert weights["model.layers.0.self_attn.q_proj.weight"].shape == (4, 16)
    assert weights["model.layers.0.self_attn.v_proj.weight"].shape == (4, 16)
    assert weights["model.layers.0.mlp.down_proj.weight"].shape == (16, 32)
    program.graph.lint()
    assert program.run_flat(flat)[0].shape[-1] == 96


def test_groups_stay_valid_after_others_are_cut() -> None:
    program, x = mlp()
    deep = capture(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3)), (x,))
    first, second = (group for group in groups(deep) if group.units > 1 and not group.frozen)
    cut(deep, first, [1, 2])
    cut(deep, second, [0, 6])
    assert deep.weights["2.weight"].shape == (2, 2)
    assert deep.run_flat([x])[0].shape == (4, 3)
    del program


def test_the_scale_of_attention_stays() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 48), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            query, key, value = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            mixed = nn.functional.scaled_dot_product_attention(query, key, value)
            return self.out(mixed.transpose(1, 2).flatten(2))

    x = torch.randn(2, 5, 8)
    program = canonical(Attention(), (x,))
    check_every_group(program, [x])
    head = next(group for group in groups(program) if group.kind == "head_dim")
    cut(program, head, [0, 1])
    (node,) = (n for n in program.graph.nodes if "scaled_dot" in str(n.target))
    assert node.kwargs["scale"] == pytest.approx(8**-0.5)


def test_one_matrix_in_both_directions_is_cut_once() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(12, 6)), nn.Parameter(torch.randn(12))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(torch.relu(nn.functional.linear(x, self.w, self.b)), self.w.t())

    x = torch.randn(3, 6)
    program = capture(Both(), (x,))  # canonicalising would transpose so small a matrix once and for all
    assert set(program.weights) == {"w", "b"}
    (rows,) = check_every_group(program, [x])
    assert [(member.weight, member.axis, member.read) for member in rows.members] == [("w", 0, False), ("b", 0, False)]


@pytest.mark.parametrize("name", ["mobilebert", "convbert"])
def test_other_sizes_run_after_a_cut(name: str) -> None:
    """Typing the smaller program fixes no size that varies, also behind padding and unfolding."""
    built = ARCHITECTURES[name].build().enlivened()
    program = canonical(built.model, built.inputs, built.dynamic)
    for at in cuttable(program)[:2]:
        sliced = program.clone()
        group = groups(sliced)[at]
        cut(sliced, group, range(0, group.units, 2))
        names = sorted({dimension for axes in built.dynamic.values() for dimension in axes.values()})
        inputs = built.resized(dict.fromkeys(names, 3))
        sliced.run_flat(sliced.main.signature.bind((), inputs))
        assert [str(group) for group in groups(program)] == [str(group) for group in groups(program.clone())]


class Image(nn.Module):
    """Something between two convolutions of images whose sizes vary."""

    def __init__(self, between: Any) -> None:
        super().__init__()
        self.first, self.between, self.last = nn.Conv2d(3, 6, 3, padding=1), between, nn.Conv2d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(torch.relu(self.first(x))))


def varying_image(between: Any) -> tuple[Program, Tensor]:
    torch.manual_seed(0)
    program = canonical(Image(between), (torch.randn(2, 3, 8, 8),), {"x": {0: "b", 2: "h", 3: "w"}})
    return program, torch.randn(3, 3, 12, 10)


def halved(x: Tensor, mode: str) -> Tensor:
    return x + nn.functional.interpolate(nn.functional.max_pool2d(x, 2), size=x.shape[-2:], mode=mode)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(
    "between",
    [
        nn.Upsample(scale_factor=2),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Upsample(scale_factor=2, mode="bicubic"),
        lambda x: halved(x, "nearest"),
        lambda x: halved(x, "bilinear"),
        nn.Conv2d(6, 6, 4, padding="same"),
        lambda x: nn.functional.pad(x, (1, 2, 0, 1)),
        lambda x: nn.functional.pad(x, (1, 2, 0, 1), mode="reflect"),
    ],
)
def test_sizes_that_vary_still_vary_after_a_cut(between: Any) -> None:
    program, x = varying_image(between)
    assert check_every_group(program, [x])
    sizes = program.main.placeholders[0].meta["val"].shape
    assert [isinstance(size, int) for size in sizes] == [False, True, False, False]


def test_a_size_that_typing_fixes_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparc.program.enable_python_dispatcher", nullcontext)
    program, _ = varying_image(nn.Upsample(scale_factor=2))
    with pytest.raises(PassError, match=r"SPARC207.*upsample_nearest2d after a cut fixes the size 'b' to 2"):
        cut(program, groups(program)[cuttable(program)[0]], [0, 2, 3])


def test_what_cannot_be_cut_is_refused() -> None:
    program, _ = mlp()
    first, *_, last = groups(program)
    assert last.frozen == "it is an output of the program"
    with pytest.raises(PassError, match=r"SPARC209.*cannot be cut"):
        cut(program, last, [0])
    for keep in ([], [10], [-1]):
        with pytest.raises(PassError, match=r"SPARC209.*units 0 to 9"):
            cut(program, first, keep)
    with pytest.raises(PassError, match="another program"):
        cut(program.clone(), first, [0])


def test_a_wrong_rule_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Types are inferred from the operators and must be what the axes say."""

    def uncoupled(state: Any, node: Any, given: Any) -> Any:
        return state.closed(node, "", [])

    monkeypatch.setitem(coupling_rules.RULES, "relu", uncoupled)
    program, _ = mlp()
    with pytest.raises((PassError, RuntimeError)):
        cut(program, groups(program)[0], [0, 1])
