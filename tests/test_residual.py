"""Residual streams: who writes one, who reads it, and what freezes it."""

import pytest
import torch
from torch import nn

from sparc.analysis.residual import Stream, Streams
from sparc.capture import capture
from sparc.pass_base import PassContext
from sparc.passes.canonicalize import Canonicalize
from tests.architectures import ARCHITECTURES
from tests.passes.rotated import Decoder, example


def streams(module, inputs, **options):
    program = capture(module.eval(), inputs, **options)
    Canonicalize().run(program, PassContext())
    return program, Streams(program, program.graph)


def residual(module, inputs, **options):
    return [each for each in streams(module, inputs, **options)[1] if each.residual]


def test_the_stream_of_a_decoder():
    (found,) = residual(Decoder(), example(), dynamic={"ids": {1: "tokens"}})
    assert str(found) == "12 features, written by 1 constant, 1 embedding, 2 linear, read by 3 rms_norm"
    assert {
        str(node.args[1].target) for node in found.writers if node.op == "call_function" and "linear" in node.name
    } == {
        "block.o.weight",
        "block.down.weight",
    }
    assert found.sums == 3


def test_what_a_norm_makes_is_a_stream_of_its_own():
    program, found = streams(Decoder(), example())
    norm = next(node for node in program.graph.nodes if "rms_norm" in str(node.target))
    behind = found.of(norm)
    assert behind is not None
    assert behind.writers == [norm]
    assert [node.args[1].target for node in behind.readers] == ["block.q.weight", "block.k.weight", "block.v.weight"]
    assert not behind.frozen
    assert not behind.residual


class Patches(nn.Module):
    """A convolution writes channels first; tokens are joined with a class token, and pooled."""

    def __init__(self):
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)
        self.first, self.layer, self.head = nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1)
        x = x + self.layer(self.norm(x))
        return self.head(self.norm(x[:, 0]))


def test_features_are_followed_from_channels_to_tokens():
    (found,) = residual(Patches(), (torch.randn(2, 3, 8, 8),))
    assert str(found) == "8 features, written by 1 constant, 1 conv2d, 1 linear, read by 2 layer_norm"
    convolution = next(node for node in found.writers if "conv2d" in node.name)
    assert found.values[convolution] == -3
    assert {found.values[reader.args[0]] for reader in found.readers} == {-1}


FREEZES = {
    "it is read by relu": lambda m, x: x.relu(),
    "it is read by the program's output": lambda m, x: x,
    "it is read by mul": lambda m, x: m.head(x * x),
    "it is read by cat": lambda m, x: torch.cat([x, x], -1),
    "it is read by slice": lambda m, x: x[..., :4],
    "it is added to what gelu writes": lambda m, x: m.head(x + nn.functional.gelu(m.block.o(m.block.q(m.norm(x))))),
    "it is read by matmul": lambda m, x: x @ x.transpose(1, 2),
    "it is read by linear": lambda m, x: nn.functional.linear(m.norm(x)[0], x[0]),
}


@pytest.mark.parametrize("why", FREEZES)
def test_what_freezes_a_stream(why):
    (found,) = residual(Decoder(leak=FREEZES[why]), example())
    assert found.frozen == why
    assert str(found).endswith(f"frozen: {why}")


def test_the_first_reason_counts():
    stream = Stream(4)
    stream.freeze("a")
    stream.absorb(Stream(4, frozen="b"))
    assert stream.frozen == "a"


REAL = {
    "llama": ["32 features, written by 1 embedding, 4 linear, read by 5 rms_norm"],
    "gpt2": ["32 features, written by 2 embedding, 4 linear, read by 5 layer_norm"],
    "vit": ["32 features, written by 2 constant, 1 conv2d, 4 linear, read by 5 layer_norm"],
    "bert": [
        "32 features, written by 3 embedding, read by 1 layer_norm",
        "32 features, written by 1 layer_norm, 1 linear, read by 1 layer_norm, 3 linear",
        "32 features, written by 1 layer_norm, 1 linear, read by 1 layer_norm, 1 linear",
    ],
}


@pytest.mark.parametrize("name", REAL)
def test_streams_of_real_architectures(name):
    """Two layers each: an embedding, and two writers (attention and feed-forward) a layer."""
    built = ARCHITECTURES[name].build()
    found = residual(built.model, dict(built.inputs), dynamic=built.dynamic)
    assert list(dict.fromkeys(map(str, found))) == REAL[name]
