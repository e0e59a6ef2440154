"""LowRank: the nearest matrices, by themselves and by their products, in every kind of product; what stands beside."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparc
from sparc.diag import PassError
from sparc.driver import Driver
from sparc.encoding.base import Encoding
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.nm import NM
from sparc.encoding.operators import is_decode
from sparc.passes.encode import Encode
from sparc.passes.low_rank import LowRank
from sparc.passes.low_rank.decompose import decompose
from sparc.passes.round import Round
from sparc.passes.second_order.factor import factor
from sparc.testing import assert_pass
from tests.passes.models import Experts, Tied, driver

aten = torch.ops.aten


def thin(*shape: int, rank: int = 3, seed: int = 0) -> Tensor:
    """A weight `[out, reduce...]` of some rank as a matrix."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.Size(shape[1:]).numel()
    product = torch.randn(shape[0], rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    return product.reshape(shape)


def linear(weight: Tensor, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    model = nn.Linear(weight.shape[1], weight.shape[0], bias)
    model.weight = nn.Parameter(weight)
    return model


def after(model: nn.Module, x: Tensor, *steps: Any) -> Driver:
    chosen = driver(model.eval(), (x,))
    for step in steps:
        chosen.run(step)
    return chosen


def product(chosen: Driver, name: str = "weight") -> Tensor:
    weights = chosen.program.weights
    return weights[f"{name}_b"].double() @ weights[f"{name}_a"].double()


# decompositions -------------------------------------------------------------------------------------------------------
def test_the_error_is_what_is_left_of_the_singular_values() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(2, 8, 12, dtype=torch.float64)
    found = decompose(matrix)
    for rank in range(1, 9):
        b, a = found.factors(rank)
        left = torch.linalg.svdvals(matrix)[:, rank:].square().sum()
        assert float((b @ a - matrix).square().sum()) == pytest.approx(float(left), abs=1e-12)


def test_whitened_factors_are_those_of_the_published_formula() -> None:
    """`SVD(W S)` with `S Sᵀ = H`, in float64; no other matrix of the rank has nearer products."""
    torch.manual_seed(0)
    weight, x = torch.randn(8, 12).double(), torch.randn(50, 12).double() @ torch.randn(12, 12).double()
    gram = x.T @ x / 50
    root = torch.linalg.cholesky(gram + 0.01 * gram.diagonal().mean() * torch.eye(12))
    u, s, v = torch.linalg.svd(weight @ root, full_matrices=False)
    expected = u[:, :3] * s[:3] @ v[:3] @ torch.linalg.inv(root)
    b, a = decompose(weight.unsqueeze(0), factor(gram.unsqueeze(0))).factors(3)
    torch.testing.assert_close((b @ a)[0], expected, rtol=1e-4, atol=1e-4)
    plain = (lambda b, a: (b @ a)[0])(*decompose(weight.unsqueeze(0)).factors(3))
    errors = [float((x @ (each - weight).T).square().sum()) for each in (expected, plain)]
    assert errors[0] < 0.8 * errors[1]


def test_full_rank_is_the_matrix_itself() -> None:
    torch.manual_seed(0)
    weight = torch.randn(1, 6, 9)
    gram = torch.diag(torch.logspace(-3, 3, 9, dtype=torch.float64)).unsqueeze(0)
    for measure in (None, factor(gram)):
        b, a = decompose(weight, measure).factors(6)
        torch.testing.assert_close((b @ a).float(), weight, rtol=1e-4, atol=1e-5)


# ranks ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "rank"), [({"rank": 5}, 5), ({"share": 0.5}, 8), ({"share": 0.25}, 4), ({"energy": 0.9}, 3)]
)
def test_how_a_rank_is_chosen(options: dict[str, Any], rank: int) -> None:
    weight = torch.zeros(32, 32)
    weight[range(32), range(32)] = torch.tensor([4.0, 2.0, 2.0, *[0.2] * 29])  # 3 of them have 24 of 25.16
    chosen = after(linear(weight), torch.randn(4, 32), LowRank(**options))
    assert chosen.program.weights["weight_a"].shape == (rank, 32)
    assert chosen.program.weights["weight_b"].shape == (32, rank)
    assert "weight" not in chosen.program.weights


def test_what_would_not_get_smaller_stays() -> None:
    row = after(linear(torch.randn(16, 16)), torch.randn(4, 16), LowRank(rank=8)).ledger.passes[-1]
    assert row.changed == 0
    assert row.skips[0].why == "it takes 1024 bytes as it is and 1024 with factors of rank 8"
    assert after(linear(torch.randn(16, 16)), torch.randn(4, 16), LowRank(energy=1.0)).ledger.passes[-1].changed == 0


# every kind of product ------------------------------------------------------------------------------------------------
class Products(nn.Module):
    """`mm`, `addmm` and `matmul` with weights `[in, out]`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Parameter(thin(16, 16, seed=seed)) for seed in range(3))
        self.bias = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.mm(x, self.first)
        return torch.matmul(torch.addmm(self.bias, x, self.second).unsqueeze(0), self.third)


def thin_experts() -> nn.Module:
    model = Experts()
    model.first = nn.Parameter(thin(12, 16, rank=2))
    model.experts = nn.Parameter(torch.stack([thin(16, 10, rank=2, seed=seed) for seed in range(3)]))
    return model


class Runs(nn.Module):
    """Runs of rows, each times its own matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.stack([thin(10, 16, rank=2, seed=seed) for seed in range(3)]))
        self.register_buffer("ends", torch.tensor([4, 9, 12]))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.ops.sparc.grouped_linear(x, self.experts, self.ends)
        return result


def convolution(kind: type[nn.Module], *shape: int, **options: Any) -> nn.Module:
    """A convolution whose weight `[out, in / groups, *kernel]` has rank 2 in each group."""
    groups = options.get("groups", 1)
    model = kind(shape[1] * groups, shape[0], shape[2:], **options)
    model.weight = nn.Parameter(  # type: ignore[assignment]
        torch.cat([thin(shape[0] // groups, *shape[1:], rank=2, seed=seed) for seed in range(groups)])
    )
    return model


PRODUCTS = {
    "linear": (lambda: linear(thin(16, 20)), (2, 3, 20), 3, 1),
    "no bias": (lambda: linear(thin(16, 20), bias=False), (5, 20), 3, 1),
    "products": (Products, (5, 16), 3, 3),
    "experts": (thin_experts, (5, 12), 2, 2),
    "runs": (Runs, (12, 16), 2, 1),
    "conv1d": (lambda: convolution(nn.Conv1d, 8, 6, 3, padding=1), (2, 6, 9), 2, 1),
    "conv2d": (lambda: convolution(nn.Conv2d, 8, 6, 3, 2, stride=(2, 1), padding=(1, 0)), (2, 6, 9, 7), 2, 1),
    "conv3d": (lambda: convolution(nn.Conv3d, 8, 2, 2, 2, 2, dilation=2, bias=False), (1, 2, 5, 5, 5), 2, 1),
    "same": (lambda: convolution(nn.Conv2d, 8, 6, 3, 3, padding="same"), (2, 6, 5, 5), 2, 1),
    "grouped": (lambda: convolution(nn.Conv2d, 16, 4, 3, 3, groups=2), (2, 8, 6, 6), 2, 1),
}


@pytest.mark.parametrize("name", sorted(PRODUCTS))
@pytest.mark.parametrize("method", ["svd", "whitened"])
def test_a_weight_of_that_rank_loses_nothing(name: str, method: Any) -> None:
    make, shape, rank, count = PRODUCTS[name]
    torch.manual_seed(0)
    model, x = make(), torch.randn(*shape)
    chosen = after(model, x, LowRank(rank=rank, method=method))
    row = chosen.ledger.passes[-1]
    assert (row.matches, row.measured["sites measured"]) == (count, count)
    assert row.measured["worst snr_db"] > 80
    assert row.bytes_after < row.bytes_before
    torch.testing.assert_close(chosen.program.run(x), model(x).detach(), rtol=1e-3, atol=1e-3)
    assert chosen.run(LowRank(rank=1, method=method)).changed == 0  # factors are not split again


@pytest.mark.parametrize("beside", [None, IntGrid(4, 8)], ids=str)
@pytest.mark.parametrize("name", ["linear", "products", "conv2d"])
def test_the_whole_contract(name: str, beside: Encoding | None) -> None:
    """Types, storing, and another size of a dynamic dimension."""
    make, shape, _, _ = PRODUCTS[name]
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(*shape)
    argument = "x" if name == "products" else "input"
    assert_pass(LowRank(rank=1, beside=beside), model, (x,), dynamic={argument: {0: "batch"}})


def test_convolutions_along_their_axes() -> None:
    """A kernel that is a product of a column and a row has rank 1 for each pair of channels."""
    torch.manual_seed(0)
    model = nn.Conv2d(6, 8, (3, 5), stride=(1, 2), padding=(1, 2), dilation=(2, 1))
    v, h = torch.randn(2, 6, 3), torch.randn(8, 2, 5)
    model.weight = nn.Parameter(torch.einsum("riy,orx->oiyx", v, h))
    x = torch.randn(2, 6, 9, 8)
    chosen = after(model, x, LowRank(rank=2, spatial=True))
    assert chosen.program.weights["weight_a"].shape == (2, 6, 3, 1)
    assert chosen.program.weights["weight_b"].shape == (8, 2, 1, 5)
    torch.testing.assert_close(chosen.program.run(x), model(x).detach(), rtol=1e-4, atol=1e-4)
    before = driver(model, (x,)).program.weights["weight"]
    model.weight = nn.Parameter(before + 0.1 * torch.randn_like(before))
    chosen = after(model, x, LowRank(rank=2, spatial=True, beside=IntGrid(4, 9)))
    assert chosen.ledger.passes[-1].measured["worst snr_db"] > 20
    row = after(linear(thin(16, 16)), torch.randn(2, 16), LowRank(spatial=True)).ledger.passes[-1]
    assert row.skips[0].why == "it is no convolution of images in one group"


def test_products_of_data_are_nearer_with_data() -> None:
    torch.manual_seed(0)
    model = linear(torch.randn(24, 24))
    x = torch.randn(64, 24) * torch.logspace(-1, 1, 24)
    noise = [
        float((after(model, x, LowRank(method=method)).program.run(x) - model(x)).detach().square().mean())  # type: ignore[arg-type]
        for method in ("svd", "whitened")
    ]
    assert noise[1] < 0.3 * noise[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_factors_have_the_dtype_of_the_weight(dtype: torch.dtype) -> None:
    chosen = after(linear(thin(16, 16)).to(dtype), torch.randn(4, 16, dtype=dtype), LowRank())
    assert {chosen.program.weights[f"weight_{name}"].dtype for name in "ab"} == {dtype}


# what is left alone ---------------------------------------------------------------------------------------------------
def test_tied_weights_are_left_alone() -> None:
    torch.manual_seed(0)
    row = after(Tied(), torch.randint(0, 40, (2, 7)), LowRank()).ledger.passes[-1]
    assert {skip.where: skip.why for skip in row.skips} == {"embedding.weight": "it is read 2 times"}
    assert row.matches == 1


def test_sites_below_the_floor_are_restored() -> None:
    torch.manual_seed(0)
    model = linear(torch.randn(16, 16))
    x = torch.randn(4, 16)
    for beside in (None, IntGrid(2, 16)):
        chosen = after(model, x, LowRank(rank=1, floor=40.0, beside=beside))
        assert chosen.ledger.passes[-1].measured["restored"] == 1
        assert set(chosen.program.weights) == {"weight", "bias"}
        torch.testing.assert_close(chosen.program.run(x), model(x).detach())


def test_bad_options() -> None:
    bad: list[dict[str, Any]] = [{"share": 1.0}, {"rank": 0}, {"energy": 0.0}, {"rank": 2, "energy": 0.5}]
    bad += [{"iterations": 0}, {"spatial": True, "method": "whitened"}, {"damping": -1.0}]
    for options in bad:
        with pytest.raises(PassError, match="SPARC209"):
            LowRank(**options)


# with other steps -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["nearest", "gptq"])
def test_factors_are_rounded_and_encoded_like_any_weight(method: Any) -> None:
    torch.manual_seed(0)
    model, x = linear(thin(32, 32)), torch.randn(32, 32)
    chosen = after(model, x, LowRank(share=0.5), Round(IntGrid(8), method=method), Encode())
    assert chosen.ledger.passes[1].matches == 2
    assert sum(is_decode(node) for node in chosen.program.graph.nodes) == 2
    expected = model(x).detach()
    assert float((chosen.program.run(x) - expected).norm() / expected.norm()) < 0.03


@pytest.mark.parametrize("name", ["linear", "products", "experts", "conv2d", "grouped"])
@pytest.mark.parametrize("encoding", [IntGrid(4, 8), NM(1, 2)], ids=str)
def test_factors_make_up_for_what_stands_beside(name: str, encoding: Encoding) -> None:
    make, shape, _, count = PRODUCTS[name]
    torch.manual_seed(0)
    model, x = make(), torch.randn(*shape)
    chosen = driver(model.eval(), (x,))
    expected = model(x).detach()
    chosen.run(LowRank(rank=1, beside=encoding))
    row = chosen.ledger.passes[-1]
    assert row.matches + len(row.skips) == count
    assert row.matches > 0
    plain = after(model, x, Round(encoding)).ledger.passes[-1]
    assert row.measured["median snr_db"] > plain.measured["median snr_db"]
    values = chosen.program.run(x)
    chosen.run(Encode())
    assert torch.equal(chosen.program.run(x), values)
    assert values.shape == expected.shape


def test_beside_is_the_plain_alternation() -> None:
    """LoftQ: round what the factors miss, decompose what rounding misses."""
    torch.manual_seed(0)
    weight, encoding = torch.randn(24, 32), IntGrid(2, 16)
    low, errors = torch.zeros(24, 32, dtype=torch.float64), []
    for _ in range(3):
        rest = (weight.double() - low).float()
        rounded = encoding.round(rest, encoding.fit(rest)).double()
        u, s, v = torch.linalg.svd(weight.double() - rounded, full_matrices=False)
        low = u[:, :2] * s[:2] @ v[:2]
        errors.append(float((weight - rounded - low).square().sum()))
    for iterations in (1, 2, 3):
        step = LowRank(rank=2, beside=encoding, iterations=iterations)
        chosen = after(linear(weight), torch.randn(4, 32), step)
        error = float((weight - chosen.program.weights["weight"] - product(chosen)).square().sum())
        assert error == pytest.approx(min(errors[:iterations]), rel=1e-4)
        grid = chosen.program.grid("weight")
        assert grid is not None
        assert grid.spec == encoding


def test_a_mask_beside_is_kept_by_rounding() -> None:
    """Sparse and of low rank: the mask is chosen for what the factors miss."""
    torch.manual_seed(0)
    sparse = torch.randn(32, 32) * (torch.arange(32) % 4 < 2)
    model, x = linear(sparse + thin(32, 32, rank=2)), torch.randn(16, 32)
    errors = []
    for iterations in (1, 12):
        chosen = after(model, x, LowRank(rank=2, beside=NM(2, 4), iterations=iterations))
        errors.append(
            float((model.weight - chosen.program.weights["weight"] - product(chosen)).detach().square().sum())
        )
    assert errors[1] < 0.5 * errors[0]
    zeros = chosen.program.weights["weight"] == 0
    assert int(zeros.sum()) == 32 * 16
    chosen.run(Round(IntGrid(8)))
    grid = chosen.program.grid("weight")
    assert grid is not None
    assert grid.spec == NM(2, 4, of=IntGrid(8))
    assert bool((chosen.program.weights["weight"][zeros] == 0).all())
    chosen.run(Encode())
    assert sum(is_decode(node) for node in chosen.program.graph.nodes) == 3


def test_a_report_counts_the_factors_with_the_weight_they_stand_beside() -> None:
    steps = [LowRank(rank=2, beside=IntGrid(8)), Encode()]
    artifact = sparc.compile(
        linear(thin(24, 32)), (torch.randn(5, 32),), recipe=steps, target="reference", measure=False
    )
    found = {row.weight: (row.encoding, row.file_bytes) for row in artifact.ledger.sites}
    eight = IntGrid(8)
    assert found == {"weight": (f"{eight} + dense", int(eight.bytes((24, 32))) + 4 * 2 * (24 + 32))}
