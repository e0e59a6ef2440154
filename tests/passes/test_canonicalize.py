"""Every raised form: hand-written spellings become the one operator, keep the contract, and wrong twins do not."""

import math

import pytest
import torch
from torch import nn

from sparc.capture import capture
from sparc.pass_base import PassContext
from sparc.passes.canonicalize import activation, attention, linear, norm, product, rotary
from sparc.testing import assert_mutants_caught, assert_pass


class Model(nn.Module):
    """A function of x and of some parameters."""

    def __init__(self, function, **parameters):
        super().__init__()
        self.function = function
        for name, shape in parameters.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(5))))

    def forward(self, x):
        return self.function(self, x)


def names(program):
    return [node.target._opname for node in program.graph.nodes if node.op == "call_function"]


def rms(m, x):
    return m.w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def layer(x, eps=1e-5):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps)


ROOT = math.sqrt(2 / math.pi)
FORMS = {
    "transposed": (linear.raise_matmul_transposed, Model(lambda m, x: x @ m.w.t(), w=(5, 8)), "linear"),
    "matmul": (linear.raise_matmul, Model(lambda m, x: x @ m.w, w=(8, 5)), "linear"),
    "bias": (linear.absorb_bias, Model(lambda m, x: nn.functional.linear(x, m.w) + m.b, w=(5, 8), b=(5,)), "linear"),
    "two biases": (
        linear.absorb_bias,
        Model(lambda m, x: nn.functional.linear(x, m.w, m.b) + m.c, w=(5, 8), b=(5,), c=(1, 1, 5)),
        "linear",
    ),
    "rms": (norm.raise_rms_norm, Model(rms, w=(8,)), "rms_norm"),
    "rms, div": (
        norm.raise_rms_norm,
        Model(lambda m, x: x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)),
        "rms_norm",
    ),
    "rms, pow": (
        norm.raise_rms_norm,
        Model(lambda m, x: x * (x.square().mean(-1, True) + 1e-6).pow(-0.5)),
        "rms_norm",
    ),
    "layer": (norm.raise_layer_norm, Model(lambda m, x: layer(x)), "layer_norm"),
    "layer, var": (
        norm.raise_layer_norm,
        Model(lambda m, x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()),
        "layer_norm",
    ),
    "gelu": (activation.raise_gelu, Model(lambda m, x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))), "gelu"),
    "gelu, other way": (
        activation.raise_gelu,
        Model(lambda m, x: x * (0.5 * (1 + torch.erf(x * math.sqrt(0.5))))),
        "gelu",
    ),
    "tanh gelu": (
        activation.raise_gelu_tanh,
        Model(lambda m, x: 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.044715 * torch.pow(x, 3))))),
        "gelu",
    ),
    "fast gelu": (
        activation.raise_gelu_tanh,
        Model(lambda m, x: 0.5 * x * (1 + torch.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x)))),
        "gelu",
    ),
    "silu": (activation.raise_silu, Model(lambda m, x: x * torch.sigmoid(x)), "silu"),
    "hardswish": (activation.raise_hardswish, Model(lambda m, x: x * nn.functional.relu6(x + 3) / 6), "hardswish"),
}


@pytest.mark.parametrize("case", FORMS)
def test_form_is_raised(case):
    step, model, operator = FORMS[case]
    program, _ = assert_pass(step, model, (torch.randn(3, 4, 8),), dynamic={"x": {0: "batch", 1: "seq"}})
    assert operator in names(program)


def einsum(equation, *shape):
    return product.raise_einsum, Model(lambda m, x: torch.einsum(equation, x, m.w), w=shape)


BATCHES = {
    "baddbmm": (product.raise_baddbmm, Model(lambda m, x: torch.baddbmm(m.b, x, m.w), w=(3, 8, 5), b=(3, 1, 5))),
    "einsum": einsum("etk,ekn->etn", 3, 8, 5),
    "einsum, transposed weight": einsum("etk,enk->etn", 3, 5, 8),
    "einsum, other order": einsum("etk, ekn -> nte", 3, 8, 5),
}


@pytest.mark.parametrize("case", BATCHES)
def test_products_with_a_batch_of_matrices_are_raised(case):
    step, model = BATCHES[case]
    program, _ = assert_pass(step, model, (torch.randn(3, 4, 8),), dynamic={"x": {1: "tokens"}})
    assert {"bmm", "matmul"} & set(names(program))
    assert not {"baddbmm", "einsum"} & set(names(program))


@pytest.mark.parametrize("equation", ["tk,ekn->etn", "kt,ekn->tne"])
def test_one_activation_meets_every_matrix(equation):
    step, model = einsum(equation, 3, 8, 5)
    axis = equation.index("t")
    x = torch.randn(4, 8) if axis == 0 else torch.randn(8, 4)
    program, _ = assert_pass(step, model, (x,), dynamic={"x": {axis: "tokens"}})
    assert "matmul" in names(program)


@pytest.mark.parametrize("equation", ["etk,ekn->tn", "etk,ekn->e", "btk,ekn->ebtn", "tke,ekn->ekn"])
def test_other_sums_are_left_alone(equation):
    step, model = einsum(equation, 3, 8, 5)
    x = torch.randn(4, 8, 3) if equation.startswith("tke") else torch.randn(3, 4, 8)
    program = capture(model, (x,))
    step.run(program, PassContext())
    assert "einsum" in names(program)


@pytest.mark.parametrize("case", ["transposed", "two biases", "rms", "layer", "gelu", "tanh gelu", "silu"])
def test_wrong_twins_are_caught(case):
    step, model, _ = FORMS[case]
    assert {"FlippedSign", "ScaledResult"} <= set(assert_mutants_caught(step, model, (torch.randn(3, 4, 8),)))


def test_a_gain_belongs_to_its_norm():
    program, _ = assert_pass(norm.raise_rms_norm, Model(rms, w=(8,)), (torch.randn(3, 4, 8),))
    assert names(program) == ["rms_norm", "mul"]


class Heads(nn.Module):
    """Attention over x itself, with a function of the scores between."""

    def __init__(self, between):
        super().__init__()
        self.between = between

    def forward(self, x):
        scores = self.between(x @ x.transpose(-1, -2))
        return torch.softmax(scores, -1) @ x


def causal(scores):
    size = scores.shape[-1]
    return torch.ones(size, size, dtype=torch.bool).tril()


LOWEST = torch.finfo(torch.float32).min
SCORES = {
    "scaled": lambda s: s / math.sqrt(8),
    "added": lambda s: s * 0.3 + torch.zeros(s.shape[-1], s.shape[-1]).masked_fill(~causal(s), LOWEST),
    "filled": lambda s: (s * 0.3).masked_fill(~causal(s), float("-inf")),
    "chosen, then scaled": lambda s: torch.where(causal(s), s, LOWEST) / 2,
}


@pytest.mark.parametrize("case", SCORES)
def test_attention_is_raised(case):
    dynamic = {"x": {0: "batch", 2: "seq"}}
    program, _ = assert_pass(
        attention.raise_attention, Heads(SCORES[case]), (torch.randn(2, 3, 5, 8),), dynamic=dynamic
    )
    assert "scaled_dot_product_attention" in names(program)
    assert "softmax" not in names(program)


NOT_RAISED = {
    "tanh": lambda s: torch.tanh(s) * 2,
    "outweigh": lambda s: s.masked_fill(~causal(s), -5.0),
}


@pytest.mark.parametrize("reason", NOT_RAISED)
def test_what_is_no_attention_says_why(reason):
    with pytest.raises(AssertionError, match=reason):
        assert_pass(attention.raise_attention, Heads(NOT_RAISED[reason]), (torch.randn(2, 3, 5, 8),))


def turned(x):
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def split_rotary(m, x):
    angle = torch.arange(x.shape[1])[:, None] * torch.tensor([1.0, 0.1])
    (a, b), cos, sin = turned(x), angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def test_split_rotary_gets_the_one_form():
    from sparc.analysis.forms import find_rotary

    program, _ = assert_pass(rotary.raise_split_rotary, Model(split_rotary), (torch.randn(2, 5, 4),))
    found = find_rotary(program.graph, program.weights)
    assert [(each.interleaved, each.symmetric) for each in found] == [(False, True)]
