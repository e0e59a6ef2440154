"""Wanda, its variant and SparseGPT: plain versions in float64, identities, and no method worse than magnitude."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparc.encoding.blocks import Blocks
from sparc.encoding.nm import NM
from sparc.encoding.unstructured import Unstructured
from sparc.passes.prune import Prune
from sparc.passes.prune.masks import Pattern, Pruning
from sparc.passes.second_order import factor, reconstruction_error, sweep
from sparc.passes.second_order.selection import KeepNM, KeepPart, WithDiagonal, block_coordinates
from tests.passes.pruning import PATTERNS, correlated, damped, driver_of, error, gram_of, pruned, weights

METHODS = ["wanda", "sparsegpt"]


# counts ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"criterion": "isc"}, {"refine": True}], ids=str)
def test_a_sweep_keeps_exactly_what_the_pattern_says(options: dict[str, object]) -> None:
    weight, x = weights(6, 200), correlated(200)
    for n, m in ((1, 4), (2, 4), (5, 8)):
        kept = pruned(weight, x, Prune(NM(n, m), method="sparsegpt", **options)) != 0  # type: ignore[arg-type]
        assert bool((kept.unflatten(-1, (-1, m)).sum(-1) == n).all())
    for density in (0.1, 0.333, 0.5, 0.77):
        step = Prune(Unstructured(), density=density, method="sparsegpt", **options)  # type: ignore[arg-type]
        assert int((pruned(weight, x, step) != 0).sum()) == round(1200 * density)


@pytest.mark.parametrize("density", [0.1, 0.333, 0.5, 0.77])
def test_wanda_keeps_as_much_of_every_row(density: float) -> None:
    pruning = Pruning(weights(6, 31), Unstructured(), density)
    kept = pruning.by_wanda(correlated(31).square().mean(0).expand(6, 31)).mask
    assert bool((kept.sum(-1) == int(31 * density + 0.5)).all())
    rows = pruning.by_mass(correlated(31).square().mean(0).expand(6, 31)).mask.sum(-1)
    assert int(rows.sum()) == int(6 * 31 * density + 0.5)
    assert len(rows.unique()) > 1


def test_columns_of_equal_norm_make_wanda_magnitude() -> None:
    weight, square = weights(5, 32).round(decimals=1), torch.full((5, 32), 0.25)
    nm = Pruning(weight, NM(2, 4), 1.0)
    assert torch.equal(nm.by_wanda(square).mask, nm.by_magnitude().mask)
    free = Pruning(weight, Unstructured(), 0.4)
    assert torch.equal(free.by_wanda(square).mask, Unstructured().select(weight, 0.4, by_row=True))


def test_of_equal_scores_the_first_are_kept() -> None:
    pruning = Pruning(torch.ones(2, 4), Unstructured(), 0.5)
    for kept in (pruning.by_wanda(torch.ones(2, 4)), pruning.by_mass(torch.ones(2, 4))):
        assert kept.mask.int().tolist() == [[1, 1, 0, 0]] * 2


# plain versions -------------------------------------------------------------------------------------------------------
def plain_wanda(weight: Tensor, x: Tensor, kept: int) -> Tensor:
    score = weight.double().abs() * x.double().norm(dim=0)
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    for row, values in enumerate(score):
        mask[row, values.argsort(descending=True)[:kept]] = True
    return mask


def plain_variant(weight: Tensor, x: Tensor, kept: int) -> Tensor:
    """The part of the mass by bisection, as it is published, to the end."""
    score, low, high = weight.double().abs() * x.double().norm(dim=0), 0.0, 1.0
    order = score.sort(dim=-1)
    for _ in range(60):
        part = (low + high) / 2
        drop = (order.values.cumsum(-1) <= part * score.sum(-1, keepdim=True)).sum(-1)
        low, high = (part, high) if int(drop.sum()) <= weight.numel() - kept else (low, part)
    mask = torch.ones(weight.shape, dtype=torch.bool)
    for row, count in enumerate((order.values.cumsum(-1) <= low * score.sum(-1, keepdim=True)).sum(-1)):
        mask[row, order.indices[row, :count]] = False
    return mask


def plain_sweep(
    weight: Tensor, h: Tensor, span: int, choose: Callable[[Tensor, int], Tensor], criterion: str = "obs"
) -> tuple[Tensor, Tensor]:
    """SparseGPT with an inverse of its own for each column."""
    values, mask = weight.double().clone(), torch.ones(weight.shape, dtype=torch.bool)
    inverses = [torch.linalg.inv(h[column:, column:]) for column in range(len(h))]
    for column, inverse in enumerate(inverses):
        if column % span == 0:
            run = range(column, min(column + span, len(h)))
            costs = torch.tensor([1 / float(inverses[j][0, 0]) + (criterion == "isc") * float(h[j, j]) for j in run])
            mask[:, run.start : run.stop] = choose(values[:, run.start : run.stop].square() * costs, column)
        lost = torch.where(mask[:, column], 0.0, values[:, column])
        values[:, column:] -= lost[:, None] * inverse[0] / inverse[0, 0]
        values[:, column] *= mask[:, column]
    return values, mask


def greatest(costs: Tensor, count: int) -> Tensor:
    mask = torch.zeros(costs.numel(), dtype=torch.bool)
    mask[costs.flatten().argsort(descending=True)[:count]] = True
    return mask.reshape(costs.shape)


@pytest.mark.parametrize("density", [0.25, 0.5, 0.8])
def test_wanda_and_its_variant_are_those_written_plainly(density: float) -> None:
    weight, x = weights(7, 40), correlated(40)
    pruning, square = Pruning(weight, Unstructured(), density), x.square().mean(0).expand(7, 40)
    assert torch.equal(pruning.by_wanda(square).mask, plain_wanda(weight, x, int(40 * density)))
    assert torch.equal(pruning.by_mass(square).mask, plain_variant(weight, x, int(280 * density)))


@pytest.mark.parametrize("criterion", ["obs", "isc"])
def test_the_sweep_to_n_of_m_is_that_written_plainly(criterion: str) -> None:
    weight, x = weights(9, 48), correlated(48)
    step = Prune(NM(2, 4), method="sparsegpt", criterion=criterion)  # type: ignore[arg-type]

    def choose(costs: Tensor, _: int) -> Tensor:
        return torch.stack([greatest(row, 2) for row in costs])

    expected, mask = plain_sweep(weight, damped(x), 4, choose, criterion)
    found = pruned(weight, x, step)
    assert torch.equal(found != 0, mask)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("criterion", ["obs", "isc"])
def test_the_sweep_of_any_elements_is_that_written_plainly(criterion: str) -> None:
    weight, x = weights(5, 150), correlated(150)
    step = Prune(Unstructured(), density=0.4, method="sparsegpt", criterion=criterion)  # type: ignore[arg-type]

    def choose(costs: Tensor, start: int) -> Tensor:
        return greatest(costs, {0: 256, 128: 44}[start])

    expected, mask = plain_sweep(weight, damped(x), 128, choose, criterion)
    found = pruned(weight, x, step)
    assert torch.equal(found != 0, mask)
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-3)


def test_blocks_in_a_sweep_are_chosen_by_their_joint_cost() -> None:
    """Pruning a block costs what is left when the rest of its rows is fitted anew by least squares."""
    weight, x, size = weights(4, 10), correlated(10), (2, 4)
    h, costs = damped(x), torch.zeros(2, 3)
    for row in range(4):
        for place, start in enumerate(range(0, 10, 4)):
            gone = torch.arange(10).double().sub(start).ge(0) & torch.arange(10).double().sub(start + 4).lt(0)
            change = torch.zeros(10, dtype=torch.float64)
            change[gone] = -weight[row, gone].double()
            change[~gone] = -torch.linalg.solve(h[~gone][:, ~gone], h[~gone][:, gone] @ change[gone])
            costs[row // 2, place] += float(change @ h @ change)
    step = Prune(Blocks(size), density=0.5, method="sparsegpt")
    chosen = driver_of(weight, x)
    chosen.run(step)
    assert torch.equal(chosen.program.grid("weight").tensors["mask"], greatest(costs, 3))  # type: ignore[union-attr]


# identities -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured()], ids=str)
def test_the_errors_of_all_steps_are_the_error_of_the_matrix(pattern: Pattern) -> None:
    weight, x = weights(6, 200).unsqueeze(0), correlated(200)
    selection = KeepNM(pattern) if isinstance(pattern, NM) else KeepPart(0.5, 200)
    swept = sweep(weight, factor(gram_of(x)), select=selection)
    change = (swept.weight - weight)[0].double()
    assert swept.cost == pytest.approx(float((change @ damped(x) * change).sum()), rel=1e-4)


def test_independent_inputs_leave_nothing_to_make_up_for() -> None:
    signs = torch.tensor([[1.0, 1], [1, -1]])
    for _ in range(4):
        signs = torch.kron(signs, torch.tensor([[1.0, 1], [1, -1]]))
    x, weight = signs * torch.tensor([0.5, 2.0, 1.0, 4.0]).repeat(8), weights(5, 32)
    found = pruned(weight, x, Prune(NM(2, 4), method="sparsegpt", damping=0.0))
    torch.testing.assert_close(found, pruned(weight, x, Prune(NM(2, 4), method="wanda")))


def test_isc_is_between_once_and_twice_the_cost_without_compensation() -> None:
    x, seen = correlated(40), []
    prepared = factor(gram_of(x))

    class Spy(KeepPart):
        def __call__(self, values: Tensor, roots: Tensor, columns: Tensor) -> Tensor:
            seen.append(roots[0, :, 0].double() ** -2 / damped(x).diagonal()[columns])
            return super().__call__(values, roots, columns)

    sweep(weights(3, 40).unsqueeze(0), prepared, select=WithDiagonal(Spy(0.5, 40), prepared.diagonal))
    (ratio,) = seen
    assert bool((ratio >= 1 - 1e-5).all())
    assert bool((ratio <= 2 + 1e-5).all())
    assert float(ratio.min()) < 1.5 < float(ratio.max())


@pytest.mark.parametrize("width", [1, 4, 40])
def test_isc_of_blocks_too(width: int) -> None:
    x, weight = correlated(40), weights(3, 40)
    prepared = factor(gram_of(x))
    obs, isc = (
        block_coordinates(weight.unsqueeze(0), gram_of(x), prepared, width, criterion)[0]
        .unflatten(-1, (-1, width)).square().sum(-1)
        for criterion in ("obs", "isc")
    )  # fmt: skip
    alone = torch.stack(
        [
            (piece.double() @ damped(x)[start : start + width, start : start + width] * piece.double()).sum(-1)
            for start, piece in zip(range(0, 40, width), weight.split(width, -1), strict=True)
        ],
        -1,
    )
    torch.testing.assert_close(isc, obs + alone, rtol=1e-4, atol=1e-6)
    assert bool((obs <= alone * (1 + 1e-5)).all())


# how good -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("criterion", ["obs", "isc"])
@pytest.mark.parametrize(("pattern", "density"), [*PATTERNS[:4], (Blocks((4, 4)), 0.5)], ids=str)
def test_sparsegpt_is_better_than_wanda_and_wanda_than_magnitude(
    pattern: Pattern, density: float | None, criterion: str
) -> None:
    weight, x = weights(32, 64), correlated(64)
    plain, wanda, swept = (
        error(weight, pruned(weight, x, Prune(pattern, density, **options)), x)  # type: ignore[arg-type]
        for options in ({}, {"method": "wanda"}, {"method": "sparsegpt", "criterion": criterion})
    )
    assert swept < wanda < plain


def test_where_wanda_is_worse_magnitude_decides() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 4, generator=generator)
    x[:, 0] = x[:, 1] = 3 * x[:, 1]
    weight = torch.tensor([[1.0, -1, 1.5, 1.5]])  # the first two cancel, and are heard
    unguarded = Pruning(weight, NM(2, 4), 1.0).by_wanda(x.square().mean(0).expand(1, 4)).weight
    assert torch.equal(unguarded, torch.tensor([[1.0, -1, 0, 0]]))
    assert torch.equal(pruned(weight, x, Prune(NM(2, 4), method="wanda")), torch.tensor([[0.0, 0, 1.5, 1.5]]))
    step = Prune(Unstructured(), density=0.5, method="wanda")
    assert torch.equal(pruned(weight, x, step), torch.tensor([[0.0, 0, 1.5, 1.5]]))


@given(st.sampled_from(PATTERNS), st.integers(0, 2**31), st.booleans(), st.sampled_from([5, 16, 40]))
def test_no_method_is_worse_than_magnitude(
    case: tuple[Pattern, float | None], seed: int, refine: bool, samples: int
) -> None:
    pattern, density = case
    x, matrix = correlated(16, samples, seed), weights(4, 16, seed)
    gram, pruning = gram_of(x), Pruning(matrix, pattern, density or 1.0)
    worst = float(reconstruction_error(pruning.by_magnitude().weight - matrix, gram).sum())
    options = [{"method": method} for method in METHODS]
    options += [{"method": "wanda_variant"}] if isinstance(pattern, Unstructured) else []
    for each in options:
        step = Prune(pattern, density, refine=refine and not isinstance(pattern, Blocks), **each)  # type: ignore[arg-type]
        assert error(matrix, pruned(matrix, x, step), x) <= worst * (1 + 1e-6) + 1e-9
