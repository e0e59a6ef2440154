"""Bias correction: means by hand, exactly zero mean error on the calibration data, and what is left alone."""

import pytest
import torch
from torch import Tensor, nn

from sparc.driver import Driver
from sparc.encoding.int_grid import IntGrid
from sparc.passes.activation.correct import CorrectBias
from sparc.passes.round import Round
from tests.passes.models import driver


def corrected(model: nn.Module, x: Tensor) -> Driver:
    chosen = driver(model, (x,))
    chosen.run(Round(IntGrid(4)))
    chosen.run(CorrectBias())
    return chosen


def test_by_hand() -> None:
    """w = [7, 0.4, ...] rounds to [7, 0, ...] at scale 1; with E[x_1] = 5 the output loses 2 on average."""
    model = nn.Linear(8, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[7.0, 0.4, 0, 0, 0, 0, 0, 0]]))
        model.bias.fill_(1.0)
    x = torch.zeros(2, 8)
    x[:, 1] = torch.tensor([4.0, 6.0])
    assert corrected(model, x).program.weights["bias"].item() == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (lambda: nn.Linear(16, 24), (50, 16)),
        (lambda: nn.Conv2d(8, 12, 1), (4, 8, 6, 6)),
        (lambda: nn.Conv2d(8, 12, 1, groups=4), (4, 8, 6, 6)),
        (lambda: nn.Conv2d(8, 12, 1, bias=False), (4, 8, 6, 6)),
        (lambda: nn.Conv1d(8, 12, 1, groups=2), (4, 8, 6)),
    ],
)
def test_the_mean_output_is_the_models_own(model: object, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    made, x = model(), torch.rand(*shape)  # type: ignore[operator]
    chosen = corrected(made, x)
    assert chosen.ledger.passes[-1].matches == 1
    axes = [0] if x.ndim == 2 else [0, *range(2, x.ndim)]
    expected, found = made(x).mean(axes), chosen.program.run(x).mean(axes)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_kernel_counts_whole(groups: int) -> None:
    """Of a constant image every output is the same, so the mean is exact with a 3x3 kernel as well."""
    torch.manual_seed(0)
    model, x = nn.Conv2d(4, 8, 3, groups=groups), torch.rand(1, 4, 1, 1).expand(1, 4, 7, 7).contiguous()
    assert torch.allclose(corrected(model, x).program.run(x), model(x), atol=1e-5)


def test_later_layers_are_corrected_for_the_inputs_they_really_get() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)), torch.rand(40, 16)
    chosen = corrected(model, x)
    hidden = torch.relu(nn.functional.linear(x, chosen.program.weights["0.weight"], chosen.program.weights["0.bias"]))
    expected = nn.functional.linear(hidden, model[2].weight, model[2].bias).mean(0)
    assert torch.allclose(chosen.program.run(x).mean(0), expected, atol=1e-5)


def test_nothing_to_correct_without_a_change() -> None:
    chosen = driver(nn.Linear(16, 8), (torch.rand(4, 16),))
    row = chosen.run(CorrectBias())
    assert (row.changed, row.skips) == (0, [])


def test_linears_without_a_bias_say_so() -> None:
    chosen = corrected(nn.Linear(16, 24, bias=False), torch.rand(4, 16))
    row = chosen.ledger.passes[-1]
    assert row.changed == 0
    assert [skip.why for skip in row.skips] == ["it has no bias"]
