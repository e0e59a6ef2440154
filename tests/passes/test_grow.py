"""Growth: the same function with more units or layers, and what cannot grow."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparc
from sparc.analysis.dependency import groups
from sparc.analysis.repeats import find_repeats
from sparc.capture import capture
from sparc.diag import PassError
from sparc.driver import Driver
from sparc.encoding.int_grid import IntGrid
from sparc.pass_base import PassContext, Samples
from sparc.passes.canonicalize import Canonicalize
from sparc.passes.coalesce import MergeNeurons
from sparc.passes.coalesce.units import obstacle
from sparc.passes.encode import Encode
from sparc.passes.round import Round
from sparc.program import Program
from sparc.verify import relative_error
from tests.architectures import ARCHITECTURES
from tests.passes.level_models import IDS, Decoder, Layer, decoder


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def double(name):
    """An architecture in float64, canonical, and its inputs."""
    built = ARCHITECTURES[name].build().enlivened()
    inputs = {
        key: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in built.inputs.items()
    }
    program = capture(built.model.double(), inputs, dynamic=built.dynamic)
    Canonicalize().run(program, PassContext())
    return program, program.main.signature.bind((), inputs)


@functools.cache
def gated():
    """Captured once; growth leaves it alone."""
    torch.manual_seed(0)
    return capture(Decoder(Layer()).double().eval(), (IDS,))


def error(a, b, flat):
    pairs = zip(a.run_flat(flat, wide=True), b.run_flat(flat, wide=True), strict=True)
    return max(relative_error(x, y) for x, y in pairs)


def shapes(program):
    return {name: tuple(weight.shape) for name, weight in program.weights.items()}


class Convolutions(nn.Module):
    """A grouped and a depthwise convolution, a batch norm, and a flattened reader."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.deep, self.last = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Linear(6 * 4 * 4, 5)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        return self.last(self.deep(torch.sigmoid(self.norm(self.first(x)))).flatten(1))


def test_the_formula():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double(), torch.randn(5, 4).double()
    program = capture(model, (x,))
    grown = sparc.widen(program, "0", 8, seed=3)
    rows, old = grown.weights["0.weight"], program.weights["0.weight"]
    source = [next(i for i in range(3) if torch.equal(row, old[i])) for row in rows]
    assert source[:3] == [0, 1, 2]
    assert len(source) == 8
    assert torch.equal(grown.weights["0.bias"], program.weights["0.bias"][source])
    for unit, g in enumerate(source):
        expected = program.weights["2.weight"][:, g] / source.count(g)
        assert relative_error(expected, grown.weights["2.weight"][:, unit]) < 1e-15
    assert error(program, grown, [x]) < 1e-9
    assert shapes(program) == {"0.weight": (3, 4), "0.bias": (3,), "2.weight": (2, 3), "2.bias": (2,)}


def test_convolutions():
    torch.manual_seed(0)
    model, x = Convolutions().double().eval(), torch.randn(2, 3, 4, 4).double()
    program = capture(model, (x,))
    grown = sparc.widen(program, "first", 11)
    assert shapes(grown)["deep.weight"] == (11, 1, 3, 3)
    assert shapes(grown)["norm.running_var"] == (11,)
    assert shapes(grown)["last.weight"] == (5, 11 * 4 * 4)
    assert error(program, grown, [x]) < 1e-9


@settings(max_examples=15)
@given(units=st.integers(25, 60), seed=st.integers(0, 100))
def test_a_gated_layer_of_any_width(units, seed):
    program = gated()
    grown = sparc.widen(program, "layers.0.gate", units, seed=seed)
    assert shapes(grown)["layers.0.up.weight"] == (units, 16)
    assert error(program, grown, [IDS]) < 1e-9


def test_merging_neurons_undoes_it():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), torch.randn(5, 4)
    program = capture(model, (x,))
    driver = Driver(sparc.widen(program, "0", 16), Samples({"forward": [[x]]}))
    driver.run(MergeNeurons())
    assert torch.equal(driver.program.weights["0.weight"], program.weights["0.weight"])
    assert relative_error(program.weights["2.weight"], driver.program.weights["2.weight"]) < 1e-6
    assert driver.program.text() == program.text()


def test_noise_is_on_the_copies_only():
    program = gated()
    grown = sparc.widen(program, "layers.0.gate", 30, noise=0.01)
    plain = sparc.widen(program, "layers.0.gate", 30)
    rows, exact = grown.weights["layers.0.gate.weight"], plain.weights["layers.0.gate.weight"]
    assert torch.equal(rows[:24], exact[:24])
    spread = (rows[24:] - exact[24:]).std() / program.weights["layers.0.gate.weight"].std()
    assert 0.005 < float(spread) < 0.02
    assert torch.equal(grown.weights["layers.0.down.weight"], plain.weights["layers.0.down.weight"])
    assert 1e-9 < error(program, grown, [IDS]) < 0.05


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("bert", "t5")]


@pytest.mark.parametrize("name", ["gpt2", "llama", "mobilenet_v2", *SLOW])
def test_every_group_of_an_architecture(name):
    program, flat = double(name)
    found = [group for group in groups(program) if not obstacle(group) and not all(m.read for m in group.members)]
    kinds = set()
    for group in found[:8]:
        writer = next(member.weight for member in group.members if not member.read)
        grown = sparc.widen(program, writer, group.units + 3, kind=group.kind)
        assert error(program, grown, flat) < 1e-9, str(group)
        kinds.add(group.kind)
    assert kinds


def refused(make, layer, units, why, **options):
    with pytest.raises(PassError, match="SPARC209") as raised:
        sparc.widen(make(), layer, units, **options)
    assert why in str(raised.value)


def encoded():
    driver = Driver(decoder(1), Samples({"forward": [[IDS]]}))
    for step in (Round(IntGrid(bits=8)), Encode()):
        driver.run(step)
    return driver.program


def normed():
    return capture(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)), (torch.randn(2, 3),))


class Summed(nn.Module):
    """Units that are summed without a weight, so that copies would count twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x):
        return torch.relu(self.layer(x)).sum(-1)


def test_what_cannot_be_widened():
    refused(lambda: decoder(1), "layers.0.gate", 24, "units from 25")
    refused(lambda: decoder(1), "layers.0.gat", 30, "no layer")
    refused(lambda: decoder(1), "layers.0.gate", 30, "negative", noise=-1.0)
    refused(lambda: decoder(1), "tokens", 32, "its positions matter to embedding")
    refused(normed, "0", 5, "layer_norm")
    refused(lambda: capture(nn.Linear(3, 4), (torch.randn(2, 3),)), "", 5, "no layer")
    refused(lambda: decoder(1), "layers", 32, "several groups")
    refused(lambda: capture(Summed(), (torch.randn(2, 3),)), "layer", 5, "operands are all computed")
    refused(encoded, "layers.0.gate", 30, "decode is not seen through")


# depth ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("block", [0, 1, -1])
def test_one_more_layer_computes_the_same(block):
    program = decoder(3)
    deeper = sparc.deepen(program, block)
    assert torch.equal(deeper.run(IDS), program.run(IDS))
    assert [len(each) for each in find_repeats(deeper.graph)] == [4]
    added = set(deeper.weights) - set(program.weights)
    number = block % 3
    assert {name.rpartition("_")[0] for name in added} == {
        n for n in program.weights if n.startswith(f"layers.{number}.")
    }
    zero = {name for name in added if not deeper.weights[name].any()}
    assert zero == {f"layers.{number}.{end}_1" for end in ("out.weight", "down.weight", "down.bias")}
    assert set(program.weights) == set(decoder(3).weights)


def test_the_new_layer_is_in_its_place():
    program = decoder(3)
    deeper = sparc.deepen(program, 0)
    for name in list(deeper.weights):
        if name.endswith("_1"):
            deeper.set_weight(name, program.weights[name[:-2]])
    torch.manual_seed(0)
    model = Decoder(*[Layer() for _ in range(4)]).eval()
    order = dict(enumerate([0, 0, 1, 2]))
    state = {}
    for name in model.state_dict():
        _, _, rest = name.partition(".")
        number, _, inner = rest.partition(".")
        state[name] = program.weights[f"layers.{order[int(number)]}.{inner}" if name.startswith("layers") else name]
    model.load_state_dict(state)
    assert relative_error(model(IDS), deeper.run(IDS)) < 1e-6


def test_shared_layers_share_what_is_not_zero():
    torch.manual_seed(0)
    layer = Layer()
    program = capture(Decoder(layer, layer).eval(), (IDS,))
    deeper = sparc.deepen(program)
    assert torch.equal(deeper.run(IDS), program.run(IDS))
    assert set(deeper.weights) - set(program.weights) == {
        f"layers.0.{end}_1" for end in ("out.weight", "down.weight", "down.bias")
    }


@pytest.mark.parametrize("name", ["gpt2", "llama", "vit", pytest.param("t5", marks=pytest.mark.slow)])
def test_architectures_grow_deeper(name):
    built = ARCHITECTURES[name].build().enlivened()
    program = capture(built.model, built.inputs, dynamic=built.dynamic)
    Canonicalize().run(program, PassContext())
    flat = program.main.signature.bind((), dict(built.inputs))
    deeper = sparc.deepen(program)
    assert len(find_repeats(deeper.graph)[0]) == len(find_repeats(program.graph)[0]) + 1
    for a, b in zip(program.run_flat(flat), deeper.run_flat(flat), strict=True):
        assert torch.equal(a, b)


def test_what_cannot_grow_deeper():
    built = ARCHITECTURES["bert"].build()
    post = capture(built.model, built.inputs, dynamic=built.dynamic)
    Canonicalize().run(post, PassContext())
    plain = capture(nn.Linear(3, 3), (torch.randn(2, 3),))
    entries = decoder(2)
    several = Program(entries.weights, {"a": entries.main, "b": entries.main.clone()})
    cases = [(post, {}, "layer_norm is no residual step"), (plain, {}, "0 repeated blocks"), (several, {}, "several")]
    for program, options, why in [
        *cases,
        (decoder(2), {"block": 2}, "there are 2"),
        (decoder(2), {"stack": 1}, "1 rep"),
    ]:
        with pytest.raises(PassError, match="SPARC209") as raised:
            sparc.deepen(program, **options)
        assert why in str(raised.value)
