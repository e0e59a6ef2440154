"""Products of runs of rows with stacked matrices: raised to one operator, whose weight is a site."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sparc
from sparc.analysis.dependency import groups
from sparc.analysis.sites import find_sites
from sparc.calibration import Calibration
from sparc.capture import capture
from sparc.driver import Driver
from sparc.pass_base import PassContext, Samples
from sparc.passes.canonicalize.grouped import raise_grouped
from sparc.passes.round import Round
from sparc.passes.round.importance import column_importance
from sparc.testing import assert_mutants_caught, assert_pass
from tests.architectures import ARCHITECTURES
from tests.mixtures import DYNAMIC, EXPERTS, INNER, ROUTES, WIDTH, Mixture, inputs

ROUTE = "an expert without tokens"
FAMILIES = ("mixtral", pytest.param("qwen3_moe", marks=pytest.mark.slow))


@pytest.mark.parametrize("spelling", ["grouped_mm", "stored"])
def test_a_grouped_product_is_raised(spelling: str) -> None:
    program, _ = assert_pass(raise_grouped, Mixture(spelling), inputs(ROUTE), dynamic=DYNAMIC)
    assert [str(node.target) for node in program.graph.nodes].count("sparc.grouped_linear.default") == 2
    assert program.weights["up"].shape == (EXPERTS, 2 * INNER, WIDTH)
    assert torch.equal(program.weights["up"], Mixture().up)


def test_wrong_twins_are_caught() -> None:
    caught = assert_mutants_caught(raise_grouped, Mixture("grouped_mm"), inputs(ROUTE))
    assert {"FlippedSign", "ScaledResult"} <= set(caught)


class Batches(nn.Module):
    """Pairs of matrices: no runs of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(EXPERTS, 16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch._grouped_mm(x, self.w)


def test_pairs_of_matrices_are_left_alone_with_a_reason() -> None:
    program, context = capture(Batches().bfloat16(), (torch.randn(EXPERTS, 4, 16).bfloat16(),)), PassContext()
    raise_grouped.run(program, context)
    assert "_grouped_mm" in program.text()
    assert [row.why for row in context.skips] == ["it has a bias, a result of another type, or more than runs of rows"]


@pytest.mark.parametrize("name", FAMILIES)
def test_experts_of_transformers_are_sites(name: str) -> None:
    built = ARCHITECTURES[name].build()
    artifact = sparc.compile(
        built.model, built.inputs, dynamic=built.dynamic, recipe="w8", target="reference", measure=False
    )
    rows = {row.weight: row for row in artifact.ledger.sites if row.operator == "grouped"}
    assert len(rows) == 4
    for name, row in rows.items():
        dense = built.model.get_parameter(name)
        assert (row.encoding, row.kernel) == ("IntGrid(bits=8)", "sparc::decode")
        assert row.resident_bytes == dense.numel() + 4 * dense.shape[0] * dense.shape[1]
        assert row.dense_bytes == 4 * dense.numel()


def test_half_precision_is_raised_too() -> None:
    x, experts = inputs(ROUTE)
    program, _ = assert_pass(raise_grouped, Mixture("grouped_mm").bfloat16(), (x.bfloat16(), experts), dynamic=DYNAMIC)
    assert "_grouped_mm" not in program.text()


def test_the_text_of_a_block_of_experts(golden: Callable[[str, str], None]) -> None:
    built = ARCHITECTURES["mixtral"].build()
    artifact = sparc.compile(
        built.model, built.inputs, dynamic=built.dynamic, recipe="dense", target="reference", measure=False
    )
    lines = artifact.program.text().splitlines()
    first = lines.index("  # model.layers.0.mlp")
    golden("grouped.txt", "\n".join(lines[first : lines.index("  # model.layers.1.input_layernorm")]) + "\n")


# other passes ---------------------------------------------------------------------------------------------------------
def test_units_of_experts_are_removable_and_experts_are_not() -> None:
    program = capture(Mixture(), inputs(ROUTE), dynamic=DYNAMIC)
    neurons = [group for group in groups(program) if ("down", 2) in {(m.weight, m.axis) for m in group.members}]
    assert [(group.units, str(group.frozen)) for group in neurons] == [(INNER, "")]
    (experts,) = (group for group in groups(program) if ("down", 0) in {(m.weight, m.axis) for m in group.members})
    assert "which expert is used depends on data" in experts.frozen


def test_importance_is_that_of_the_rows_an_expert_got() -> None:
    x, experts = inputs(ROUTE)
    x = x * torch.arange(1.0, len(x) + 1)[:, None]
    program = capture(Mixture(), (x, experts), dynamic=DYNAMIC)
    driver = Driver(program, Samples({"forward": [[x, experts]]}, {"forward": [[x, experts]] * 2}))
    calibration, context = Calibration(driver.program, driver.samples.calibration), PassContext()
    context.statistics = calibration.gather(0, Round(importance="data").watches(driver.program, context))
    site = next(site for site in find_sites(driver.program)[0] if site.weight == "up")
    found = column_importance(driver.program, site, context)
    assert found is not None
    for expert in range(EXPERTS):
        own = x[experts == expert] if expert in ROUTES[ROUTE] else x
        expected = own.square().mean(0).expand(2 * INNER, -1)
        assert torch.allclose(found[expert], expected, rtol=1e-5)
