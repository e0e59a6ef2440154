"""Program text: stable, in the user's names, and equal for equal programs; golden texts of canonical programs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparc.capture import capture
from sparc.driver import Driver
from sparc.pass_base import PassContext, Samples
from sparc.passes.canonicalize import Canonicalize
from sparc.passes.clean import MergeCommon, RemoveDead, RemoveNoOps
from sparc.passes.constants import FoldConstants
from sparc.verify import relative_error
from tests.architectures import ARCHITECTURES

OPERATIONS = {
    "relu": lambda m, x: x.relu(),
    "one": lambda m, x: x * 1.0,
    "silu": lambda m, x: x * x.sigmoid(),
    "linear": lambda m, x: x @ m.w.t(),
    "bias": lambda m, x: x + m.b * 2,
    "norm": lambda m, x: x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt(),
    "turn": lambda m, x: x.transpose(0, 1).transpose(0, 1).contiguous(),
    "flat": lambda m, x: x.view(-1).reshape(x.shape),
    "twice": lambda m, x: x.tanh() + x.tanh(),
}
PASSES = (RemoveNoOps(), FoldConstants(), MergeCommon(), RemoveDead(), Canonicalize())


class Random(nn.Module):
    def __init__(self, chosen):
        super().__init__()
        self.chosen = chosen
        self.register_buffer("w", torch.randn(4, 4, generator=torch.Generator().manual_seed(1)))
        self.register_buffer("b", torch.randn(4, generator=torch.Generator().manual_seed(2)))

    def forward(self, x):
        for name in self.chosen:
            x = OPERATIONS[name](self, x)
        return x


@settings(max_examples=25)
@given(
    st.lists(st.sampled_from(sorted(OPERATIONS)), min_size=1, max_size=6),
    st.lists(st.sampled_from(PASSES), min_size=1, max_size=5),
)
def test_random_programs_through_random_passes_match_eager_and_print_stably(chosen, steps):
    model, x = Random(chosen), torch.randn(3, 4, generator=torch.Generator().manual_seed(3))
    program = capture(model, (x,))
    assert program.text() == capture(model, (x,)).text() == program.clone().text()
    driver = Driver(program, Samples({"forward": [[x]]}), verify="full")
    for step in steps:
        driver.run(step)
    assert relative_error(model(x), driver.program.run(x)) <= 1e-4
    assert driver.program.text() == driver.program.clone().text()


def test_history_does_not_show():
    x = torch.randn(3, 4)
    one, other = (capture(Random(["relu", "linear"]), (x,)) for _ in range(2))
    relu = next(node for node in other.graph.nodes if node.name == "relu")
    extra = other.main.call(torch.ops.aten.exp.default, relu, before=relu.next)
    other.main.graph.erase_node(extra)
    assert one.text() == other.text()


def test_sizes_carry_the_users_names():
    """Sharp edge: two inputs may get a symbol each for one length; the printer shows the user's one name."""
    model = Random(["relu"])
    text = capture(model, (torch.randn(3, 4),), dynamic={"x": {0: "rows"}}).text()
    assert "f32[rows, 4]" in text


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "convnext", pytest.param("t5", marks=pytest.mark.slow)])
def test_canonical_programs(name, golden):
    built = ARCHITECTURES[name].build()
    program = capture(built.model, dict(built.inputs), dynamic=built.dynamic)
    Canonicalize().run(program, PassContext())
    golden(f"canonical_{name}.txt", program.text())
