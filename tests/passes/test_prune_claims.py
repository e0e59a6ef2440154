"""Which groups a step of structural pruning claims: by any of their weights, and none without a word."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparc
from sparc.passes.cut import mask
from sparc.passes.cut.prune_units import PruneUnits
from sparc.passes.encode import Encode
from sparc.passes.recipes import prepare
from sparc.recipe import Recipe, Step
from sparc.verify import relative_error
from tests.passes.pruned import after, group_of, prepared

HALF = PruneUnits(keep=0.5, multiple=1)
IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Tied(nn.Module):
    """An autoencoder that reads one filter in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(3, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(F.relu(self.c(x)), self.c.weight, padding=1)


class Left(nn.Module):
    """Matrices that multiply from the left."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(24, 6)), nn.Parameter(torch.randn(4, 24))

    def forward(self, x: Tensor) -> Tensor:
        return self.w2 @ F.relu(self.w1 @ x)


class Attended(nn.Module):
    """Channels weighed by a convolution that moves along them (ECA)."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.e, self.o = nn.Conv2d(3, 16, 3), nn.Conv1d(1, 1, 3, padding=1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(x)
        w = self.e(x.mean((2, 3)).unsqueeze(1)).squeeze(1).sigmoid()
        return self.o(x * w[:, :, None, None])


def reasons(driver) -> dict[str, str]:
    return {skip.where: skip.why for skip in driver.ledger.passes[-1].skips}


@pytest.mark.parametrize(
    ("model", "x", "weight"), [(Tied, IMAGE, "c.weight"), (Left, torch.randn(6, 5), "w1")], ids=["tied", "left"]
)
def test_weights_that_no_view_describes_are_claimed(model, x, weight):
    torch.manual_seed(0)
    driver = prepared(model(), (x,))
    masked = driver.program.clone()
    norms = sum(
        masked.weights[member.weight].movedim(member.axis, 0).flatten(1).square().sum(1)
        for member in group_of(masked, weight).members
        if masked.weights[member.weight].ndim > 1
    )
    units = norms.argsort(descending=True)[: len(norms) // 2]
    mask(masked, group_of(masked, weight), units)
    program = after(driver, HALF)
    assert driver.ledger.passes[-1].matches == 1
    assert len(program.weights[weight]) == len(units)
    (expected,), (found,) = (each.run_flat([x], wide=True) for each in (masked, program))
    assert relative_error(expected, found) < 1e-9


@pytest.mark.parametrize("where", ["w1", "w2", "other"])
def test_they_are_selected_by_name(where):
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.other = Left(), nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.left(self.other(x))

    recipe = Recipe((*resolved(), Step(HALF, where=where if where == "other" else f"left.{where}"), Step(Encode())))
    x = (torch.randn(6, 5),)
    artifact = sparc.compile(Both().eval(), x, recipe=recipe, target="reference", measure=False)
    assert artifact.program.weights["left.w1"].shape == (24 if where == "other" else 12, 6)


def resolved() -> tuple[Step, ...]:
    return tuple(each if isinstance(each, Step) else Step(each) for each in prepare())


def test_a_bias_claims_nothing_that_its_matrix_does_not():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    driver = prepared(model, (IMAGE,))
    row = driver.run(HALF, claims=lambda weight: weight.operator != "conv")
    assert (row.matches, row.skips) == (0, [])


def test_a_model_of_nothing_but_a_recurrence_is_explained():
    driver = prepared(nn.LSTM(8, 16, batch_first=True), (torch.randn(2, 5, 8),))
    driver.run(HALF)
    assert any("lstm is not seen through" in why for why in reasons(driver).values())


def test_channels_that_a_convolution_moves_along_are_explained_and_kernels_are_not():
    driver = prepared(Attended(), (IMAGE,))
    driver.run(HALF)
    found = reasons(driver)
    assert "its units stay (channel): a convolution moves along them" in found["c.weight[0]"]
    assert set(found) == {"c.weight[0]", "c.weight[1]", "o.weight[0]"}


def test_units_without_a_matrix_have_no_magnitude():
    class Vectors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            return (x[:, None] * self.a * self.b).sum(-1)

    driver = prepared(Vectors(), (torch.randn(3),))
    driver.run(HALF)
    assert "no matrix, filter or gain" in reasons(driver)["a[0]"]
