"""Folding what norms multiply and add: every kind of reader, and every reason to leave a norm alone."""

import pytest
import torch
from torch import nn

from sparc.capture import capture
from sparc.driver import Driver
from sparc.encoding.int_grid import IntGrid
from sparc.pass_base import Samples
from sparc.passes.encode import Encode
from sparc.passes.fold import fold_norm_affine
from sparc.passes.round import Round
from sparc.testing import assert_mutants_caught, assert_pass
from tests.passes.models import driver


def trained(norm):
    """A norm with a gain and a shift that matter."""
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    return norm


class Model(nn.Module):
    """A norm, a function of what it makes, and some layers."""

    def __init__(self, norm, forward, **layers):
        super().__init__()
        self.norm = norm if norm is None else trained(norm)
        self.how = forward
        for name, layer in layers.items():
            self.register_parameter(name, layer) if isinstance(layer, nn.Parameter) else self.add_module(name, layer)

    def forward(self, x):
        return self.how(self, x if self.norm is None else self.norm(x))


def two(m, x):
    return m.a(x), m.b(x)


def linears(bias=True):
    return {"a": nn.Linear(6, 5, bias=bias), "b": nn.Linear(6, 6)}


def gain(*shape):
    return nn.Parameter(torch.rand(*shape) + 0.5)


CASES = {
    "layer norm": lambda: Model(nn.LayerNorm(6), two, **linears()),
    "rms norm": lambda: Model(nn.RMSNorm(6, eps=1e-6), two, **linears(bias=False)),
    "a new bias": lambda: Model(nn.LayerNorm(6), lambda m, x: m.a(x), a=nn.Linear(6, 12, bias=False)),
    "carriers": lambda: Model(
        nn.LayerNorm(6), lambda m, x: (m.a(x.roll(1, 1)[:, 1:].reshape(-1, 6)), m.b(x.mean(1))), **linears()
    ),
    "convolution": lambda: Model(nn.LayerNorm(6), lambda m, x: m.a(x.transpose(1, 2)), a=nn.Conv1d(6, 4, 3)),
    "padded, no shift": lambda: Model(
        nn.RMSNorm(6, eps=1e-6), lambda m, x: m.a(x.transpose(1, 2)), a=nn.Conv1d(6, 4, 3, padding=1)
    ),
    "a factor alone": lambda: Model(None, lambda m, x: m.a(x.relu() * m.g), a=nn.Linear(6, 4), g=gain(6)),
    "a shift alone": lambda: Model(None, lambda m, x: m.a(m.g + x.relu()), a=nn.Linear(6, 4), g=gain(6)),
    "channels": lambda: Model(None, lambda m, x: m.a(x * m.g), a=nn.Conv1d(4, 3, 1), g=gain(4, 1)),
    "shared within": lambda: Model(nn.LayerNorm(6), lambda m, x: m.a(x[:, 1:]) + m.a(x[:, :-1]), a=nn.Linear(6, 4)),
}
X = (2, 4, 6)


def run(model, x=None):
    torch.manual_seed(0)
    x = torch.randn(X) if x is None else x
    program = capture(model.eval(), (x,))
    chosen = Driver(program, Samples({"forward": [[x]]}), verify="full")
    return chosen, chosen.run(fold_norm_affine)


@pytest.mark.parametrize("case", CASES)
def test_the_affine_map_moves_into_every_reader(case):
    torch.manual_seed(0)
    model = CASES[case]()
    chosen, row = run(model)
    assert row.matches == 1
    assert row.measured["region, float64"] < 1e-12
    assert row.bytes_after <= row.bytes_before
    assert not [name for name in chosen.program.weights if name.startswith(("norm.", "g"))]
    names = {name.partition(".")[0] for name in chosen.program.weights}
    assert {name.rpartition(".")[2] for name in chosen.program.weights} <= {"weight", "bias"}
    assert names <= {"a", "b"}


def test_by_hand():
    norm, layer = nn.LayerNorm(2), nn.Linear(2, 1)
    model = Model(norm, lambda m, x: m.a(x), a=layer)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, 3.0]))
        norm.bias.copy_(torch.tensor([1.0, -1.0]))
        layer.weight.copy_(torch.tensor([[5.0, 7.0]]))
        layer.bias.fill_(0.5)
    program = run(model, torch.randn(3, 2))[0].program
    assert program.weights["a.weight"].tolist() == [[10.0, 21.0]]
    assert program.weights["a.bias"].tolist() == [5.0 - 7.0 + 0.5]


def test_text_before_and_after(golden):
    torch.manual_seed(0)
    chosen, _ = run(
        Model(nn.LayerNorm(6), lambda m, x: torch.relu(m.a(x)) + m.a2(x[:, :1]), a=nn.Linear(6, 4), a2=nn.Linear(6, 4))
    )
    golden("fold_norm.txt", chosen.program.text())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(9, 6), trained(nn.LayerNorm(6)), nn.Linear(6, 9)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.norm(self.embedding(ids)))


LEFT = {
    "the bias 'a.bias' is also read by relu": lambda: Model(
        nn.LayerNorm(6), lambda m, x: m.a(x) + m.a.bias.relu(), a=nn.Linear(6, 4)
    ),
    "another dtype than the input": lambda: Model(
        None, lambda m, x: m.a(x.bfloat16() * m.g), a=nn.Linear(6, 4), g=gain(6)
    ),
    "read by add": lambda: Model(nn.LayerNorm(6), lambda m, x: x + m.b(x), **linears()),
    "read by the program's output": lambda: Model(nn.LayerNorm(6), lambda m, x: (x, m.a(x)), **linears()),
    "read by conv1d": lambda: Model(nn.LayerNorm(6), lambda m, x: m.a(x), a=nn.Conv1d(4, 3, 1)),
    "more than the last axis": lambda: Model(nn.LayerNorm((4, 6)), two, **linears()),
    "a weight is computed": lambda: Model(
        nn.LayerNorm(6), lambda m, x: nn.functional.linear(x, m.a.weight * m.a.weight), **linears()
    ),
    "'a.weight' is also read by linear": lambda: Model(nn.LayerNorm(6), lambda m, x: m.a(m.a(x)), a=nn.Linear(6, 6)),
    "pads with zeros": lambda: Model(
        nn.LayerNorm(6), lambda m, x: m.a(x.transpose(1, 2)), a=nn.Conv1d(6, 4, 3, padding=1)
    ),
    "shift does not pass pad": lambda: Model(
        nn.LayerNorm(6), lambda m, x: m.a(nn.functional.pad(x, (0, 0, 1, 0))), a=nn.Linear(6, 4)
    ),
    "take 4 bytes more": lambda: Model(nn.LayerNorm(6), lambda m, x: m.a(x), a=nn.Linear(6, 13, bias=False)),
}


@pytest.mark.parametrize("why", LEFT)
def test_reasons_to_leave_it_alone(why):
    torch.manual_seed(0)
    _, row = run(LEFT[why]())
    assert row.changed == 0
    assert any(why in skip.why for skip in row.skips), row.skips


def test_a_head_tied_to_an_embedding_is_left_alone():
    _, row = run(Tied(), torch.arange(5)[None])
    assert row.changed == 0
    assert "'embedding.weight' is also read by embedding" in row.skips[0].why


def test_a_computed_gain_is_left_alone():
    class Computed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.g = nn.Linear(6, 4), gain(6)

        def forward(self, x):
            return self.a(nn.functional.layer_norm(x, (6,), self.g * x[0, 0], None))

    assert "a gain is computed" in run(Computed())[1].skips[0].why


@pytest.mark.parametrize("steps", [(Round(IntGrid(8)),), (Round(IntGrid(8)), Encode())], ids=["rounded", "encoded"])
def test_weights_on_a_grid_are_left_alone(steps):
    torch.manual_seed(0)
    chosen = driver(CASES["layer norm"](), (torch.randn(X),))
    for step in steps:
        chosen.run(step)
    row = chosen.run(fold_norm_affine)
    assert row.changed == 0
    assert ("rounded already" if len(steps) == 1 else "encoded already") in row.skips[0].why


def test_a_vanishing_shift_needs_no_bias():
    torch.manual_seed(0)
    model = Model(nn.LayerNorm(6), lambda m, x: m.a(x), a=nn.Linear(6, 13, bias=False))
    with torch.no_grad():
        model.norm.bias.zero_()
    chosen, row = run(model)
    assert row.matches == 1
    assert set(chosen.program.weights) == {"a.weight"}


def test_half_precision_is_rounded_once():
    torch.manual_seed(0)
    model = CASES["layer norm"]().bfloat16()
    expected = (model.a.weight.double() * model.norm.weight.double()).bfloat16()
    chosen, row = run(model, torch.randn(X).bfloat16())
    assert row.measured["region, float64"] < 1e-12
    assert torch.equal(chosen.program.weights["a.weight"], expected)


@pytest.mark.parametrize("case", ["layer norm", "rms norm", "carriers"])
def test_the_contract_kit_and_wrong_twins(case):
    torch.manual_seed(0)
    model, x = CASES[case]().eval(), torch.randn(X)
    assert_pass(fold_norm_affine, model, (x,), dynamic={"x": {0: "batch"}})
    caught = assert_mutants_caught(fold_norm_affine, model, (x,))
    assert {"ScaledConstant", "ScaledResult", "FlippedSign"} <= set(caught)
