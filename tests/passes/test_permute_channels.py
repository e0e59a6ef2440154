"""Permuting channels for N:M: the function stays, more is kept, and what cannot be permuted stays where it is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from sparc.diag import PassError
from sparc.encoding.nm import NM
from sparc.encoding.unstructured import Unstructured
from sparc.passes.prune import PermuteChannels, Prune
from sparc.passes.prune.permute import best_order, kept_score
from tests.mixtures import Mixture
from tests.mixtures import inputs as routed
from tests.passes.models import driver, models


class Block(nn.Module):
    """A residual stream with norms, attention and gated units, read and written by everything."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 16)
        self.norm, self.second, self.last = nn.LayerNorm(16), nn.RMSNorm(16), nn.LayerNorm(16)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 20)
        for parameter in (*self.norm.parameters(), *self.second.parameters(), *self.last.parameters()):
            nn.init.normal_(parameter)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        q, k, v = (f(self.norm(x)).unflatten(-1, (2, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = self.second(x)
        return self.head(self.last(x + self.down(F.silu(self.gate(y)) * self.up(y))))


class Images(nn.Module):
    """Convolutions that share channels with a batch norm and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.point, self.wide, self.out = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 12, 3), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(F.relu(self.point(F.relu(self.norm(self.first(x))))))
        return self.out(F.relu(x).mean((2, 3)))


CASES = {
    "block": (Block, (torch.randint(0, 20, (3, 7), generator=torch.Generator().manual_seed(0)),)),
    "images": (Images, (torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(0)),)),
    "mixture": (Mixture, routed("33 tokens")),
}


@pytest.mark.parametrize(
    ("case", "method"),
    [("block", "magnitude"), ("block", "wanda"), ("images", "magnitude"), ("images", "wanda"), ("mixture", "wanda")],
)
def test_the_function_stays_and_more_is_kept(case: str, method: str) -> None:
    make, inputs = CASES[case]
    model = make().eval()
    chosen = driver(model, inputs)
    before = chosen.program
    row = chosen.run(PermuteChannels(method=method))  # type: ignore[arg-type]
    assert row.matches >= 1
    assert row.measured["end to end, float64"] < 1e-9
    (found,) = chosen.program.run_flat(list(inputs))
    torch.testing.assert_close(found, model(*inputs))
    for name, weight in before.weights.items():
        assert torch.equal(chosen.program.weights[name].flatten().sort().values, weight.flatten().sort().values)
    if method == "magnitude":
        sites = [name for name in before.weights if not name.startswith(("embedding", "first"))]
        old, new = (
            sum(kept_score(_matrix(each, name), NM(2, 4)) for name in sites if _matrix(each, name) is not None)
            for each in (before, chosen.program)
        )
        assert new > 1.01 * old


def _matrix(program, name: str):
    """The magnitudes of a linear layer or 1×1 convolution whose columns come in fours."""
    weight = program.weights[name]
    matrix = weight.ndim > 1 and weight.shape[2:].numel() == 1 and weight.shape[1] % 4 == 0
    return weight.flatten(1).abs() if matrix else None


def test_every_channel_that_a_product_reads_may_move() -> None:
    chosen = driver(Block().eval(), CASES["block"][1])
    before = chosen.program
    chosen.run(PermuteChannels())
    changed = {name for name in before.weights if not torch.equal(before.weights[name], chosen.program.weights[name])}
    assert {"embedding.weight", "head.weight", "last.weight", "down.weight", "up.bias", "o.weight", "v.bias"} <= changed


def test_pruning_afterwards_loses_less() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    with torch.no_grad():
        model[2].weight[:, ::8] *= 10  # never more than one of four neighbours, but by columns
        model[2].weight[:, 1::8] *= 10
        model[2].weight[:, 2::8] *= 10
    inputs = (torch.randn(200, 12),)
    losses = []
    for steps in ([Prune()], [PermuteChannels(), Prune()]):
        chosen = driver(model, inputs)
        for step in steps:
            chosen.run(step, claims=lambda site: site.weight == "2.weight")
        with torch.no_grad():
            losses.append(float((chosen.program.run(*inputs) - model(*inputs)).square().sum()))
    assert losses[1] < 0.5 * losses[0]


def test_an_input_is_not_permuted_and_said() -> None:
    model, inputs = models()["linear"]
    skips = {skip.where: skip.why for skip in driver(model, inputs).run(PermuteChannels()).skips}
    assert skips == {"0.weight[1]": "its channels cannot be permuted: it is an input of the program"}


@pytest.mark.parametrize("size", [6, 10])
def test_channels_that_do_not_come_in_ms_stay(size: int) -> None:
    model = nn.Sequential(nn.Linear(8, size), nn.ReLU(), nn.Linear(size, 8))
    assert driver(model, (torch.randn(3, 8),)).run(PermuteChannels()).changed == 0


# the search -----------------------------------------------------------------------------------------------------------
@settings(max_examples=25)
@given(st.integers(0, 2**31), st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 8)]), st.integers(1, 6), st.integers(1, 9))
def test_an_order_is_a_permutation_that_keeps_more(seed: int, nm: tuple[int, int], stripes: int, rows: int) -> None:
    score, pattern = torch.rand(rows, nm[1] * stripes, generator=torch.Generator().manual_seed(seed)), NM(*nm)
    order = best_order(score, pattern, 16)
    if order is not None:
        assert sorted(order.tolist()) == list(range(score.shape[1]))
        assert kept_score(score[:, order], pattern) > kept_score(score, pattern)


def test_the_best_order_is_found_where_columns_say_it() -> None:
    great = torch.tensor([4.0] * 8 + [0.1] * 8)
    score = great + torch.rand(20, 16, generator=torch.Generator().manual_seed(0)) * 0.01
    order = best_order(score, NM(2, 4), 64)
    assert order is not None
    assert bool(((score[:, order].unflatten(-1, (4, 4)) > 1).sum(-1) == 2).all())
    assert best_order(score[:, order], NM(2, 4), 64) is None or kept_score(score[:, order], NM(2, 4)) > 20 * 8 * 4


def test_one_exchange_is_the_best_of_all() -> None:
    score, pattern = torch.rand(7, 8, generator=torch.Generator().manual_seed(3)), NM(2, 4)
    swaps = []
    for a in range(4):
        for b in range(4, 8):
            order = torch.arange(8)
            order[a], order[b] = b, a
            swaps.append(kept_score(score[:, order], pattern))
    found = best_order(score, pattern, 1)
    assert found is not None
    assert kept_score(score[:, found], pattern) == pytest.approx(max(swaps))


def test_equal_columns_have_no_better_order() -> None:
    assert best_order(torch.ones(3, 16), NM(2, 4), 64) is None
    assert best_order(torch.rand(3, 4), NM(2, 4), 64) is None


@pytest.mark.parametrize("options", [{"pattern": Unstructured()}, {"method": "obs"}, {"rounds": 0}, {"rounds": 2.0}])
def test_options_that_make_no_sense(options: dict[str, object]) -> None:
    with pytest.raises(PassError, match="SPARC209"):
        PermuteChannels(**options)  # type: ignore[arg-type]
