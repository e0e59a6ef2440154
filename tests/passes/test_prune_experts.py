"""Experts of a mixture: what stays without one, how many must, and when their numbers mean something else."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from sparc.analysis.dependency import groups
from sparc.capture import capture
from sparc.diag import PassError
from sparc.driver import Driver
from sparc.pass_base import Samples
from sparc.passes.canonicalize import Canonicalize
from sparc.passes.coalesce.units import obstacle
from sparc.passes.cut import cut
from sparc.passes.cut.importance import activation
from sparc.passes.cut.prune_units import PruneUnits
from sparc.program import Program
from sparc.verify import relative_error
from tests.mixtures import EXPERTS, WIDTH, Clamped, Routed
from tests.passes.pruned import architecture

X = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(5))


def routed(model: torch.nn.Module) -> Program:
    program = capture(model.eval(), (X,), dynamic={"x": {0: "tokens"}})
    driver = Driver(program, Samples({"forward": [[X]]}, {"forward": [[X]]}))
    driver.run(Canonicalize())
    return driver.program


def experts(program: Program) -> list[Any]:
    return [group for group in groups(program) if group.kind == "expert"]


def without(program: Program, inputs: list[Tensor], expert: int) -> list[Any]:
    """What a program computes whose routers never choose an expert."""

    def forbid(node: fx.Node, value: Any, _: Any) -> Any:
        if any(str(user.target).startswith("aten.softmax") for user in node.users) and value.shape[-1] == EXPERTS:
            return value.index_fill(-1, torch.tensor([expert]), -torch.inf)
        return None

    return program.run_flat(inputs, wide=True, watch=forbid)


@pytest.mark.parametrize("model", [Routed, Clamped])
def test_what_is_left_never_chooses_the_removed_one(model: Any) -> None:
    program = routed(model())
    (group,) = experts(program)
    names = {member.weight for member in group.members}
    assert names == {"router", "up", "down", *(("up_bias", "down_bias") if model is Clamped else ())}
    expected = without(program, [X], 1)[0]
    cut(program, group, [0, 2, 3])
    assert {program.weights[name].shape[0] for name in names} == {3}
    assert relative_error(expected, program.run_flat([X], wide=True)[0]) < 1e-12
    few = X[:3]
    assert program.run_flat([few])[0].shape == few.shape


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "olmoe"])
def test_the_mixtures_of_transformers(name: str) -> None:
    driver = architecture(name)
    count = len(experts(driver.program))
    assert driver.run(PruneUnits(kinds=("expert",), keep=0.75)).matches == count > 0
    assert {group.units for group in experts(driver.program)} == {3}


def test_more_must_stay_than_a_token_goes_to() -> None:
    program = routed(Routed())
    (group,) = experts(program)
    assert group.least == 3
    assert obstacle(group)
    with pytest.raises(PassError, match="each token goes to 2 of them"):
        cut(program, group, [0, 1])
    driver = Driver(program, Samples({"forward": [[X]]}, {"forward": [[X]]}))
    driver.run(PruneUnits(kinds=("expert",), keep=0.1))
    assert experts(driver.program)[0].units == 3


def test_experts_are_ranked_by_the_rows_they_get() -> None:
    model = Routed()
    program = routed(model)
    chosen = torch.topk(F.linear(X, model.router), 2)[1]
    counts = torch.bincount(chosen.flatten(), minlength=EXPERTS).double()
    (group,) = experts(program)

    def statistics(node: fx.Node, kind: str) -> Tensor:
        values: list[Tensor] = []
        program.run_flat([X], watch=lambda each, value, _: values.append(value) if each is node else None)
        assert kind == "moments"
        return torch.stack([values[0].double(), values[0].double().square()])

    assert torch.equal(activation(program, group, statistics), counts)  # type: ignore[arg-type]


@pytest.mark.parametrize("twist", ["return", "repeated"])
def test_numbers_that_are_only_looked_up_do_not_matter_others_do(twist: str) -> None:
    """Where rows go back is no matter of experts; two experts that are one by division are."""
    assert bool(experts(routed(Routed(twist)))) == (twist == "return")


class Told(Routed):
    """It also returns which experts were chosen."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), torch.topk(F.linear(x, self.router).softmax(-1), 2)[1]


def test_numbers_that_leave_the_program_stay() -> None:
    program = routed(Told())
    assert not any(not group.frozen for group in experts(program))
