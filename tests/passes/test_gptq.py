"""Rounding by a sweep over columns: the published formula in float64, its identities, every encoding, every product."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparc.analysis.sites import find_sites
from sparc.calibration import Calibration
from sparc.diag import PassError
from sparc.encoding.base import ElementEncoding, Encoding
from sparc.encoding.binary_code import BinaryCode
from sparc.encoding.codebook import Codebook
from sparc.encoding.dense import Dense
from sparc.encoding.float8 import Float8
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.microscaling import MXFP4, NVFP4
from sparc.encoding.nm import NM
from sparc.pass_base import PassContext
from sparc.passes.encode import Encode
from sparc.passes.prune import Prune
from sparc.passes.rotate import Rotate
from sparc.passes.round import Round
from sparc.passes.second_order.factor import factor
from sparc.passes.second_order.gram import gram_watches, reconstruction_error, site_gram
from sparc.passes.second_order.sweep import sweep
from tests.passes.models import Tied, driver, models
from tests.passes.rotated import Decoder, example

SPEC = IntGrid(3, 8, symmetric=False)


def correlated(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Inputs whose columns hang together and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return mixed * torch.logspace(-0.5, 0.5, columns)


def gram_of(x: Tensor) -> Tensor:
    return (x.double().T @ x.double() / len(x)).unsqueeze(0)


def linear(weight: Tensor) -> nn.Linear:
    model = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    model.weight = nn.Parameter(weight)
    return model


def after(model: nn.Module, x: Tensor, *steps: Any) -> Any:
    chosen = driver(model.eval(), (x,))
    for step in steps:
        chosen.run(step)
    return chosen


def gptq(encoding: Encoding = SPEC, **options: Any) -> Round:
    return Round(encoding, method="gptq", **options)


# the formula ----------------------------------------------------------------------------------------------------------
def plain_gptq(weight: Tensor, gram: Tensor, order: list[int], damping: float = 0.01) -> tuple[Tensor, float]:
    """A column at a time, with the inverse of what is left made anew: `w -= (w_q - q) / [H⁻¹]_qq * H⁻¹_q`."""
    encoding = IntGrid(3, 8, symmetric=False)
    grid = encoding.fit(weight)
    scale, zero = (grid.tensors[name].double().repeat_interleave(8, 1) for name in ("scale", "zero"))
    h = gram + damping * gram.diagonal().mean() * torch.eye(len(gram))
    rest, done, cost = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.float64), 0.0
    for place, j in enumerate(order):
        left = order[place:]
        inverse = torch.linalg.inv(h[left][:, left])
        done[:, j] = ((rest[:, j] / scale[:, j]).round() + zero[:, j]).clamp(0, 7).sub(zero[:, j]) * scale[:, j]
        error = rest[:, j] - done[:, j]
        cost += float((error.square() / inverse[0, 0]).sum())
        rest[:, left] -= error[:, None] / inverse[0, 0] * inverse[0]
    return done, cost


@pytest.mark.parametrize("activation_order", [False, True])
def test_the_sweep_is_the_published_one(activation_order: bool) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(6, 24), correlated(100, 24)
    gram = gram_of(x)
    order = gram[0].diagonal().argsort(descending=True).tolist() if activation_order else list(range(24))
    expected, cost = plain_gptq(weight, gram[0], order)
    grid = SPEC.fit(weight)
    swept = sweep(
        weight.unsqueeze(0),
        factor(gram, descending=activation_order),
        lambda values, at: rounded_column(grid, values, at),
    )
    torch.testing.assert_close(swept.weight[0].double(), expected, rtol=1e-5, atol=1e-5)
    assert swept.cost == pytest.approx(cost, rel=1e-4)
    nearest = SPEC.round(weight, grid).double()  # which rows keep that have less error so
    errors = [reconstruction_error((each - weight).unsqueeze(0), gram)[0] for each in (expected, nearest)]
    expected = torch.where((errors[0] > errors[1])[:, None], nearest, expected)
    found = after(linear(weight), x, gptq(activation_order=activation_order)).program.weights["weight"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("columns", [24, 300])  # within a block of the sweep, and over three
def test_its_steps_cost_what_the_whole_change_costs(columns: int) -> None:
    """The sum of squared errors is `tr(D H Dᵀ)`, for rounding to any values."""
    torch.manual_seed(0)
    weight, gram = torch.randn(1, 5, columns), gram_of(correlated(columns + 50, columns))
    found = sweep(weight, factor(gram, descending=True), lambda values, _: (values * 2).round() / 2)
    damped = gram + 0.01 * gram[0].diagonal().mean() * torch.eye(columns)
    change = (found.weight - weight).double()
    assert found.cost == pytest.approx(float(torch.trace(change[0] @ damped[0] @ change[0].T)), rel=1e-3)
    assert torch.equal(found.weight * 2, (found.weight * 2).round())


def test_the_factor_says_what_later_columns_can_make_up() -> None:
    gram = gram_of(correlated(60, 12))
    found = factor(gram)
    damped = gram[0] + 0.01 * gram[0].diagonal().mean() * torch.eye(12)
    for j in range(12):
        expected = torch.linalg.inv(damped[j:, j:])[0, 0]
        assert float(found.upper[0, j, j]) ** 2 == pytest.approx(float(expected), rel=1e-4)


def test_a_gram_matrix_without_full_rank_is_damped_more() -> None:
    found = factor(gram_of(correlated(3, 12)), damping=0.0)
    assert bool(found.upper.isfinite().all())


def test_nothing_makes_up_for_anything_where_inputs_are_independent() -> None:
    """A diagonal Gram matrix: bitwise the nearest values."""
    torch.manual_seed(0)
    weight = torch.randn(1, 6, 24)
    gram = torch.diag(torch.rand(24).double() + 0.1).unsqueeze(0)
    grid = SPEC.fit(weight[0])
    found = sweep(weight, factor(gram, descending=True), lambda values, at: rounded_column(grid, values, at))
    assert torch.equal(found.weight[0], SPEC.round(weight[0], grid))


def rounded_column(grid: Any, values: Tensor, at: int) -> Tensor:
    own = grid.spec.at_column(grid, at)
    found: Tensor = own.spec.round(values.reshape(-1, 1), own).reshape(values.shape)
    return found


# grids ----------------------------------------------------------------------------------------------------------------
ENCODINGS: list[ElementEncoding] = [
    IntGrid(4, "channel"),
    IntGrid(4, "tensor"),
    IntGrid(3, 8),
    IntGrid(2, 10, symmetric=False),
    IntGrid(3, 8, symmetric=False, zero="minimum"),
    Float8(16),
    MXFP4(),
    NVFP4(),
    Codebook(group=16),
    Codebook("kmeans", 3, "channel"),
    BinaryCode(2, 16),
    BinaryCode(3, "channel"),
]


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_columns_round_as_the_matrix_does(encoding: ElementEncoding) -> None:
    torch.manual_seed(0)
    weight = torch.randn(2, 4, 42)  # a batch, whose rows no group divides
    grid = encoding.fit(weight)
    whole = encoding.round(weight, grid)
    for column in (0, 7, 8, 31, 41):
        own = encoding.at_column(grid, column)
        assert own is not None
        assert torch.equal(own.spec.round(weight[..., column : column + 1], own), whole[..., column : column + 1])


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_every_encoding_gains_and_stays_on_its_grid(encoding: ElementEncoding) -> None:
    torch.manual_seed(0)
    x = correlated(200, 42)
    x[:, [3, 17]] = 0  # calibration meets only zeros there
    weight = torch.randn(24, 42)
    model, gram = linear(weight), gram_of(x)
    chosen, plain = (after(model, x, Round(encoding, method=method)).program for method in ("gptq", "nearest"))
    found, nearest = chosen.weights["weight"], plain.weights["weight"]
    grid = chosen.grid("weight")
    assert grid is not None
    assert torch.equal(grid.spec.round(found, grid), found)
    errors, before = (reconstruction_error((each - weight).unsqueeze(0), gram)[0] for each in (found, nearest))
    assert bool((errors <= before * (1 + 1e-6)).all())
    assert float(errors.sum()) < 0.8 * float(before.sum())
    for name, tensor in plain.grid("weight").tensors.items():  # type: ignore[union-attr]
        assert torch.equal(tensor, grid.tensors[name])
    assert bool(found.isfinite().all())
    assert torch.equal(found[:, [3, 17]], nearest[:, [3, 17]])  # nothing depends on what they miss


def test_the_order_of_the_sweep_leaves_the_layout() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(8, 24), correlated(100, 24)
    first, second = (after(linear(weight), x, gptq(activation_order=order)).program for order in (False, True))
    assert not torch.equal(first.weights["weight"], second.weights["weight"])
    grids = [each.grid("weight") for each in (first, second)]
    assert grids[0].spec == grids[1].spec == SPEC  # type: ignore[union-attr]
    assert all(torch.equal(tensor, grids[1].tensors[name]) for name, tensor in grids[0].tensors.items())  # type: ignore[union-attr]


@pytest.mark.parametrize("fit", ["search", "hqq"])
def test_grids_may_be_fitted_in_every_way(fit: Any) -> None:
    torch.manual_seed(0)
    spec = IntGrid(3, 8, symmetric=False, zero="minimum")
    weight, x = torch.randn(8, 24), correlated(100, 24)
    chosen, plain = (after(linear(weight), x, Round(spec, fit, method=how)) for how in ("gptq", "nearest"))  # type: ignore[arg-type]
    assert not torch.equal(chosen.program.weights["weight"], plain.program.weights["weight"])


# masks ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("inner", [Dense(), IntGrid(4, 8)], ids=str)
def test_a_mask_is_chosen_on_the_way(inner: ElementEncoding) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(16, 24), correlated(200, 24)
    found = after(linear(weight), x, gptq(NM(2, 4, of=inner))).program.weights["weight"]
    wanda = after(linear(weight), x, Prune(method="wanda"), Round(inner)).program.weights["weight"]
    assert bool(((found != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all())
    errors = [float(reconstruction_error((each - weight).unsqueeze(0), gram_of(x)).sum()) for each in (found, wanda)]
    assert errors[0] < 0.8 * errors[1]


def test_a_mask_that_exists_is_kept() -> None:
    torch.manual_seed(0)
    chosen = after(linear(torch.randn(16, 24)), correlated(100, 24), Prune(NM(2, 4)))
    zeros = chosen.program.weights["weight"] == 0
    chosen.run(gptq(IntGrid(4, 8)))
    assert bool((chosen.program.weights["weight"][zeros] == 0).all())
    assert chosen.program.grid("weight").spec == NM(2, 4, of=IntGrid(4, 8))


# every product --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", sorted(models()))
@pytest.mark.parametrize("encoding", [IntGrid(4, 7), BinaryCode(2, 8)], ids=str)
def test_every_product_can_be_swept(name: str, encoding: Encoding) -> None:
    model, inputs = models()[name]
    chosen = driver(model, inputs)
    row = chosen.run(gptq(encoding))
    assert row.matches > 0
    before = chosen.program.run(*inputs)
    for weight in chosen.program.weights:
        grid = chosen.program.grid(weight)
        if grid is not None:
            matrix = next(site for site in find_sites(chosen.program)[0] if site.weight == weight).view.to_matrix(
                chosen.program.weights[weight]
            )
            assert torch.equal(grid.spec.round(matrix, grid), matrix)
    chosen.run(Encode())
    assert torch.equal(chosen.program.run(*inputs), before)


CONVOLUTIONS = {
    "grouped": nn.Conv2d(8, 16, 3, groups=2, bias=False),
    "depthwise": nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
    "strided": nn.Conv2d(8, 4, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2), bias=False),
    "same": nn.Conv2d(8, 4, (3, 5), padding="same", dilation=(2, 1), bias=False),
    "flat": nn.Conv1d(8, 6, 3, stride=2, padding=1, groups=2, bias=False),
    "linear": nn.Linear(9, 5, bias=False),
}


@pytest.mark.parametrize("name", sorted(CONVOLUTIONS))
def test_the_gram_matrix_says_what_a_change_does_to_the_output(name: str) -> None:
    """`tr(D G Dᵀ)` is the mean square of what the product with D writes, summed over its channels."""
    torch.manual_seed(0)
    model = CONVOLUTIONS[name].double()
    change = torch.randn_like(model.weight)  # type: ignore[arg-type]
    model.weight = nn.Parameter(change)  # type: ignore[assignment]
    x = torch.randn(*((3, 8, 9) if name == "flat" else (3, 8, 9, 9)), dtype=torch.float64)
    chosen = driver(model, (x,))
    (site,) = find_sites(chosen.program)[0]
    context = PassContext()
    calibration = Calibration(chosen.program, chosen.samples.calibration)
    context.statistics = calibration.gather(0, gram_watches(chosen.program, context))
    gram = site_gram(chosen.program, site, context)
    assert gram is not None
    matrix = site.view.to_matrix(change).reshape(gram.shape[0], -1, gram.shape[-1])
    written = model(x).detach()
    expected = (
        written.square().mean(dim=[axis for axis in range(written.ndim) if axis != 1])
        if name != "linear"
        else (written.square().flatten(0, -2).mean(0))
    )
    torch.testing.assert_close(reconstruction_error(matrix, gram).flatten(), expected, rtol=1e-4, atol=1e-6)


class Runs(nn.Module):
    """Runs of rows, each times its own matrix; one has no rows."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(4, 10, 16))
        self.register_buffer("ends", torch.tensor([20, 20, 50, 60]))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.ops.sparc.grouped_linear(x, self.experts, self.ends)
        return result


def test_each_expert_is_swept_on_its_own_rows() -> None:
    """One without any counts all rows."""
    torch.manual_seed(0)
    model, x = Runs(), torch.cat([correlated(30, 16, seed) for seed in range(2)])
    weight, step = model.experts.detach(), gptq(activation_order=False)  # experts share the order
    found = after(model, x, step).program.weights["experts"]
    for expert, rows in enumerate((slice(0, 20), slice(0, 60), slice(20, 50), slice(50, 60))):
        expected = after(linear(weight[expert]), x[rows], step).program.weights["weight"]
        torch.testing.assert_close(found[expert], expected)


# with other steps -----------------------------------------------------------------------------------------------------
def test_later_layers_are_swept_on_what_earlier_ones_now_write() -> None:
    """The end-to-end error of two layers falls, not only each layer's own."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 8)), correlated(200, 24)
    expected = model(x).detach()
    errors = [
        float((after(model, x, step).program.run(x) - expected).square().mean()) for step in (gptq(), Round(SPEC))
    ]
    assert errors[0] < 0.7 * errors[1]


def test_a_rotation_before_the_sweep_helps_where_channels_stand_out() -> None:
    """Rotate, then round by a sweep: less error than without the rotation, and than rotated and rounded to nearest."""
    torch.manual_seed(0)
    model = Decoder(bias=False).eval()
    with torch.no_grad():
        model.embedding.weight[:, 2] *= 30  # a feature of the residual stream that is far larger than the others
        model.positions[:, 2] *= 30
        for norm in (model.block.norm1, model.block.norm2, model.norm):
            norm.weight.fill_(1.0)
        for layer in (model.block.q, model.block.k, model.block.v, model.block.gate, model.block.up, model.head):
            layer.weight[:, 2] *= 8
    x = example()[0]
    expected = model(x).detach()

    def error(*steps: Any) -> float:
        return float((after(model, x, *steps).program.run(x) - expected).square().mean())

    spec = IntGrid(4, "channel")
    rotated = error(Rotate(), gptq(spec))
    assert rotated < 0.7 * error(gptq(spec))
    assert rotated < error(Rotate(), Round(spec))


# what is left alone ---------------------------------------------------------------------------------------------------
def test_what_meets_nothing_is_rounded_to_nearest_with_a_remark() -> None:
    torch.manual_seed(0)
    model = nn.Embedding(40, 16)
    x = torch.randint(0, 40, (2, 7))
    chosen, plain = (after(model, x, step) for step in (gptq(IntGrid(4, 8)), Round(IntGrid(4, 8))))
    assert torch.equal(chosen.program.weights["weight"], plain.program.weights["weight"])
    (remark,) = list(chosen.diagnostics)
    assert remark.what == "weight was rounded to nearest"
    tied = after(Tied(), x, gptq(IntGrid(4, 8)))
    assert not list(tied.diagnostics)  # the head that shares it says what it is multiplied with


def test_bad_options() -> None:
    bad: list[dict[str, Any]] = [{"finer": IntGrid(8), "budget": 0.3}, {"damping": -1.0}, {"damping": float("inf")}]
    for options in bad:
        with pytest.raises(PassError, match="SPARC209"):
            gptq(**options)
