"""Fewer layers: influence, what is removed and what is left alone, and exactness where a layer does nothing."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from sparc.analysis.repeats import find_repeats
from sparc.capture import capture
from sparc.diag import PassError
from sparc.driver import Driver
from sparc.pass_base import Samples
from sparc.passes.canonicalize import Canonicalize
from sparc.passes.cut.blocks import DropBlocks, distance
from sparc.passes.share_steps import branch_ends
from sparc.program import Program
from sparc.testing import assert_pass
from sparc.verify import relative_error
from tests.architectures import ARCHITECTURES
from tests.passes.level_models import IDS, Decoder, Layer


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def scaled(layer, factor):
    """The layer with its residual branches multiplied by a factor."""
    for each in (layer.out, layer.down):
        for parameter in each.parameters():
            parameter.mul_(factor)
    return layer


def decoder(*factors, **options):
    torch.manual_seed(0)
    return Decoder(*[scaled(Layer(), factor) for factor in factors], **options).eval()


def run(model, step, *inputs):
    inputs = inputs or (IDS,)
    program = capture(model, inputs)
    flat = program.main.signature.bind(inputs, {})
    driver = Driver(program, Samples({"forward": [flat]}, {"forward": [flat]}))
    return driver.program, driver.run(step), driver


def without(model, *layers):
    """The model with only some of its layers."""
    small = Decoder(*[layer for index, layer in enumerate(model.layers) if index not in layers], states=model.states)
    for name in ("tokens", "positions", "norm"):
        setattr(small, name, getattr(model, name))
    return small.eval()


def removed(driver):
    return [each for each in driver.diagnostics if each.code.id == "SPARC215"]


def test_the_layers_of_least_influence_go():
    model = decoder(3.0, 0.1, 3.0, 0.2, 3.0)
    _, row, driver = run(model, DropBlocks(2))
    assert relative_error(without(model, 1, 3)(IDS), driver.program.run(IDS)) < 1e-6
    assert row.bytes_after < row.bytes_before
    assert sorted(each.where.module for each in removed(driver)) == ["layers.1", "layers.3"]
    assert all("cosine distance 0.0" in each.why for each in removed(driver))
    assert len([skip for skip in row.skips if "is not among the least" in skip.why]) == 3


def test_neighbours_go_together():
    model = decoder(3.0, 0.1, 0.2, 3.0)
    _, _, driver = run(model, DropBlocks(2))
    assert relative_error(without(model, 1, 2)(IDS), driver.program.run(IDS)) < 1e-6
    assert not any(name.startswith(("layers.1", "layers.2")) for name in driver.program.weights)


def test_a_layer_that_does_nothing_is_removed_exactly():
    model = decoder(1.0, 1.0, 0.0, 1.0)
    before, _, driver = run(model, DropBlocks(1))
    assert torch.equal(driver.program.run(IDS), before.run(IDS))
    assert [each.why for each in removed(driver)] == ["cosine distance 0"]
    assert [each.where.module for each in removed(driver)] == ["layers.2"]
    assert not any("layers.2." in name for name in driver.program.weights)


def test_an_angular_stretch_is_of_neighbours():
    model = decoder(0.1, 3.0, 0.3, 0.3, 3.0)
    _, _, driver = run(model, DropBlocks(2, "angular"))
    assert relative_error(without(model, 2, 3)(IDS), driver.program.run(IDS)) < 1e-6
    _, _, driver = run(model, DropBlocks(2))
    assert not relative_error(without(model, 2, 3)(IDS), driver.program.run(IDS)) < 1e-2


def test_influence_is_what_the_paper_says():
    model = decoder(1.0, 0.5, 2.0, states=True).double()
    states = [model.tokens(IDS) + model.positions, *model(IDS)[1:]]
    pairs = [(a.flatten(0, 1), b.flatten(0, 1)) for a, b in pairwise(states)]
    plain = [float(1 - nn.functional.cosine_similarity(a, b).mean()) for a, b in pairs]
    angles = [float(nn.functional.cosine_similarity(a, b).arccos().mean() / torch.pi) for a, b in pairs]
    assert [distance(a, b) for a, b in pairs] == pytest.approx(plain, rel=1e-9)
    assert [distance(a, b, "angular") for a, b in pairs] == pytest.approx(angles, rel=1e-6)
    _, row, driver = run(model, DropBlocks(1))
    shown = [float(each.why.split()[-1]) for each in removed(driver)]
    assert shown == [pytest.approx(plain[1], rel=1e-2)]
    others = [float(skip.why.split()[3]) for skip in row.skips]
    assert sorted(others) == pytest.approx(sorted([plain[0], plain[2]]), rel=1e-2)


def test_rows_of_zeros():
    zero, row = torch.zeros(1, 4), torch.ones(1, 4)
    assert distance(zero, zero) == 0
    assert distance(zero, row) == distance(row, zero) == 0.5
    assert distance(row, -row) == 2
    assert distance(row, -row, "angular") == 1


def test_hidden_states_that_are_outputs_stay():
    model = decoder(3.0, 0.1, 3.0, states=True)
    _, _, driver = run(model, DropBlocks(1))
    expected = without(model, 1)(IDS)
    found = driver.program.run(IDS)
    order = [expected[0], expected[1], expected[1], expected[2]]
    assert [relative_error(a, b) < 1e-6 for a, b in zip(order, found, strict=True)] == [True] * 4


class Channels(nn.Module):
    """A residual convolution."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return x + self.conv(x)


class Stack(nn.Module):
    """Blocks between a stem and a head."""

    def __init__(self, *blocks):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 4, 1), nn.Sequential(*blocks)

    def forward(self, x):
        return self.blocks(self.stem(x)).mean((-2, -1))


def test_the_text_of_a_smaller_stack(golden):
    torch.manual_seed(2)
    model = Stack(*[Channels() for _ in range(3)]).eval()
    for parameter in model.blocks[1].parameters():
        parameter.mul_(0.1)
    before, _, driver = run(model, DropBlocks(1), torch.randn(2, 3, 5, 6))
    golden("drop_blocks.txt", f"{before.text()}\n{driver.program.text()}")


def test_pixels_are_tokens_of_channels():
    torch.manual_seed(1)
    model, x = Stack(*[Channels() for _ in range(3)]).eval(), torch.randn(2, 3, 5, 6)
    _, _, driver = run(model, DropBlocks(1), x)
    states = [model.stem(x)]
    for block in model.blocks:
        states.append(block(states[-1]))
    rows = [state.movedim(1, -1).flatten(0, 2) for state in states]
    plain = [float(1 - nn.functional.cosine_similarity(a, b).mean()) for a, b in pairwise(rows)]
    assert [float(each.why.split()[-1]) for each in removed(driver)] == [pytest.approx(min(plain), rel=1e-2)]


class Escaping(Layer):
    """A layer whose inner value is an output of the model."""

    def forward(self, x):
        y = self.norm1(x)
        return x + self.down(self.gate(y)), y


class Keys(Decoder):
    """A decoder that returns a value of its second layer."""

    def forward(self, ids):
        x, kept = self.tokens(ids) + self.positions, []
        for layer in self.layers:
            x, y = layer(x)
            kept.append(y)
        return self.norm(x), *kept


def test_layers_whose_values_are_read_outside_stay():
    torch.manual_seed(0)
    _, row, _ = run(Keys(*[Escaping() for _ in range(3)]).eval(), DropBlocks(1))
    assert not row.changed
    assert any("is also read outside its block" in skip.why for skip in row.skips)


def test_more_than_there_are():
    for step in (DropBlocks(5), DropBlocks(5, "angular")):
        _, row, _ = run(decoder(1.0, 1.0, 1.0), step)
        assert not row.changed
        assert any("no 5 repetitions that can be removed" in skip.why for skip in row.skips)


def test_several_entries():
    program = capture(decoder(1.0, 1.0), (IDS,))
    program = Program(program.weights, {"a": program.main, "b": program.main.clone()})
    driver = Driver(program, Samples({"a": [[IDS]], "b": [[IDS]]}, {"a": [[IDS]]}))
    row = driver.run(DropBlocks(1))
    assert not row.changed
    assert "every entry" in row.skips[0].why


def test_without_repetitions_that_is_said():
    for step in (DropBlocks(1), DropBlocks(1, "angular")):
        _, row, _ = run(decoder(1.0), step)
        assert [skip.where for skip in row.skips] == ["the program"]
        assert "no repeated block was found" in row.skips[0].why


def test_layers_of_different_widths_are_no_repetitions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), *[Residual(width) for width in (4, 6, 8)]).eval()
    assert "no repeated block was found" in run(model, DropBlocks(1), torch.randn(5, 8))[1].skips[0].why


class Residual(nn.Module):
    """`x + down(relu(up(x)))`."""

    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(8, width), nn.Linear(width, 8)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def test_nothing_by_default_and_not_without_data():
    row = run(decoder(1.0, 1.0), DropBlocks())[1]
    assert (row.changed, row.skips) == (0, [])
    with pytest.raises(PassError, match="SPARC208"):
        Driver(capture(decoder(1.0, 1.0), (IDS,)), Samples({"forward": [[IDS]]})).run(DropBlocks(1))


@pytest.mark.parametrize("options", [{"count": 0}, {"count": 1, "distance": "euclidean"}])
def test_bad_options(options):
    with pytest.raises(PassError, match="SPARC209"):
        DropBlocks(**options)


def test_the_result_is_stored_and_takes_other_sizes():
    torch.manual_seed(1)
    model = Stack(*[Channels() for _ in range(3)]).eval()
    assert_pass(DropBlocks(1), model, (torch.randn(2, 3, 5, 6),), dynamic={"x": {0: "batch"}})


@pytest.mark.parametrize("name", ["gpt2", "llama", "vit", pytest.param("t5", marks=pytest.mark.slow)])
def test_a_silenced_layer_of_an_architecture_leaves_no_trace(name):
    built = ARCHITECTURES[name].build().enlivened()
    program = capture(built.model, built.inputs, dynamic=built.dynamic)
    flat = program.main.signature.bind((), dict(built.inputs))
    driver = Driver(program, Samples({"forward": [flat]}, {"forward": [flat]}))
    driver.run(Canonicalize())
    silent = find_repeats(driver.program.graph)[-1].repetitions[-1]
    for layer in branch_ends(silent):
        for weight in layer.all_input_nodes:
            if weight.op == "get_attr":
                driver.program.set_weight(weight, torch.zeros_like(driver.program.weight(weight)))
    before = driver.program
    driver.run(DropBlocks(1))
    assert [each.why for each in removed(driver)] == ["cosine distance 0"]
    assert silent.weights[0] not in driver.program.weights
    for a, b in zip(before.run_flat(flat), driver.program.run_flat(flat), strict=True):
        assert torch.equal(a, b)
