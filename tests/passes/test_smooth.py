"""Smoothing: the function stays, one scale for all channels becomes good enough, if that is worth a multiplication."""

import pytest
import torch
from torch import Tensor, nn

from sparc.api import run_steps
from sparc.diag import PassError
from sparc.driver import Driver
from sparc.encoding.int_grid import IntGrid
from sparc.passes.activation.dynamic import QuantizeActivations
from sparc.passes.activation.insert import PER_TENSOR, PER_TOKEN
from sparc.passes.activation.noise import Rows, product_noise
from sparc.passes.equalize.smooth import Smooth
from sparc.passes.round import Round
from sparc.recipe import Recipe, Step
from sparc.verify import snr_db
from tests.passes.models import Tied, driver

aten = torch.ops.aten


class Outliers(nn.Module):
    """A norm that two linears and the output read; two channels are much larger than the others, and matter as much."""

    def __init__(self, outliers: float = 100.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(24)
        self.left, self.right = nn.Linear(24, 16), nn.Linear(24, 8, bias=False)
        with torch.no_grad():
            self.norm.weight[[3, 7]] = outliers
            for linear in (self.left, self.right):
                linear.weight[:, [3, 7]] /= outliers

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(x)
        return torch.cat([self.left(x), self.right(x)], -1), x


def smoothed(model: nn.Module, step: Smooth) -> tuple[Tensor, Driver]:
    torch.manual_seed(1)
    x = torch.randn(4, 6, 24)
    chosen = driver(model.eval(), (x,))
    chosen.run(step)
    return x, chosen


def products(chosen: Driver) -> list[object]:
    return [node for node in chosen.program.graph.nodes if node.target is aten.mul.Tensor]


def test_the_function_stays_and_products_share_one_multiplication() -> None:
    torch.manual_seed(0)
    model = Outliers()
    x, chosen = smoothed(model, Smooth())
    assert len(products(chosen)) == 1
    assert chosen.ledger.passes[-1].changed > 0
    for found, expected in zip(chosen.program.run(x), model(x), strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_quantized_products_gain_what_was_promised() -> None:
    torch.manual_seed(0)
    model = Outliers()
    figures = []
    for steps in ([], [Smooth()]):
        torch.manual_seed(1)
        x = torch.randn(4, 6, 24)
        chosen = driver(model.eval(), (x,))
        for step in [*steps, Round(IntGrid(8)), QuantizeActivations("tensor")]:
            chosen.run(step)
        figures.append(snr_db(model(x)[0].detach(), chosen.program.run(x)[0]))
    assert figures[1] > figures[0] + 3


def test_strength_says_what_becomes_alike() -> None:
    """1: every channel's largest magnitude; 0: every column's largest weight, of both products together."""
    torch.manual_seed(0)
    _, chosen = smoothed(Outliers(), Smooth(strength=0.0, gain=-1.0))
    read = torch.cat([chosen.program.weights[f"{name}.weight"] for name in ("left", "right")]).abs().amax(0)
    assert torch.allclose(read, read[:1].expand_as(read), rtol=1e-4)
    torch.manual_seed(0)
    x, chosen = smoothed(Outliers(), Smooth(strength=1.0))
    seen: list[Tensor] = []
    chosen.program.run_flat([x], watch=lambda node, value, _: seen.append(value) if node in products(chosen) else None)
    largest = seen[0].abs().amax((0, 1))
    assert torch.allclose(largest, largest[:1].expand_as(largest), rtol=1e-4)


def test_even_channels_are_not_worth_a_multiplication() -> None:
    torch.manual_seed(0)
    _, chosen = smoothed(Outliers(outliers=1.0), Smooth())
    assert not products(chosen)
    assert chosen.ledger.passes[-1].changed == 0
    assert [skip.where for skip in chosen.ledger.passes[-1].skips] == ["left.weight"]
    assert "less than 0.0008" in chosen.ledger.passes[-1].skips[0].why


@pytest.mark.parametrize("gain", [0.0, 1.0])
def test_the_gain_decides(gain: float) -> None:
    torch.manual_seed(0)
    _, chosen = smoothed(Outliers(), Smooth(gain=gain))
    assert len(products(chosen)) == (gain == 0.0)


def test_what_is_left_alone_says_why() -> None:
    torch.manual_seed(0)
    chosen = driver(Tied(), (torch.randint(0, 40, (2, 7)),))
    row = chosen.run(Smooth(gain=-1.0))
    assert {(skip.where, skip.why) for skip in row.skips} == {("embedding.weight", "only matrix products are smoothed")}


def test_a_rounded_weight_is_left_alone() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6, 24)
    chosen = driver(Outliers(), (x,))
    chosen.run(Round(IntGrid(8)))
    row = chosen.run(Smooth(gain=0.0))
    assert not products(chosen)
    assert {skip.why for skip in row.skips} == {"its weight is rounded already"}


def test_a_vector_is_a_row() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(24, 8), torch.randn(24)
    chosen = driver(model, (x,))
    chosen.run(Smooth(gain=-1.0))
    assert len(products(chosen)) == 1
    assert torch.allclose(chosen.program.run(x), model(x), rtol=1e-4, atol=1e-5)


def test_latency_is_measured_against_the_model_before_smoothing() -> None:
    torch.manual_seed(0)
    chosen = driver(Outliers(), (torch.randn(4, 6, 24),))
    plain, baseline = run_steps(chosen, Recipe((Step(Smooth(gain=0.0)), Step(Round(IntGrid(8))))))
    count = [sum(node.target is aten.mul.Tensor for node in program.graph.nodes) for program in (plain, baseline)]
    assert count == [0, 1]


@pytest.mark.parametrize("strength", [-0.1, 1.1])
def test_strengths_out_of_range(strength: float) -> None:
    with pytest.raises(PassError, match="SPARC209"):
        Smooth(strength)


# noise ----------------------------------------------------------------------------------------------------------------
def test_noise_by_hand() -> None:
    """x = [127, 0.4], w = 1: per token the second element becomes 0; the energy is that of 127.4."""
    x, ones = Rows([torch.tensor([[127.0, 0.4]])]), torch.ones(1, 2)
    assert product_noise(x, ones, PER_TOKEN) == pytest.approx(0.4**2 / 127.4**2, rel=1e-3)
    assert product_noise(x, ones, PER_TENSOR, torch.tensor([1.0, 317.5])) == pytest.approx(0, abs=1e-9)


def test_the_range_of_a_tensor_is_that_of_all_its_rows() -> None:
    """Only every fourth row is kept, and the largest lies in another: steps of 1 lose the rows of 0.25."""
    batch = torch.full((4096, 2), 0.25)
    batch[1] = 255.0
    x = Rows([batch])
    assert sum(map(len, x.rows)) == 1024
    assert product_noise(x, torch.eye(2), PER_TENSOR) == pytest.approx(1.0)


def test_rounded_weights_count() -> None:
    torch.manual_seed(0)
    x, matrix = Rows([torch.randn(50, 16)]), torch.randn(8, 16)
    alone = product_noise(x, matrix, PER_TENSOR)
    assert product_noise(x, matrix, PER_TENSOR, weights=IntGrid(4, 16)) > 10 * alone
