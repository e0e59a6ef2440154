"""Repeated blocks: how many there are in known architectures, what corresponds, and what belongs to a block."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparc.analysis.repeats import find_repeats, periodic
from sparc.capture import capture
from sparc.pass_base import PassContext
from sparc.passes.canonicalize import Canonicalize
from tests.architectures import ARCHITECTURES

THREE = {"num_hidden_layers": 3}
COUNTS = {
    "gpt2": (THREE, [3]),
    "llama": (THREE, [3]),
    "bert": (THREE, [3]),
    "albert": (THREE, [3]),
    "mixtral": (THREE, [3]),
    "vit": (THREE, [3]),
    "mamba": (THREE, [3]),
    "t5": ({"num_layers": 3, "num_decoder_layers": 2}, [3, 2]),
    "bart": ({"decoder_layers": 3}, [2, 3]),
    "gemma2": ({"num_hidden_layers": 6}, [3]),  # a local and a global layer make one block
    "resnet": ({"depths": [3, 4]}, [2, 3]),  # the first block of a stage has another shape
    "mobilenet_v2": ({}, [2, 3, 2, 2]),
    "mobilevit": ({}, [2, 2, 4, 3]),  # transformers inside a skip connection
    "clip": ({}, [2, 2]),
    "convnext": ({}, []),  # one block a stage
}


def captured(name, options):
    architecture = ARCHITECTURES[name]
    built = replace(architecture, options={**architecture.options, **options}).build()
    program = capture(built.model, built.inputs, dynamic=built.dynamic)
    Canonicalize().run(program, PassContext())
    program.sweep()
    return program


def check(repeats):
    """The laws of every answer."""
    for found in repeats:
        first = found.repetitions[0]
        for a, b in zip(found.repetitions, found.repetitions[1:], strict=False):
            assert a.result is b.carried
            assert not set(a.nodes) & set(b.nodes)
        for each in found:
            assert each.nodes[-1] is each.result
            assert [node.target for node in each.nodes] == [node.target for node in first.nodes]
            read = {used for node in each.nodes for used in node.all_input_nodes if used.op != "get_attr"}
            assert read - set(each.nodes) == {each.carried, *found.invariants}


@pytest.mark.parametrize("name", COUNTS)
def test_blocks_of_an_architecture(name):
    options, counts = COUNTS[name]
    program = captured(name, options)
    repeats = find_repeats(program.graph)
    assert [len(found) for found in repeats] == counts
    check(repeats)
    for found in repeats:
        for names in zip(*(each.weights for each in found), strict=True):
            assert len({program.weights[weight].shape for weight in names}) == 1
            numbers = {tuple(part for part in weight.split(".") if not part.isdigit()) for weight in names}
            assert len(numbers) == 1, "the same role has the same name in every layer, but for the layer's number"
    assert [bool(found.shared) for found in repeats] == [name == "albert"] * len(counts)


def test_names_are_not_needed():
    program = captured("gpt2", THREE)
    for node in program.graph.nodes:
        node.meta = {"val": node.meta.get("val")}
    assert [len(found) for found in find_repeats(program.graph)] == [3]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.context = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(4, 16)

    def forward(self, x, context, scale):
        return x + self.down(torch.relu(self.up(x) * scale) * self.context(context))


class Stack(nn.Module):
    """Blocks that read a context, each through a matrix of its own, and a scale that all share."""

    def __init__(self, *blocks, start=False, states=False):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.stem, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.start, self.states = start, states

    def forward(self, x, context):
        x = first = torch.tanh(self.stem(x))
        scale, states = torch.sigmoid(context.mean()), []
        for block in self.blocks:
            x = block(x + first if self.start else x, context, scale)
            states.append(torch.tanh(x))
        return (self.head(x), *states) if self.states else self.head(x)


def stack_repeats(*blocks, **options):
    program = capture(Stack(*blocks, **options).eval(), (torch.randn(2, 8), torch.randn(2, 4)))
    repeats = find_repeats(program.graph)
    check(repeats)
    return repeats


def test_a_block_owns_what_only_it_reads():
    (found,) = stack_repeats(Block(), Block(), Block())
    assert len(found) == 3
    for index, each in enumerate(found):
        assert f"blocks.{index}.context.weight" in each.weights
    scale, context = sorted(found.invariants, key=lambda node: node.op)
    assert context.op == "placeholder"
    assert scale.target is torch.ops.aten.sigmoid.default
    assert found.escape is None


def test_a_deep_model_is_one_block():
    (found,) = stack_repeats(*[Block() for _ in range(30)])
    assert len(found) == 30
    assert len({len(each.nodes) for each in found}) == 1


def test_other_blocks_do_not_count():
    class Other(Block):
        def forward(self, x, context, scale):
            return x - self.down(torch.relu(self.up(x) * scale) * self.context(context))

    assert [len(found) for found in stack_repeats(Block(), Block(), Other(), Other(), Other())] == [2, 3]
    assert [len(found) for found in stack_repeats(Block(), Other(), Block(), Other())] == [2]
    assert stack_repeats(Block(), Other()) == []


class Alternating(Stack):
    """Every third block reads another scale."""

    def forward(self, x, context):
        scales = torch.sigmoid(context.mean()), torch.sigmoid(context.sum())
        for index, block in enumerate(self.blocks):
            x = block(x, context, scales[index % 3 == 2])
        return self.head(x)


def test_blocks_that_take_turns_are_one_block():
    program = capture(Alternating(*[Block() for _ in range(10)]).eval(), (torch.randn(2, 8), torch.randn(2, 4)))
    (found,) = find_repeats(program.graph)
    check([found])
    assert len(found) == 3
    weights = found.repetitions[1].weights
    assert {f"blocks.{index}.up.weight" for index in (4, 5, 6)} < set(weights)


def test_neighbours_with_the_same_weights_are_shared():
    a, b = Block(), Block()
    (found,) = stack_repeats(a, a, a, b, b, Block())
    assert [len(shared) for shared in found.shared] == [3, 2]
    assert found.shared[1].repetitions[0].weights == found.repetitions[3].weights


def test_a_value_that_the_model_returns_escapes():
    assert stack_repeats(Block(), Block())[0].escape is None
    (found,) = stack_repeats(Block(), Block(), states=True)
    assert found.escape is found.repetitions[0].result


def test_the_start_may_be_read_by_every_block():
    (found,) = stack_repeats(Block(), Block(), Block(), Block(), start=True)
    assert len(found) == 3  # the first block is left out: the value it starts from is the invariant of the others
    assert torch.ops.aten.tanh.default in {node.target for node in found.invariants}


@given(st.lists(st.integers(0, 2), max_size=12))
def test_periodic_stretches_are_maximal(sequence):
    found = {(each.start, each.stop, each.period) for each in periodic(sequence)}
    expected = set()
    for period in range(1, len(sequence)):
        for start in range(len(sequence)):
            for stop in range(start + 2 * period, len(sequence) + 1):
                stretch = sequence[start:stop]
                if stretch[period:] == stretch[:-period]:
                    expected.add((start, stop, period))
    widest = {(a, b, p) for a, b, p in expected if not any((c, d, p) in expected for c, d in ((a - 1, b), (a, b + 1)))}
    assert found == widest
