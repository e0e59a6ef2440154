"""Refining masks (DSnoT): a plain version, what stays, what gets less, and where it stops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparc.encoding.nm import NM
from sparc.encoding.unstructured import Unstructured
from sparc.passes.prune import Prune
from sparc.passes.prune.refine import CYCLES, THRESHOLD, refine_mask
from sparc.passes.second_order import reconstruction_error
from tests.passes.pruning import correlated, driver_of, gram_of, pruned, weights


def case(rows: int, columns: int, seed: int, m: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight, mask, mean and mean square."""
    weight, x = weights(rows, columns, seed), correlated(columns, seed=seed)
    kept = NM(m // 2, m).select(weight) if m else Unstructured().select(weight, 0.5, by_row=True)
    return weight, kept, x.double().mean(0), x.double().square().mean(0)


def biased(columns: int) -> Tensor:
    """Inputs whose means matter more than their correlations."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(256, columns, generator=generator) + 3 * torch.randn(columns, generator=generator)


def lost(weight: Tensor, kept: Tensor, mean: Tensor) -> Tensor:
    """`|e|` of each row."""
    return (weight.double() * mean).masked_fill(kept, 0).sum(-1).abs()


def plain(weight: Tensor, kept: Tensor, mean: Tensor, square: Tensor, m: int | None) -> Tensor:
    """The same, a row and an exchange at a time."""
    result = kept.clone()
    for row, w in enumerate(weight.double()):
        keep, loss, score = result[row], w * mean, w.abs() * square.sqrt()
        for _ in range(CYCLES):
            e = float(loss[~keep].sum())
            sign = 1.0 if e > 0 else -1.0
            if abs(e) <= THRESHOLD:
                break
            variance = square - mean**2
            grow = max((j for j in range(len(w)) if not keep[j]), key=lambda j: float(sign * loss[j] / variance[j]))
            among = [
                j
                for j in range(len(w))
                if keep[j] and (sign * loss[j] < 0 if m is None else j // m == grow // m)
            ]  # fmt: skip
            if not among:
                break
            prune = min(among, key=lambda j: float(score[j]))
            if abs(e - float(loss[grow]) + float(loss[prune])) >= abs(e):
                break
            keep[grow], keep[prune] = True, False
    return result


@pytest.mark.parametrize("m", [None, 4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_that_written_plainly(m: int | None, seed: int) -> None:
    weight, kept, mean, square = case(12, 32, seed, m)
    found = refine_mask(weight, kept, mean, square, m)
    assert torch.equal(found, plain(weight, kept, mean, square, m))
    assert not torch.equal(found, kept)


@given(st.integers(0, 2**31), st.sampled_from([None, 2, 4, 8]), st.integers(1, 600))
def test_counts_stay_errors_shrink_and_once_is_enough(seed: int, m: int | None, rows: int) -> None:
    weight, kept, mean, square = case(rows, 16, seed, m)
    found = refine_mask(weight, kept, mean, square, m)
    width = m or 16
    assert torch.equal(found.unflatten(-1, (-1, width)).sum(-1), kept.unflatten(-1, (-1, width)).sum(-1))
    assert bool((lost(weight, found, mean) <= lost(weight, kept, mean) * (1 + 1e-12)).all())
    assert torch.equal(refine_mask(weight, found, mean, square, m), found)


def test_rows_at_the_threshold_are_left_alone() -> None:
    weight, kept = torch.tensor([[1.0, 0.5]]), torch.tensor([[True, False]])
    square = torch.ones(2)
    for mean, expected in ((THRESHOLD, kept), (3 * THRESHOLD, ~kept)):
        found = refine_mask(weight, kept, torch.tensor([mean / 10, 2 * mean * 0.99]), square, 2)
        assert torch.equal(found, expected)


def test_an_input_that_never_varies_is_no_division_by_zero() -> None:
    weight, kept = torch.tensor([[1.0, 0.5, 2.0, 0.1]]), torch.tensor([[True, False, True, False]])
    mean = torch.tensor([1.0, 1, -1, 0])
    found = refine_mask(weight, kept, mean, torch.ones(4), None)
    assert found.tolist() == [[True, True, False, False]] or bool((lost(weight, found, mean) <= 0.5).all())
    assert torch.equal(refine_mask(weight, kept, torch.zeros(4), torch.zeros(4), None), kept)


def test_everything_or_nothing_kept_stays() -> None:
    weight, _, mean, square = case(4, 16, 0, None)
    for kept in (torch.zeros(4, 16, dtype=torch.bool), torch.ones(4, 16, dtype=torch.bool)):
        assert torch.equal(refine_mask(weight, kept, mean, square), kept)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize(("pattern", "density"), [(NM(2, 4), None), (Unstructured(), 0.4)], ids=str)
def test_a_refined_weight_has_less_error_in_no_row_more(
    pattern: NM | Unstructured, density: float, method: str
) -> None:
    weight, x = weights(24, 32), biased(32)
    first, refined = (
        pruned(weight, x, Prune(pattern, density, method=method, refine=refine))  # type: ignore[arg-type]
        for refine in (False, True)
    )
    errors = [reconstruction_error((each - weight).unsqueeze(0), gram_of(x))[0] for each in (first, refined)]
    assert bool((errors[1] <= errors[0] * (1 + 1e-5)).all())
    assert float(errors[1].sum()) < float(errors[0].sum())
    assert torch.equal((first != 0).sum(-1), (refined != 0).sum(-1))
    if method != "sparsegpt":
        assert torch.equal(refined[refined != 0], weight[refined != 0])


def test_after_a_sweep_nothing_stale_comes_back() -> None:
    """What is grown is weighed by all other weights of its row: they make up for the new mask, not for the old one."""
    weight, x = weights(24, 32), biased(32)
    chosen = driver_of(weight, x)
    chosen.run(Prune(NM(2, 4), method="sparsegpt", refine=True))
    refined = chosen.program.weights["weight"]
    before = pruned(weight, x, Prune(NM(2, 4), method="sparsegpt"))
    grown = (refined != 0) & (before == 0)
    assert bool(grown.any())
    assert not bool((refined[grown] == weight[grown]).all())
    gram = gram_of(x)[0]
    for row in grown.any(-1).nonzero()[:, 0].tolist():
        kept = (refined[row] != 0).nonzero()[:, 0]
        best = torch.linalg.solve(gram[kept][:, kept], gram[kept] @ weight[row].double())
        masked = torch.zeros(32, dtype=torch.float64).index_copy(0, kept, best)
        floor = reconstruction_error((masked - weight[row])[None, None], gram[None])
        stale = torch.where(refined[row] != 0, torch.where(grown[row], weight[row], before[row]), 0.0)
        errors = [reconstruction_error((each - weight[row])[None, None], gram[None]) for each in (refined[row], stale)]
        assert floor <= errors[0] * (1 + 1e-6)
        assert errors[0] < errors[1]
