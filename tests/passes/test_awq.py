"""AWQ: the function stays, the error of rounding falls, and factors go where they cost nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparc.capture import capture
from sparc.diag import PassError
from sparc.driver import Driver
from sparc.encoding.int_grid import IntGrid
from sparc.observers import observer
from sparc.passes.canonicalize import Canonicalize
from sparc.passes.equalize.awq import Awq, Reader, rounding_error, scales
from sparc.passes.equalize.folds import value_folds
from sparc.passes.round import Round
from tests.passes.models import Tied, driver
from tests.passes.rotated import HEAD, Decoder, example

aten = torch.ops.aten
SPEC = IntGrid(3, 8, symmetric=False)
AWQ = Awq(SPEC)


class Layers(nn.Module):
    """A norm, two products of it, a ReLU and a third product; a few channels are far larger than the others."""

    def __init__(self, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm(24)
        self.left, self.right = nn.Linear(24, 32), nn.Linear(24, 32, bias=False)
        self.last = nn.Linear(32, 16)
        with torch.no_grad():
            self.norm.weight[[3, 7, 11]] = 30.0
            self.left.weight[5] *= 40
            self.left.bias[9] = 20

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(x)
        return self.last(torch.relu(self.left(x))), self.right(x)


def layers(norm: type[nn.Module] = nn.LayerNorm) -> tuple[Layers, Tensor]:
    torch.manual_seed(0)
    return Layers(norm).eval(), torch.randn(4, 16, 24)


def plain_round(weight: Tensor, bits: int, group: int) -> Tensor:
    """Asymmetric rounding to nearest in groups, in float64, with integer zero points."""
    groups = weight.unflatten(-1, (-1, group))
    low, high = groups.amin(-1, True).clamp(max=0), groups.amax(-1, True).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    zero = torch.round(-low / scale)
    codes = (torch.round(groups / scale) + zero).clamp(0, 2**bits - 1)
    return ((codes - zero) * scale).flatten(-2)


def plain_search(weights: list[Tensor], x: Tensor) -> tuple[float, Tensor]:
    """The published search: the exponent of least squared difference of outputs, and its scale."""
    x = x.reshape(-1, x.shape[-1]).double()
    magnitude, errors = x.abs().mean(0), []
    for power in range(20):
        s = magnitude ** (power / 20)
        s = s / (s.max() * s.min()).sqrt()
        errors.append(
            sum(
                float(((x / s) @ plain_round(w.double() * s, 3, 8).T - x @ w.double().T).square().sum())
                for w in weights
            )
        )
    best = errors.index(min(errors))
    s = magnitude ** (best / 20)
    return best / 20, s / (s.max() * s.min()).sqrt()


def scaled(model: nn.Module, x: Any, step: Awq = AWQ) -> Driver:
    chosen = driver(model, (x,))
    chosen.run(step)
    return chosen


# the search -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_factors_are_those_of_the_published_search(norm: type[nn.Module]) -> None:
    model, x = layers(norm)
    after = scaled(model, x).program.weights
    power, scale = plain_search([model.left.weight.detach(), model.right.weight.detach()], model.norm(x).detach())
    assert power > 0
    torch.testing.assert_close(after["right.weight"].double(), model.right.weight.detach().double() * scale)
    torch.testing.assert_close(after["norm.weight"].double(), model.norm.weight.detach().double() / scale)
    inner = torch.relu(model.left(model.norm(x))).detach()
    power, scale = plain_search([model.last.weight.detach()], inner)
    assert power > 0
    torch.testing.assert_close(after["last.weight"].double(), model.last.weight.detach().double() * scale)


def test_the_error_is_that_of_the_gram_matrix() -> None:
    torch.manual_seed(0)
    weight, rows = torch.randn(6, 16), torch.randn(50, 16)
    scale = torch.rand(16).double() + 0.5
    reader = Reader(weight, rows, rows.abs().mean(0).double(), torch.arange(16))
    change = plain_round(weight.double() * scale, 3, 8) / scale - weight.double()
    gram = rows.double().T @ rows.double() / 50
    expected = float(torch.trace(change @ gram @ change.T))
    assert rounding_error(reader, scale, SPEC, "range") == pytest.approx(expected, rel=1e-4)


def test_power_zero_is_plain_rounding() -> None:
    assert torch.equal(scales(torch.tensor([3.0, 0.0, 1.0], dtype=torch.float64), 0.0), torch.ones(3).double())


def test_dead_channels_are_no_trouble() -> None:
    found = scales(torch.tensor([1.0, 0.0, 4.0], dtype=torch.float64), 0.5)
    assert bool(found.isfinite().all())
    assert float(found.max() * found.min()) == pytest.approx(1)
    assert torch.equal(scales(torch.zeros(3, dtype=torch.float64), 0.5), torch.ones(3).double())


def test_mean_magnitudes() -> None:
    seen = observer("absmean:1")
    seen.update(torch.tensor([[[1.0, -3.0], [2.0, 2.0]]]), 0)
    seen.update(torch.tensor([[[-4.0], [float("inf")]]]), 1)
    assert seen.result().tolist() == pytest.approx([8 / 3, 4 / 3])


# what it is for -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fit", ["range", "search"])
def test_rounding_errs_less(fit: Any) -> None:
    model, x = layers()
    expected, errors = [each.detach() for each in model(x)], []
    for steps in ([], [Awq(SPEC, fit)]):
        chosen = driver(model, (x,))
        for step in [*steps, Round(SPEC, fit=fit)]:
            chosen.run(step)
        errors.append([float((a - b).square().mean()) for a, b in zip(chosen.program.run(x), expected, strict=True)])
    assert errors[1][0] < 0.8 * errors[0][0]
    assert errors[1][1] < 0.8 * errors[0][1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_function_stays(dtype: torch.dtype) -> None:
    """The driver compares whole programs in float64 with the weights before they were rounded to their dtype."""
    model, x = layers()
    chosen = scaled(model.to(dtype), x.to(dtype))
    row = chosen.ledger.passes[-1]
    assert row.matches == 2
    assert row.measured["end to end, float64"] < 1e-9
    if dtype == torch.float32:
        for found, expected in zip(chosen.program.run(x), model(x), strict=True):
            torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-4)


# where factors go -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("norm", "bias"), [(nn.RMSNorm, False), (nn.LayerNorm, True)])
def test_a_decoder_takes_them_in_five_places(norm: Any, bias: bool) -> None:
    torch.manual_seed(0)
    model = Decoder(norm, bias).eval()
    chosen = scaled(model, example()[0])
    row = chosen.ledger.passes[-1]
    assert row.matches + sum("no factors lower" in skip.why for skip in row.skips) == 5
    assert not [skip for skip in row.skips if "cannot be rescaled" in skip.why]
    assert row.matches >= 3
    assert row.measured["end to end, float64"] < 1e-9
    torch.testing.assert_close(chosen.program.run(*example()), model(*example()).detach(), rtol=1e-4, atol=1e-4)


def test_heads_of_queries_share_the_factors_of_their_values() -> None:
    torch.manual_seed(0)
    chosen = driver(Decoder(bias=True).eval(), example())
    (fold,) = value_folds(chosen.program)
    ((reader, channels),) = fold.columns
    assert fold.rows == (("block.v.weight", 0), ("block.v.bias", 0))
    assert str(reader.args[1]) == "block_o_weight"
    assert channels.tolist() == [[*range(HEAD), *range(HEAD), *range(HEAD, 2 * HEAD), *range(HEAD, 2 * HEAD)]]


class Attention(nn.Module):
    """Queries, keys and values written side by side."""

    def __init__(self, *, swapped: bool = False, merged: bool = False) -> None:
        super().__init__()
        self.packed, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.swapped, self.merged = swapped, merged

    def forward(self, x: Tensor) -> Tensor:
        parts = self.packed(x).split(8, -1)
        q, k, v = (part.unflatten(-1, (2, 4)) for part in parts)
        if not self.swapped:  # attention over places, not over heads
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        if not self.merged:
            mixed = mixed.transpose(1, 2)
        return self.out(mixed.reshape(x.shape[0], -1, 8))


def test_sizes_may_be_dynamic() -> None:
    torch.manual_seed(0)
    ids = example()[0]
    program = capture(Decoder(), (ids,), dynamic={"ids": {0: "batch", 1: "tokens"}})
    assert [fold.size for fold in value_folds(program)] == [2 * HEAD]
    program = capture(Attention(), (torch.randn(2, 2, 8),), dynamic={"x": {0: "batch", 1: "places"}})
    assert [fold.size for fold in value_folds(program)] == [8]


def test_values_may_be_written_beside_queries_and_keys() -> None:
    torch.manual_seed(0)
    (fold,) = value_folds(driver(Attention(), (torch.randn(2, 2, 8),)).program)
    assert fold.rows == (("packed.weight", 16), ("packed.bias", 16))


@pytest.mark.parametrize("kind", ["swapped", "merged"])
def test_heads_that_are_mixed_up_share_no_factors(kind: str) -> None:
    """With two places as well as two heads, sizes alone do not tell one from the other."""
    torch.manual_seed(0)
    assert not list(value_folds(driver(Attention(**{kind: True}), (torch.randn(2, 2, 8),)).program))


class Gemma(nn.Module):
    """A norm whose gain is one more than its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24))
        self.last = nn.Linear(24, 16)
        with torch.no_grad():
            self.weight[3] = 60

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return self.last(x * (1.0 + self.weight))


def test_gains_that_are_one_more_than_a_weight() -> None:
    torch.manual_seed(0)
    model, x = Gemma().eval(), torch.randn(4, 16, 24)
    chosen = driver(model, (x,))
    chosen.run(Canonicalize())
    chosen.run(AWQ)
    assert chosen.ledger.passes[-1].matches == 1
    torch.testing.assert_close(chosen.program.run(x), model(x).detach(), rtol=1e-4, atol=1e-4)


class Gelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(24, 32), nn.Linear(32, 8)
        with torch.no_grad():
            self.first.bias[[2, 5]] = 40

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.gelu(self.first(x)))


def test_what_no_writer_can_take_is_left_alone_or_multiplied() -> None:
    torch.manual_seed(0)
    model, x = Gelu().eval(), torch.randn(64, 24)
    row = scaled(model, x).ledger.passes[-1]
    assert row.changed == 0
    assert "gelu, which writes it, does not commute with factors" in str(row.skips)
    chosen = scaled(model, x, Awq(SPEC, insert=0.1))
    assert [node for node in chosen.program.graph.nodes if node.target is aten.mul.Tensor]
    assert chosen.ledger.passes[-1].measured["end to end, float64"] < 1e-9
    assert scaled(model, x, Awq(SPEC, insert=0.99)).ledger.passes[-1].changed == 0


def test_only_selected_weights_count() -> None:
    model, x = layers()
    chosen = driver(model, (x,))
    chosen.run(AWQ, "last", lambda site: site.weight == "last.weight")
    assert chosen.ledger.passes[-1].matches == 1
    assert torch.equal(chosen.program.weights["norm.weight"], model.norm.weight.detach())


def test_rounded_weights_keep_their_grids() -> None:
    """Also those that only share an input, or its writer, with what would be rescaled."""
    model, x = layers()
    chosen = driver(model, (x,))
    chosen.run(Round(SPEC), "left", lambda site: site.weight == "left.weight")
    row = chosen.run(AWQ)
    assert row.changed == 0
    assert chosen.program.grid("left.weight") is not None
    assert [skip.why for skip in row.skips] == ["what writes or reads its input is rounded already"] * 2


def test_tied_weights_are_left_alone() -> None:
    torch.manual_seed(0)
    row = scaled(Tied().eval(), torch.randint(0, 40, (2, 7))).ledger.passes[-1]
    assert row.changed == 0
    assert {skip.where: skip.why for skip in row.skips}["head"].endswith("used elsewhere as well")


def test_bad_options() -> None:
    for options in ({"points": 1}, {"insert": 1.0}, {"fit": "hqq"}):
        with pytest.raises(PassError, match="SPARC209"):
            Awq(SPEC, **options)  # type: ignore[arg-type]
