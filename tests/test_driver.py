"""The driver: the program before a pass is unharmed, guilty edits are found, contracts are kept."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from sparc.capture import capture
from sparc.contract import Bounded, Exact
from sparc.diag import PassError, VerifyError
from sparc.driver import Driver
from sparc.pass_base import Pass, Samples, Stage
from sparc.rewrite import rewrite


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x


@dataclass(frozen=True)
class Scale(Pass):
    """Multiplies every linear weight by one, and the one at `wrong` by something else."""

    wrong: int = -1
    factor: float = 1.1
    name: ClassVar[str] = "scale"
    stage: ClassVar[Stage] = Stage.FOLD

    @property
    def contract(self):
        return Exact()

    def run(self, program, context):
        weights = [name for name in program.weights if name.endswith("weight")]
        for index, name in enumerate(weights):
            if not context.edit():
                return
            factor = self.factor if index == self.wrong else 1.0
            program.set_weight(name, program.weights[name] * factor)


def driver(verify="sample"):
    x = torch.randn(3, 4)
    return Driver(capture(Chain(), (x,)), Samples({"forward": [[x]]}), verify=verify)


def test_a_good_pass_is_kept_and_recorded():
    drive = driver()
    row = drive.run(Scale())
    assert (row.matches, row.measured["end to end"]) == (5, 0.0)
    assert drive.ledger.passes == [row]


@pytest.mark.parametrize("wrong", [0, 2, 4])
def test_the_guilty_edit_is_found_by_bisection(wrong):
    drive = driver()
    before = drive.program
    with pytest.raises(VerifyError, match=f"edit {wrong + 1} of 5"):
        drive.run(Scale(wrong))
    assert drive.program is before
    assert drive.ledger.passes == []


def test_without_checks_only_types_count():
    assert driver("types").run(Scale(1)).changed


@dataclass(frozen=True)
class Broken(Pass):
    """Fails, or leaves something malformed."""

    how: str = "raise"
    name: ClassVar[str] = "broken"
    stage: ClassVar[Stage] = Stage.FOLD

    @property
    def contract(self):
        return Bounded(1e-4)

    def run(self, program, context):
        output = program.main.output
        last = output.args[0][0]
        if self.how == "raise":
            raise ZeroDivisionError("inside")
        if self.how == "type":
            output.args = ([program.main.call(torch.ops.aten.sum.default, last, before=output)],)
        if self.how == "order":
            program.main.placeholders[0].append(output.args[0][0])


@pytest.mark.parametrize(
    ("how", "error", "code"),
    [("raise", PassError, "SPARC207"), ("type", VerifyError, "SPARC304"), ("order", VerifyError, "SPARC304")],
)
def test_a_pass_that_fails_harms_nothing(how, error, code):
    drive = driver()
    text = drive.program.text()
    with pytest.raises(error) as caught:
        drive.run(Broken(how))
    assert caught.value.code == code
    assert drive.program.text() == text


class Viewed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x).view(-1)


@rewrite(lambda op, x, w, b: op.linear(x, w, b), contract=Bounded(1e-4))
def halve(m):
    """linear(x, W, b) => one half of linear(x, [W; W], [b; b]), which is not in one piece."""
    w, b = m.weight("w"), m.weight("b")
    if len(w) != 4:
        return None
    whole = m.op.linear(m.x, m.constant(torch.cat([w, w]), like="w"), m.constant(torch.cat([b, b]), like="b"))
    return m.op.getitem(m.op.split_with_sizes(whole, [4, 4], -1), 0)


def test_a_program_that_cannot_be_run_names_the_pass():
    x = torch.randn(3, 4)
    drive = Driver(capture(Viewed(), (x,)), Samples({"forward": [[x]]}))
    with pytest.raises(VerifyError, match="what pass 'halve' made cannot be run") as caught:
        drive.run(halve)
    assert caught.value.code == "SPARC301"
    assert drive.program.weights["layer.weight"].shape == (4, 4)


@dataclass(frozen=True)
class Watching(Pass):
    """Looks at every block, and notes what it holds when the next one is asked for."""

    name: ClassVar[str] = "watching"
    stage: ClassVar[Stage] = Stage.ROUND
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    held: ClassVar[list[bool]] = []

    @property
    def contract(self):
        return Exact()

    def watches(self, program, context):
        self.held.append(context.statistics is not None)
        return super().watches(program, context)

    def run(self, program, context):
        assert context.statistics is not None


def test_statistics_of_a_block_are_gone_before_those_of_the_next() -> None:
    layers = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)])
    samples = {"forward": [[torch.randn(2, 4)]]}
    Driver(capture(layers, (torch.randn(2, 4),)), Samples(held_out=samples, calibration=samples)).run(Watching())
    assert len(Watching.held) > 1
    assert not any(Watching.held)
