"""Programs: clones, weights, several entries over one store, running without a trace."""

import pytest
import torch
from torch import nn

from sparc.capture import capture, capture_entries
from sparc.driver import Driver
from sparc.encoding.grid import Grid
from sparc.encoding.int_grid import IntGrid
from sparc.pass_base import Samples
from sparc.passes.canonicalize import Canonicalize


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 4)
        self.register_buffer("offset", torch.ones(4))

    def forward(self, x):
        return self.second(self.first(x).relu()) + self.offset


@pytest.fixture
def program():
    return capture(Small(), (torch.randn(3, 4),))


def test_a_clone_shares_tensors_and_nothing_else(program):
    """Sharp edge: deepcopy of an exported program copies weights."""
    clone = program.clone()
    assert all(clone.weights[name] is program.weights[name] for name in program.weights)
    before = program.text()
    clone.set_weight("first.weight", torch.zeros(6, 4))
    clone.main.graph.erase_node(clone.main.output)
    assert program.text() == before
    assert bool(program.weights["first.weight"].any())


def test_a_clone_keeps_node_names_after_edits(program):
    node = next(node for node in program.graph.nodes if node.name == "relu")
    program.main.call(torch.ops.aten.relu.default, node, before=node.next)
    names = [each.name for each in program.graph.nodes]
    assert [each.name for each in program.clone().graph.nodes] == names


def test_names_cannot_go_stale(program):
    """Sharp edge: signature names are strings. Here inputs and outputs are read by position, so renaming changes
    nothing.
    """
    x = torch.randn(3, 4)
    expected = program.run(x)
    program.main.placeholders[0]._rename("something_else")
    program.rename_weight("first.weight", "renamed")
    assert torch.equal(program.run(x), expected)
    assert torch.equal(program.clone().run(x=x), expected)


def test_types_are_inferred_when_a_node_is_inserted(program):
    """Sharp edge: stale types pass torch's own validation. Inserting infers, and a new shape re-types the weight's
    nodes.
    """
    relu = next(node for node in program.graph.nodes if node.name == "relu")
    new = program.main.call(torch.ops.aten.sum.dim_IntList, relu, [0], before=relu.next)
    assert tuple(new.meta["val"].shape) == (6,)
    program.set_weight("offset", torch.ones(2, 4))
    (weight,) = [node for node in program.graph.nodes if node.target == "offset"]
    assert tuple(weight.meta["val"].shape) == (2, 4)


def test_a_new_weight_never_lies_under_another(program):
    """Sharp edge: a part may not be named under an existing parameter."""
    like = next(node for node in program.graph.nodes if node.target == "first.weight")
    names = [
        program.add_weight("first", torch.ones(1), like).target,
        program.add_weight("first.weight", torch.ones(1), like).target,
    ]
    assert names == ["first_1", "first.weight_1"]
    assert set(dict(program.module().named_buffers())) == set(program.weights)


def test_writing_a_weight_drops_its_grid(program):
    spec = IntGrid(bits=8)
    grid = spec.fit(program.weights["first.weight"])
    assert isinstance(grid, Grid)
    program.set_weight("first.weight", program.weights["first.weight"], grid)
    assert program.grid("first.weight") is grid
    program.set_weight("first.weight", program.weights["first.weight"])
    assert program.grid("first.weight") is None


def test_running_changes_nothing(program):
    """Running a module of an exported program can change shared buffers; programs are pure."""
    before = {name: tensor.clone() for name, tensor in program.weights.items()}
    program.run(torch.randn(3, 4))
    module = program.module(train=True)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert all(torch.equal(program.weights[name], tensor) for name, tensor in before.items())


def test_the_module_trains_under_the_users_names(program):
    """Sharp edge: parameters must stay parameters."""
    module = program.module(train=True)
    assert {"first.weight", "first.bias", "second.weight", "second.bias"} <= set(dict(module.named_parameters()))
    module(torch.randn(3, 4)).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_sweep_removes_dead_nodes_and_unread_weights(program):
    node = next(node for node in program.graph.nodes if node.op == "call_function")
    program.main.call(torch.ops.aten.exp.default, node, before=node.next)
    program.add_weight("unread", torch.ones(3), node)
    program.sweep()
    assert "unread" not in program.weights
    assert not any("exp" in str(node.target) for node in program.graph.nodes)


# several entries -----------------------------------------------------------------------------------------------------
class Decoder(nn.Module):
    """One attention layer with a flat cache: keys and values are inputs, and their extensions outputs."""

    def __init__(self, width=8, vocabulary=11):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids, keys=None, values=None):
        x = self.embed(ids)
        q, k, v = self.q(x), self.k(x), self.v(x)
        if keys is not None:
            k, v = torch.cat([keys, k], 1), torch.cat([values, v], 1)
        scores = q @ k.transpose(1, 2) / 8**0.5
        position = torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None]
        scores = scores.masked_fill(torch.arange(k.shape[1])[None] > position, float("-inf"))
        return self.head(torch.softmax(scores, -1) @ v), k, v


@pytest.mark.parametrize("canonical", [False, True])
def test_prefill_and_decode_share_weights_and_equal_eager_step_by_step(canonical):
    torch.manual_seed(0)
    model = Decoder().eval()
    ids, cache = torch.randint(0, 11, (2, 5)), torch.randn(2, 5, 8)
    entries = {
        "prefill": {"example_inputs": {"ids": ids}, "dynamic": {"ids": {0: "batch", 1: "seq"}}},
        "decode": {
            "example_inputs": {"ids": ids[:, :1], "keys": cache, "values": cache.clone()},
            "dynamic": {name: {0: "batch", 1: "past"} for name in ("keys", "values")} | {"ids": {0: "batch"}},
        },
    }
    program = capture_entries(model, entries)
    if canonical:
        inputs = {"prefill": [[ids]], "decode": [[ids[:, :1], cache, cache.clone()]]}
        driver = Driver(program, Samples(inputs), verify="full")
        driver.run(Canonicalize())
        program = driver.program
        assert any("scaled_dot" in str(node.target) for node in program.entries["decode"].graph.nodes)
    assert sum(tensor.shape == (11, 8) for tensor in program.weights.values()) == 1
    prompt = torch.randint(0, 11, (3, 4))
    logits, keys, values = program.run(prompt, entry="prefill")
    text = prompt
    for _ in range(3):
        torch.testing.assert_close(logits[:, -1], model(text)[0][:, -1], rtol=1e-4, atol=1e-5)
        chosen = logits[:, -1:].argmax(-1)
        text = torch.cat([text, chosen], 1)
        logits, keys, values = program.run(chosen, keys, values, entry="decode")
