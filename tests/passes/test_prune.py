"""Prune: masks by hand, Wanda's score, what is left alone, and options that make no sense."""

import pytest
import torch
from torch import Tensor, nn

from sparc.api import registry
from sparc.diag import PassError
from sparc.encoding.blocks import Blocks
from sparc.encoding.dense import Dense
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.nm import NM
from sparc.encoding.unstructured import Unstructured
from sparc.passes.encode import Encode
from sparc.passes.prune import PermuteChannels, Prune
from sparc.recipe import Recipe, Step
from tests.passes.models import driver, models, run


def linear(weight: Tensor) -> nn.Linear:
    model = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    model.weight = nn.Parameter(weight)
    return model


def test_two_of_four_by_hand() -> None:
    weight = torch.tensor([[3.0, -4.0, 1.0, 2.0, 0.0, 0.0, 5.0, 0.0], [1.0, 1.0, 1.0, 1.0, -9.0, 8.0, -7.0, 6.0]])
    expected = torch.tensor([[3.0, -4.0, 0, 0, 0.0, 0.0, 5.0, 0.0], [1.0, 1.0, 0, 0, -9.0, 8.0, 0, 0]])
    program = run(linear(weight), (torch.randn(2, 8),), Prune())
    assert torch.equal(program.weights["weight"], expected)
    grid = program.grid("weight")
    assert grid is not None
    assert (grid.spec, grid.view) == (NM(2, 4), "matrix")
    assert bool((grid.tensors["mask"].reshape(2, 2, 4).sum(-1) == 2).all())


def test_blocks_by_hand() -> None:
    weight = torch.tensor([[1.0, 1, 5, 0], [1, 1, 0, 0], [3, 3, 2, 2], [3, 3, 2, 2]])
    program = run(linear(weight), (torch.randn(2, 4),), Prune(Blocks((2, 2)), density=0.5))
    expected = torch.tensor([[0.0, 0, 5, 0], [0, 0, 0, 0], [3, 3, 0, 0], [3, 3, 0, 0]])
    assert torch.equal(program.weights["weight"], expected)


def test_any_elements_and_whole_rows_by_hand() -> None:
    weight = torch.tensor([[1.0, -2, 5, 0], [3, -6, 4, 1]])
    program = run(linear(weight), (torch.randn(2, 4),), Prune(Unstructured(), density=0.375))
    assert torch.equal(program.weights["weight"], torch.tensor([[0.0, 0, 5, 0], [0, -6, 4, 0]]))
    program = run(linear(weight), (torch.randn(2, 4),), Prune(Blocks((1, "all")), density=0.5))
    assert torch.equal(program.weights["weight"], weight * torch.tensor([[0.0], [1]]))


@pytest.mark.parametrize("density", [0.25, 0.5, 0.9])
def test_density_is_kept(density: float) -> None:
    torch.manual_seed(0)
    program = run(nn.Linear(40, 40, bias=False), (torch.randn(2, 40),), Prune(Blocks((4, 4)), density=density))
    assert float((program.weights["weight"] != 0).float().mean()) == pytest.approx(density, abs=0.005)


def test_importance_weighs_columns_by_their_input() -> None:
    weight = torch.tensor([[4.0, 3.0, 2.0, 1.0]]).expand(4, 4).clone()
    inputs = (torch.randn(100, 4) * torch.tensor([1.0, 1.0, 1.0, 100.0]),)
    by_magnitude = run(linear(weight), inputs, Prune()).weights["weight"]
    by_data = run(linear(weight), inputs, Prune(method="wanda")).weights["weight"]
    assert torch.equal(by_magnitude[0], torch.tensor([4.0, 3.0, 0.0, 0.0]))
    assert torch.equal(by_data[0], torch.tensor([4.0, 0.0, 0.0, 1.0]))


def test_values_that_are_kept_keep_their_bits() -> None:
    for model, inputs in models().values():
        before, after = driver(model, inputs).program, run(model, inputs, Prune())
        for name in before.weights:
            kept = after.weights[name] != 0
            assert torch.equal(after.weights[name][kept], before.weights[name][kept])
            assert after.weights[name].dtype == before.weights[name].dtype


def test_pruning_twice_is_pruning_once() -> None:
    model, inputs = models()["linear"]
    chosen = driver(model, inputs)
    chosen.run(Prune())
    assert chosen.run(Prune()).changed == 0
    assert chosen.run(Prune(NM(1, 4))).matches == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_dtype_is_stored_as_it_is(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Linear(16, 16).to(dtype)
    program = run(model, (torch.randn(2, 16).to(dtype),), Prune(), Encode())
    assert program.weights["weight_codes"].dtype == dtype


def test_what_is_left_alone_says_why() -> None:
    model, inputs = models()["tied"]
    assert {skip.where: skip.why for skip in driver(model, inputs).run(Prune()).skips} == {
        "embedding.weight": "it is an embedding: no product skips its zeros",
        "inner.weight": "4 does not divide its reduced size 23",
    }
    model, inputs = models()["convolutions"]
    assert {skip.where: skip.why for skip in driver(model, inputs).run(Prune()).skips} == {
        "depthwise.weight": "it is a depthwise convolution: each output reads a single channel",
    }
    model, inputs = models()["linear"]
    skips = driver(model, inputs).run(Prune(Blocks((16, 16)), density=0.5)).skips
    assert [skip.where for skip in skips] == ["2.weight"]


def test_sites_below_the_floor_are_restored() -> None:
    model, inputs = models()["linear"]
    chosen = driver(model, inputs)
    row = chosen.run(Prune(NM(1, 4), floor=40.0))
    assert row.measured["restored"] == row.measured["sites measured"] == 2
    assert all(chosen.program.grid(name) is None for name in chosen.program.weights)
    assert torch.equal(chosen.program.run(*inputs), model(*inputs))


@pytest.mark.parametrize(
    "options",
    [
        {"pattern": IntGrid(4)},
        {"pattern": NM(2, 4, of=IntGrid(4))},
        {"pattern": Dense()},
        {"pattern": NM(2, 4), "density": 0.5},
        {"pattern": Blocks((8, 8))},
        {"pattern": Blocks((8, 8)), "density": 0.0},
        {"pattern": Blocks((8, 8)), "density": 1.5},
        {"pattern": Unstructured()},
        {"pattern": Unstructured(of=IntGrid(4)), "density": 0.5},
        {"method": "taylor"},
        {"method": "wanda_variant"},
        {"criterion": "isc"},
        {"criterion": "isc", "method": "wanda"},
        {"criterion": "obd", "method": "sparsegpt"},
        {"pattern": Blocks((8, 8)), "density": 0.5, "refine": True},
        {"allocation": "sensitivity"},
        {"pattern": Unstructured(), "density": 0.5, "allocation": "trace"},
        {"spread": -0.1},
        {"spread": 1.0},
        {"damping": -1.0},
        {"damping": float("nan")},
    ],
)
def test_options_that_make_no_sense(options: dict[str, object]) -> None:
    with pytest.raises(PassError, match="SPARC209"):
        Prune(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "step",
    [
        Prune(Unstructured(), density=0.3, method="sparsegpt", criterion="isc", refine=True),
        Prune(Blocks((1, "all")), density=0.5, method="wanda", allocation="sensitivity", spread=0.2),
        PermuteChannels(NM(1, 4), method="wanda", rounds=8),
    ],
    ids=str,
)
def test_recipes_say_every_option(step: Prune | PermuteChannels) -> None:
    recipe = Recipe((Step(step),))
    assert Recipe.from_toml(recipe.to_toml(), registry()) == recipe
