"""Evidence: figures of sites and outputs when a program has several entries."""

import pytest
import torch
from torch import Tensor, nn

from sparc import evidence
from sparc.capture import capture_entries
from sparc.codegen.reference import ReferenceEmission
from sparc.pass_base import Samples
from sparc.program import Program


class Two(nn.Module):
    """Each branch is a product of its own weight; both are called `linear` in their graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor, second: bool) -> Tensor:
        return self.b(x) if second else self.a(x)


def two_entries() -> tuple[Program, Samples]:
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    entries = {name: {"example_inputs": (x, name == "two")} for name in ("one", "two")}
    return capture_entries(Two().eval(), entries), Samples({"one": [[x]], "two": [[x]]})


def with_noise(program: Program, name: str, share: float) -> Program:
    changed = program.clone()
    changed.set_weight(name, changed.weights[name] * (1 + share))
    return changed


def test_sites_of_two_entries_have_figures_of_their_own() -> None:
    program, samples = two_entries()
    changed = with_noise(with_noise(program, "a.weight", 0.1), "b.weight", 0.001)
    rows = evidence.site_rows(program, changed, ReferenceEmission(changed), samples, {})
    found = {row.weight: row.snr_db for row in rows}
    assert found == pytest.approx({"a.weight": 20, "b.weight": 60}, abs=0.01)


def test_outputs_are_named_by_their_entry() -> None:
    program, samples = two_entries()
    changed = with_noise(program, "b.weight", 0.1)
    summary = evidence.summarize(program, changed, ReferenceEmission(changed), samples, "reference", 128)
    assert summary.errors.keys() == {"one: output", "two: output"}
    assert summary.errors["one: output"]["relative error"] == 0
    assert abs(summary.errors["two: output"]["relative error"] - 0.1) < 1e-6
