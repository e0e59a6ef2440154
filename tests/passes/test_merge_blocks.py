"""LaCo: the merged weights and the loop against a plain implementation, and every reason to leave layers alone."""

import pytest
import torch
from torch import nn

from sparc.analysis.repeats import find_repeats
from sparc.capture import capture
from sparc.diag import PassError
from sparc.driver import Driver
from sparc.encoding.int_grid import IntGrid
from sparc.pass_base import Samples
from sparc.passes.canonicalize import Canonicalize
from sparc.passes.clean import RemoveNoOps
from sparc.passes.cut.merge_blocks import MergeBlocks, last_states
from sparc.passes.encode import Encode
from sparc.passes.round import Round
from sparc.program import Program
from sparc.testing import assert_pass
from sparc.verify import relative_error
from tests.architectures import ARCHITECTURES
from tests.passes.level_models import IDS, Decoder, Layer


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def decoder(count, seed=0, **options):
    torch.manual_seed(seed)
    return Decoder(*[Layer() for _ in range(count)], **options).eval()


def run(model, step, *before, batches=(IDS,), first=IDS):
    program = capture(model, (first,))
    driver = Driver(program, Samples({"forward": [[first]]}, {"forward": [[each] for each in batches]}))
    for each in before:
        driver.run(each)
    return driver.program, driver.run(step), driver


# a plain implementation of the paper's algorithm 1 -------------------------------------------------------------------
def merged(layers, mode="differences"):
    """One layer for several, by the paper's formula."""
    states = [layer.state_dict() for layer in layers]
    result = {}
    for name, first in states[0].items():
        total = first.clone()
        for other in states[1:]:
            total = total + (other[name] - first)
        result[name] = total if mode == "differences" else states[-1][name]
    made = Layer().to(next(iter(result.values())).dtype)
    made.load_state_dict(result)
    return made


def last_hidden(model, layers, ids):
    x = model.tokens(ids) + model.positions
    for layer in layers:
        x = layer(x)
    return model.norm(x).flatten()


def laco(model, size, interval, threshold, batches, mode="differences"):
    """The layers that are left, and the similarities of all trials."""
    original = left = list(model.layers)
    first, similarities = len(left) - size, []
    while first >= 0:
        trial = [*left[:first], merged(left[first : first + size], mode), *left[first + size :]]
        cosines = [
            nn.functional.cosine_similarity(last_hidden(model, original, ids), last_hidden(model, trial, ids), dim=0)
            for ids in batches
        ]
        similarities.append(float(torch.stack(cosines).mean()))
        if similarities[-1] > threshold:
            left = trial
            first = min(first - interval, len(left) - size)
        else:
            first -= 1
    return left, similarities


BATCHES = [IDS, (IDS * 7 + 3) % 20, (IDS * 3 + 1) % 20]


@pytest.mark.parametrize(("size", "interval"), [(2, 1), (2, 2), (3, 1), (4, 1)])
@pytest.mark.parametrize("mode", ["differences", "replace_with_last"])
def test_the_loop_is_the_papers(size, interval, mode):
    model = decoder(7, seed=size).double()
    spread = sorted(laco(model, size, interval, 1.1, BATCHES, mode)[1])
    threshold = (spread[len(spread) // 2 - 1] + spread[len(spread) // 2]) / 2  # some trials pass, others do not
    expected, _ = laco(model, size, interval, threshold, BATCHES, mode)
    assert 1 < len(expected) < 7
    step = MergeBlocks(size=size, interval=interval, threshold=threshold, mode=mode)
    _, _, driver = run(model, step, batches=BATCHES)
    reference = Decoder(*expected).double().eval()
    for name in ("tokens", "positions", "norm"):
        setattr(reference, name, getattr(model, name))
    assert len([name for name in driver.program.weights if name.endswith("qkv.weight")]) == len(expected)
    for ids in BATCHES:
        assert relative_error(reference(ids), driver.program.run(ids)) < 1e-9


def test_states_are_compared_behind_the_last_norm():
    model = decoder(3).double()
    program = capture(model, (IDS,))
    last = find_repeats(program.graph)[0].repetitions[-1]
    expected = last_hidden(model, model.layers, IDS).reshape(2, 6, 16)
    assert relative_error(expected, last_states(program, last, [[IDS]])[0]) < 1e-12
    program = capture(decoder(3, states=True).double(), (IDS,))
    last = find_repeats(program.graph)[0].repetitions[-1]
    assert torch.equal(last_states(program, last, [[IDS]])[0], program.run(IDS)[-1])


def test_states_that_are_outputs_become_the_merged_one():
    model = decoder(4, states=True)
    _, _, driver = run(model, MergeBlocks(size=3, threshold=-1.0))
    _, *states = driver.program.run(IDS)
    assert [torch.equal(states[1], state) for state in states] == [False, True, True, True]
    assert not any(name.startswith(("layers.2", "layers.3")) for name in driver.program.weights)


def test_the_formula_does_not_telescope():
    model = decoder(3).double()
    program, _, driver = run(model, MergeBlocks(size=3, threshold=-1.0))
    a, b, c = (program.weights[f"layers.{index}.gate.weight"] for index in range(3))
    kept = driver.program.weights["layers.0.gate.weight"]
    assert relative_error(b + c - a, kept) < 1e-12
    _, _, driver = run(model, MergeBlocks(size=3, threshold=-1.0, mode="replace_with_last"))
    assert torch.equal(driver.program.weights["layers.0.gate.weight"], c)


def test_half_precision_is_rounded_once():
    model = decoder(3).to(torch.bfloat16)
    program, _, driver = run(model, MergeBlocks(size=3, threshold=-1.0))
    a, b, c = (program.weights[f"layers.{index}.gate.weight"].double() for index in range(3))
    assert torch.equal(driver.program.weights["layers.0.gate.weight"], (a + ((b - a) + (c - a))).to(torch.bfloat16))


def test_equal_layers_that_do_nothing_merge_exactly():
    model = decoder(4)
    for layer in model.layers[1:]:
        layer.load_state_dict(model.layers[1].state_dict())
        for each in (layer.out, layer.down):
            for parameter in each.parameters():
                parameter.zero_()
    before, row, driver = run(model, MergeBlocks(size=2, threshold=0.999999))
    assert torch.equal(driver.program.run(IDS), before.run(IDS))
    assert len({name.split(".")[1] for name in driver.program.weights if name.startswith("layers.")}) < 4
    found = [each for each in driver.diagnostics if each.code.id == "SPARC215"]
    assert all("merged into" in each.why and "similarity 1" in each.why for each in found)
    assert found
    assert row.bytes_after < row.bytes_before


def test_after_a_merger_into_one_nothing_repeats():
    _, row, driver = run(decoder(2), MergeBlocks(size=2, threshold=-1.0))
    assert (row.matches, row.skips) == (1, [])
    row = driver.run(MergeBlocks(size=2, threshold=-1.0))
    assert row.matches == 0
    assert "no repeated block was found" in row.skips[0].why


def test_unlike_layers_stay():
    _, row, _ = run(decoder(4), MergeBlocks(size=2, threshold=1.0))
    assert not row.changed
    assert len([skip for skip in row.skips if "is not above 1" in skip.why]) == 3


class Tied(Decoder):
    """The first layer's gate is read by the head as well."""

    def forward(self, ids):
        return super().forward(ids) + self.layers[2].gate.weight.sum()


class Counting(Layer):
    """A layer with an integer constant of its own."""

    def __init__(self, count):
        super().__init__()
        self.register_buffer("count", torch.tensor([count] * 16))

    def forward(self, x):
        return super().forward(x) + self.count


class Inner(Layer):
    """A layer that returns an inner value too."""

    def forward(self, x):
        y = self.norm1(x)
        return x + self.down(self.gate(y)), y


class Keys(Decoder):
    """A decoder that returns inner values."""

    def forward(self, ids):
        x, kept = self.tokens(ids) + self.positions, []
        for layer in self.layers:
            x, y = layer(x)
            kept.append(y)
        return self.norm(x), *kept


SKIPS = {
    "tied": (lambda: Tied(*[Layer() for _ in range(4)]), True, "layers.2.gate.weight is also read outside"),
    "constants": (lambda: Decoder(Counting(1), Counting(1), Counting(2)), True, "layers.1.count differs"),
    "keys": (lambda: Keys(Inner(), Inner(), Inner()), False, "also read outside its block"),
    "too few": (lambda: Decoder(Layer(), Layer()), False, "fewer than 3 repetitions"),
}


@pytest.mark.parametrize("case", SKIPS)
def test_what_is_left_alone(case):
    """Where one merger is impossible, those further up may still happen."""
    torch.manual_seed(0)
    make, changed, why = SKIPS[case]
    _, row, _ = run(make().eval(), MergeBlocks(size=3 if case == "too few" else 2, threshold=-1.0))
    assert any(why in skip.why for skip in row.skips), row.skips
    assert bool(row.changed) == changed


def test_encoded_weights_are_left_alone():
    _, row, _ = run(decoder(3), MergeBlocks(size=2, threshold=-1.0), Round(IntGrid(bits=8)), Encode())
    assert not row.changed
    assert any("encoded already" in skip.why for skip in row.skips)


def test_layers_that_share_weights_keep_them():
    torch.manual_seed(0)
    layer = Layer()
    before, row, driver = run(Decoder(*[layer] * 3).eval(), MergeBlocks(size=2, threshold=-1.0), RemoveNoOps())
    assert row.changed
    assert driver.program.weights["layers.0.gate.weight"] is before.weights["layers.0.gate.weight"]
    small = Decoder(layer).eval()
    assert len(driver.program.graph.nodes) == len(capture(small, (IDS,)).graph.nodes)


def test_several_entries_and_no_data():
    program = capture(decoder(2), (IDS,))
    program = Program(program.weights, {"a": program.main, "b": program.main.clone()})
    row = Driver(program, Samples({"a": [[IDS]], "b": [[IDS]]}, {"a": [[IDS]]})).run(MergeBlocks(size=2))
    assert "every entry" in row.skips[0].why
    with pytest.raises(PassError, match="SPARC208"):
        Driver(capture(decoder(2), (IDS,)), Samples({"forward": [[IDS]]})).run(MergeBlocks(size=2))


@pytest.mark.parametrize("options", [{"size": 1}, {"interval": 0}, {"threshold": 1.5}, {"mode": "mean"}])
def test_bad_options(options):
    with pytest.raises(PassError, match="SPARC209"):
        MergeBlocks(**options)


def test_the_result_is_stored():
    assert_pass(MergeBlocks(size=2, threshold=-1.0), decoder(4), (IDS,))


@pytest.mark.parametrize("name", ["gpt2", "t5", "vit"])
def test_architectures(name):
    """Two layers become one in every stack, and the program runs."""
    built = ARCHITECTURES[name].build()
    program = capture(built.model, built.inputs, dynamic=built.dynamic)
    flat = program.main.signature.bind((), dict(built.inputs))
    driver = Driver(program, Samples({"forward": [flat]}, {"forward": [flat]}))
    driver.run(Canonicalize())
    row = driver.run(MergeBlocks(size=2, threshold=-1.0))
    assert row.changed
    assert row.bytes_after < row.bytes_before
