"""Fewer steps through shared blocks: the linear flow, every kind of branch, and every reason to leave one alone."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from sparc.capture import capture
from sparc.diag import PassError
from sparc.driver import Driver
from sparc.encoding.int_grid import IntGrid
from sparc.pass_base import PassContext, Samples
from sparc.passes.canonicalize import Canonicalize
from sparc.passes.clean import RemoveNoOps
from sparc.passes.encode import Encode
from sparc.passes.round import Round
from sparc.passes.share_steps import ShareSteps
from sparc.testing import assert_pass
from sparc.verify import relative_error
from tests.architectures import ARCHITECTURES


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


class Steps(nn.Module):
    """A block applied several times, between a stem and a head."""

    def __init__(self, *blocks, states=False):
        super().__init__()
        self.stem, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList(blocks)
        self.states = states

    def forward(self, x):
        x, states = self.stem(x), []
        for block in self.blocks:
            x = block(x)
            states.append(x)
        return (self.head(x), *states) if self.states else self.head(x)


class Euler(nn.Module):
    """x + A x + b."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return x + self.layer(x)


class Parallel(nn.Module):
    """Two branches of one norm, added in one tree."""

    def __init__(self):
        super().__init__()
        self.norm, self.a, self.b, self.c = (
            nn.LayerNorm(6),
            nn.Linear(6, 6),
            nn.Linear(6, 9),
            nn.Linear(9, 6, bias=False),
        )

    def forward(self, x, factors=(1.0, 1.0)):
        y = self.norm(x)
        return x + (factors[0] * self.a(y) + factors[1] * self.c(torch.relu(self.b(y))))


class PostNorm(Parallel):
    """The norm stands behind the addition."""

    def forward(self, x, factor=1.0):
        return self.norm(x + factor * self.c(torch.relu(self.b(x))))


class NormedBranch(Parallel):
    """The branch ends with a norm, whose gain takes the factor."""

    def forward(self, x, factor=1.0):
        return x + factor * self.norm(self.c(torch.relu(self.b(x))))


def run(model, steps, x, *before):
    program = capture(model.eval(), (x,))
    driver = Driver(program, Samples({"forward": [[x]]}))
    for step in (RemoveNoOps(), *before):
        driver.run(step)
    return driver.program, driver.run(ShareSteps(steps)), driver


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_a_linear_flow(steps):
    torch.manual_seed(0)
    block, x = Euler().double(), torch.randn(4, 6, dtype=torch.float64)
    model = Steps(*[block] * 6).double()
    _, row, driver = run(model, steps, x)
    h = model.stem(x)
    power = torch.linalg.matrix_power(torch.eye(6).double() + 6 / steps * block.layer.weight, steps)
    shifts = sum(
        torch.linalg.matrix_power(torch.eye(6).double() + 6 / steps * block.layer.weight, k) for k in range(steps)
    )
    expected = model.head(h @ power.T + 6 / steps * (shifts @ block.layer.bias))
    assert relative_error(expected, driver.program.run(x)) < 1e-12
    assert row.bytes_after == row.bytes_before


def test_all_steps_change_nothing():
    x = torch.randn(4, 6)
    before, row, driver = run(Steps(*[Euler()] * 4), 4, x)
    assert not row.changed
    assert driver.program.text() == before.text()
    assert torch.equal(driver.program.run(x), before.run(x))
    assert not run(Steps(*[Euler()] * 4), 7, x)[1].changed


@pytest.mark.parametrize(("kind", "factor"), [(Parallel, (1.5, 1.5)), (PostNorm, 1.5), (NormedBranch, 1.5)])
def test_every_branch_takes_the_factor(kind, factor):
    torch.manual_seed(1)
    block, x = kind().double(), torch.randn(4, 6, dtype=torch.float64)
    model = Steps(*[block] * 3).double()
    driver = run(model, 2, x)[2]
    h = model.stem(x)
    for _ in range(2):
        h = block(h, factor)
    assert relative_error(model.head(h), driver.program.run(x)) < 1e-12


def test_more_steps_come_closer():
    torch.manual_seed(2)
    block, x = PostNorm(), torch.randn(32, 6)
    block.c.weight.mul_(0.3)
    model = Steps(*[block] * 12)
    exact = model(x)
    errors = [relative_error(exact, run(model, steps, x)[2].program.run(x)) for steps in (2, 4, 6, 12)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0


def test_the_text_of_a_shared_model(golden):
    program, _, driver = run(Steps(*[Parallel()] * 4), 2, torch.randn(4, 6))
    golden("share_steps.txt", f"{program.text()}\n{driver.program.text()}")


def test_the_result_is_stored_and_takes_other_sizes():
    assert_pass(ShareSteps(2), Steps(*[Euler()] * 3).eval(), (torch.randn(4, 6),), dynamic={"x": {0: "batch"}})


def test_groups_of_layers_are_shared_apart():
    torch.manual_seed(3)
    a, b, x = PostNorm().double(), PostNorm().double(), torch.randn(4, 6, dtype=torch.float64)
    model = Steps(a, a, a, a, b, b).double()
    driver = run(model, 1, x)[2]
    expected = model.head(b(a(model.stem(x), 4.0), 2.0))
    assert relative_error(expected, driver.program.run(x)) < 1e-12


def test_a_weight_that_others_read_gets_a_copy():
    torch.manual_seed(4)

    class Read(Steps):
        def forward(self, x):
            return super().forward(x) + self.blocks[0].layer.weight.sum()

    model, x = Read(*[Euler()] * 4), torch.randn(4, 6)
    program, row, driver = run(model, 2, x)
    name = "blocks.0.layer.weight"
    assert torch.equal(driver.program.weights[name], program.weights[name])
    assert torch.equal(driver.program.weights[f"{name}_step"], 2 * program.weights[name])
    assert row.bytes_after == row.bytes_before + program.weights[name].nbytes


class Gated(PostNorm):
    def forward(self, x):
        return x + torch.tanh(self.c(torch.relu(self.b(x))))


class NoResidual(PostNorm):
    def forward(self, x):
        return self.norm(self.c(torch.relu(self.b(x))))


class Twice(PostNorm):
    def forward(self, x):
        y = self.c(torch.relu(self.b(x)))
        return self.norm(x + y) * y


class OnlyNorm(PostNorm):
    def forward(self, x):
        return self.norm(x)


class TwiceRead(PostNorm):
    def forward(self, x):
        y = self.c(torch.relu(self.b(x)))
        return self.norm(x + y + self.a(y))


class Computed(PostNorm):
    def forward(self, x):
        return x + nn.functional.linear(torch.relu(self.a(x)), self.a.weight * 2)


SKIPS = {
    "own weights": (Steps(Euler(), Euler()), "weights of their own"),
    "ends with tanh": (Steps(*[Gated()] * 3), "ends with tanh"),
    "no residual": (Steps(*[NoResidual()] * 3), "its linear is no residual step"),
    "product": (Steps(*[Twice()] * 3), "its mul.Tensor is no residual step"),
    "norms": (Steps(*[OnlyNorm()] * 3), "no residual branch"),
    "read elsewhere": (Steps(*[TwiceRead()] * 3), "also read elsewhere"),
    "computed": (Steps(*[Computed()] * 3), "is computed"),
    "states": (Steps(*[Euler()] * 3, states=True), "is also read outside"),
}


@pytest.mark.parametrize("case", SKIPS)
def test_what_is_left_alone(case):
    model, why = SKIPS[case]
    _, row, _ = run(model, 1, torch.randn(4, 6))
    assert not row.changed
    assert any(why in skip.why for skip in row.skips), row.skips


def test_encoded_weights_are_left_alone():
    _, row, _ = run(Steps(*[Euler()] * 3), 1, torch.randn(4, 6), Round(IntGrid(bits=8)), Encode())
    assert not row.changed
    assert "encoded already" in row.skips[0].why


def test_steps_must_be_positive():
    with pytest.raises(PassError, match="SPARC209"):
        ShareSteps(0)


def test_albert_takes_larger_steps():
    architecture = ARCHITECTURES["albert"]
    built = replace(architecture, options={**architecture.options, "num_hidden_layers": 4}).build()
    program = capture(built.model, built.inputs, dynamic=built.dynamic)
    Canonicalize().run(program, PassContext())
    flat = program.main.signature.bind((), dict(built.inputs))
    driver = Driver(program, Samples({"forward": [flat]}))
    row = driver.run(ShareSteps(2))
    assert row.changed
    attention, ffn = (
        f"encoder.albert_layer_groups.0.albert_layers.0.{end}" for end in ("attention.dense", "ffn_output")
    )
    for name, parameter in built.model.named_parameters():
        if name.startswith((attention, ffn)):
            parameter.mul_(2)
    built.model.encoder.config.num_hidden_layers = 2
    expected = built.model(**built.inputs).last_hidden_state
    assert relative_error(expected, driver.program.run(**built.inputs).last_hidden_state) < 1e-5
