"""Structural pruning: what is left computes what zeros compute, is smaller everywhere, and is chosen as asked."""

from itertools import pairwise

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sparc
from sparc.analysis.dependency import groups
from sparc.api import registry
from sparc.diag import PassError
from sparc.encoding.int_grid import IntGrid
from sparc.passes.coalesce import MergeNeurons
from sparc.passes.cut import mask, refit
from sparc.passes.cut.blocks import DropBlocks
from sparc.passes.cut.prune_units import PruneUnits
from sparc.passes.cut.refit import DAMPING, refitted
from sparc.passes.cut.select import choose, kept_count, rivals
from sparc.passes.encode import Encode
from sparc.passes.recipes import prepare
from sparc.passes.round import Round
from sparc.recipe import Recipe, Step, resolve_recipe
from sparc.verify import relative_error
from tests.passes.level_models import IDS, Layer
from tests.passes.level_models import Decoder as Repeated
from tests.passes.pruned import Gated, after, architecture, gated, group_of, images, prepared

HALF = PruneUnits(keep=0.5, multiple=1)


def skipped(driver) -> str:
    return "; ".join(f"{skip.where}: {skip.why}" for skip in driver.ledger.passes[-1].skips)


def by_norm(program, kinds):
    """The better half of each group's units, by a plain sum of squares over matrices and gains."""
    found = {}
    for group in groups(program):
        if group.kind not in kinds or group.frozen or group.statistic or group.units < 2:
            continue
        members = [m for m in group.members if program.weights[m.weight].ndim > 1 or m.weight.endswith("weight")]
        totals = []
        for unit in range(group.units):
            parts = [program.weights[m.weight].index_select(m.axis, m.index[unit]).double() for m in members]
            totals.append(sum(float(part.square().sum()) for part in parts))
        order = sorted(range(group.units), key=lambda unit: -totals[unit])
        found[group] = sorted(order[: round(group.units / 2)])
    left = rivals(found)
    return {group: units for group, units in found.items() if group not in left}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "efficientnet", "gemma2", "mobilenet_v2")]


@pytest.mark.parametrize("name", ["gated", "images", "llama", *SLOW])
def test_what_is_left_computes_what_zeros_compute(name):
    driver = {"gated": gated, "images": images}[name]()[1] if name in ("gated", "images") else architecture(name)
    masked = driver.program.clone()
    kept = by_norm(masked, HALF.kinds)
    assert kept
    for group, units in kept.items():
        mask(masked, group, units)
    (flat,) = driver.samples.held_out["forward"]
    program = after(driver, HALF)
    assert driver.ledger.passes[-1].matches == len(kept)
    assert relative_error(masked.run_flat(flat, wide=True)[0], program.run_flat(flat, wide=True)[0]) < 1e-9
    assert relative_error(masked.run_flat(flat)[0], program.run_flat(flat)[0]) < 1e-6


def test_every_coupled_weight_is_smaller():
    program = after(images()[1], HALF)
    shapes = {name: tuple(tensor.shape) for name, tensor in program.weights.items() if "num_batches" not in name}
    assert shapes["first.weight"] == (4, 3, 3, 3)
    assert shapes["norm.running_var"] == (4,)
    assert shapes["inner.weight"] == (6, 4, 1, 1)
    assert shapes["deep.weight"] == (6, 1, 3, 3)
    assert shapes["squeeze.weight"] == (2, 6, 1, 1)
    assert shapes["excite.weight"] == (6, 2, 1, 1)
    assert shapes["head.weight"] == (5, 4)


# how many and which ------------------------------------------------------------------------------------------------
def test_the_nearest_multiple_stays_and_never_nothing():
    program = gated()[1].program
    group = group_of(program, "gate.weight")  # 16 neurons
    assert [kept_count(group, wanted, 1) for wanted in (0.0, 0.4, 7.4, 7.5, 16.0)] == [1, 1, 7, 8, 16]
    assert [kept_count(group, wanted, 8) for wanted in (0.0, 11.9, 12.0)] == [8, 8, 16]
    assert kept_count(group, 3.0, 32) == 16


def test_whole_heads_are_wide_enough():
    """A head of 8 channels is a multiple of 8 by itself, one of 4 is not."""
    (head, *_) = [group for group in groups(architecture("llama").program) if group.kind == "head"]
    width = next(member.index.shape[1] for member in head.members if member.read)
    assert kept_count(head, 1.0, width) == 1
    assert kept_count(head, 1.0, 2 * width) == 2


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=4), st.floats(0.01, 1), st.sampled_from([1, 2, 3]), st.data())
def test_no_group_is_emptied(sizes, keep, multiple, data):
    program = prepared(Chain(sizes), (torch.randn(2, 3),)).program
    found = [group for group in groups(program) if not group.frozen and group.units > 1]
    scores = {}
    for group in found:
        drawn = data.draw(st.lists(st.floats(0, 100), min_size=group.units, max_size=group.units))
        scores[group] = torch.tensor(drawn, dtype=torch.float64)
    for ranking in ("group", "global"):
        for group, units in choose(scores, keep, ranking, multiple).items():
            assert 0 < len(units) < group.units
            assert len(units) % multiple == 0
            gone = [unit for unit in range(group.units) if unit not in units.tolist()]
            assert scores[group][units].min() >= scores[group][gone].max()


class Chain(nn.Module):
    """Linear layers of drawn sizes."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        widths = [3, *sizes, 2]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


def test_groups_compete_by_their_means():
    program = prepared(Chain([4, 4]), (torch.randn(2, 3),)).program
    first, second = [group for group in groups(program) if not group.frozen and group.units > 1]
    scores = {first: torch.tensor([8.0, 8, 8, 8]), second: torch.tensor([0.1, 0.1, 0.1, 0.5])}
    chosen = choose(scores, 0.5, "global", 1)  # normalised: four ones against three halves and 2.5
    assert {group: units.tolist() for group, units in chosen.items()} == {first: [0, 1, 2], second: [3]}
    assert {len(units) for units in choose(scores, 0.5, "group", 1).values()} == {2}


def test_a_selector_claims_the_groups_of_the_weights_it_selects():
    driver = gated()[1]
    driver.run(HALF, claims=lambda site: site.weight == "down.weight")
    shapes = {name: tuple(tensor.shape) for name, tensor in driver.program.weights.items()}
    assert shapes["gate.weight"] == (8, 12)  # the neurons, of which it reads the columns
    assert shapes["head.weight"] == (5, 6)  # and the ones it makes
    driver = gated()[1]
    driver.run(HALF, claims=lambda site: site.weight == "up.weight")
    assert driver.program.weights["head.weight"].shape == (5, 12)


def test_kinds_and_refusals_are_said():
    driver = architecture("llama")
    program = after(driver, PruneUnits(kinds=("hidden", "head"), keep=0.5, multiple=1))
    assert "model.embed_tokens.weight[1]: its units stay (hidden): rms_norm takes a statistic" in skipped(driver)
    assert program.weights["model.embed_tokens.weight"].shape[1] == 32
    assert program.weights["model.layers.0.mlp.up_proj.weight"].shape[0] == 64
    assert program.weights["model.layers.0.self_attn.o_proj.weight"].shape[1] == 16
    driver = gated()[1]
    driver.run(PruneUnits(keep=0.9, multiple=8))
    assert "gate.weight[0]: its 16 units stay (neuron): the nearest allowed number is all" in skipped(driver)


def test_hidden_channels_without_a_norm_are_cut():
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.inner, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.tokens(ids)
            return self.head(x + self.inner(x))

    program = after(prepared(Plain(), (torch.tensor([[1, 2]]),)), PruneUnits(kinds=("hidden",), keep=0.5, multiple=1))
    assert program.weights["inner.weight"].shape == (4, 4)


@pytest.mark.parametrize(
    "options",
    [
        {"kinds": ()}, {"kinds": ("layer",)}, {"keep": 0.0}, {"keep": 1.5}, {"importance": "size"},
        {"ranking": "local"}, {"multiple": 0},
    ],
)  # fmt: skip
def test_bad_options_are_refused(options):
    with pytest.raises(PassError, match=r"SPARC209"):
        PruneUnits(**options)


# what reads them ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("axis", [1, 0])
def test_refitting_is_ridge_regression_on_what_is_left(axis):
    torch.manual_seed(0)
    x = torch.randn(200, 10, dtype=torch.float64) @ torch.randn(10, 10, dtype=torch.float64)
    weight = torch.randn(4, 10, dtype=torch.float64)
    columns, gram = torch.tensor([0, 2, 3, 7]), x.T @ x / 200
    found = refitted(weight if axis == 1 else weight.T, axis, columns, gram)
    found = found if axis == 1 else found.T
    ridge = DAMPING * gram.diagonal().mean() * 200
    rows = torch.cat([x[:, columns], ridge.sqrt() * torch.eye(4, dtype=torch.float64)])
    goal = torch.cat([x @ weight.T, ridge.sqrt() * weight[:, columns].T])
    assert torch.allclose(found[:, columns], torch.linalg.lstsq(rows, goal).solution.T, rtol=1e-8)


@pytest.mark.parametrize("name", ["gated", "images"])
def test_refitting_brings_outputs_closer(name):
    torch.manual_seed(3)
    shape = (64, 12) if name == "gated" else (16, 3, 6, 6)
    batches = [[torch.randn(shape)] for _ in range(4)]
    model, driver = (gated if name == "gated" else images)(*batches)
    held = torch.randn(shape)
    expected = model(held).detach()
    errors = []
    for compensate in (False, True):
        _, driver = (gated if name == "gated" else images)(*batches)
        program = after(driver, PruneUnits(keep=0.75, multiple=1, compensate=compensate))
        errors.append(float((program.run_flat([held])[0] - expected).square().mean()))
    assert errors[1] < 0.7 * errors[0]


def test_a_unit_that_others_tell_costs_nothing_when_refitted(monkeypatch):
    """The removed neuron is the sum of two others, and nothing pulls towards the weights there were."""
    monkeypatch.setattr(refit, "DAMPING", 1e-9)

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 3, bias=False), nn.Linear(3, 2, bias=False)
            self.up.weight.data[2] = 1e-3 * (self.up.weight.data[0] + self.up.weight.data[1])

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x))

    torch.manual_seed(0)
    model, x = Linear().eval(), torch.randn(50, 6)
    program = after(prepared(model, (x,)), PruneUnits(keep=0.67, multiple=1, compensate=True, importance="activation"))
    assert program.weights["up.weight"].shape == (2, 6)
    plain = after(prepared(model, (x,)), PruneUnits(keep=0.67, multiple=1, importance="activation"))
    errors = [relative_error(model(x).detach(), each.run_flat([x])[0]) for each in (plain, program)]
    assert errors[0] > 1e-3
    assert errors[1] < 1e-6


# with other passes -------------------------------------------------------------------------------------------------
def test_a_recipe_prunes_and_rounds_and_exports_smaller_shapes(tmp_path):
    torch.manual_seed(0)
    model = Gated()
    recipe = [*prepare(), PruneUnits(keep=0.5, importance="taylor", compensate=True), Round(IntGrid(8)), Encode()]
    artifact = sparc.compile(model, (torch.randn(64, 12),), recipe=recipe, measure=False)
    assert {row.encoding for row in artifact.ledger.sites} == {"IntGrid(bits=8)"}
    program = artifact.program
    artifact.export_onnx(tmp_path / "model.onnx")
    sizes = {tuple(each.dims) for each in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert any(sorted(size)[-2:] == [8, 12] for size in sizes if len(size) > 1)
    assert not any(16 in size for size in sizes)
    artifact.save(tmp_path / "artifact")
    x = torch.randn(64, 12)
    loaded = sparc.load(tmp_path / "artifact")
    assert torch.equal(loaded(x), artifact(x))
    assert relative_error(program.run_flat([x])[0], artifact(x)) < 1e-4


def test_recipes_write_the_pass(tmp_path):
    step = PruneUnits(kinds=("head",), keep=0.5, importance="hessian", compensate=True, loss="next_token")
    recipe = Recipe((Step(step, where="*.self_attn"),))
    text = recipe.to_toml()
    assert 'kinds = ["head"]' in text
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    assert resolve_recipe(path, registry()).steps == recipe.steps


def test_blocks_and_units_go_in_one_recipe():
    torch.manual_seed(0)
    driver = prepared(Repeated(Layer(), Layer(), Layer()), (IDS,))
    program = after(driver, DropBlocks(count=1), PruneUnits(kinds=("neuron", "head"), keep=0.5, multiple=1))
    assert [row.matches > 0 for row in driver.ledger.passes[1:]] == [True, True]
    program.run_flat(driver.samples.held_out["forward"][0])


def test_exact_merging_goes_on_after_a_cut():
    driver = gated()[1]
    driver.run(HALF)
    driver.run(MergeNeurons())
    assert driver.program.weights["gate.weight"].shape == (8, 12)
