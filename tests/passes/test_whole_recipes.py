"""What only shows when a recipe is compiled as a whole: claims, reports, inputs of odd kinds."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparc
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.nm import NM
from sparc.encoding.unstructured import Unstructured
from sparc.passes.encode import Encode
from sparc.passes.equalize.smooth import Smooth
from sparc.passes.low_rank import LowRank
from sparc.passes.prune import Prune
from sparc.passes.recipes import prepare
from sparc.passes.rotate import Rotate
from sparc.passes.round import Round


def compiled(model: nn.Module, data: list[Any], *steps: Any, **options: Any) -> sparc.Artifact:
    options = {"target": "reference", "data": data, **options}
    first = data[0] if isinstance(data[0], tuple) else (data[0],)
    return sparc.compile(model.eval(), first, recipe=[*steps, Encode()], measure=False, **options)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batches(*shape: int, count: int = 8) -> list[tuple[Tensor]]:
    return [(seeded(*shape, seed=seed),) for seed in range(count)]


def two_layers(width: int = 64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


# weights that a pass makes ------------------------------------------------------------------------------------------
def test_factors_of_low_rank_are_rounded_and_reported_with_the_weight_they_come_from() -> None:
    artifact = compiled(two_layers(), batches(32, 64), LowRank(rank=8), Round(IntGrid(8)))
    assert {name for name in artifact.program.weights if name.endswith("_codes")} == {
        f"{layer}.weight_{factor}_codes" for layer in (0, 2) for factor in "ab"
    }
    rows = {row.weight: row for row in artifact.ledger.sites}
    assert set(rows) == {"0.weight", "2.weight"}
    for row in rows.values():
        assert row.encoding == "IntGrid(bits=8)"
        assert row.file_bytes == 2 * 8 * 64 + 4 * (8 + 64)  # codes of both factors, a scale for each row
        assert row.snr_db is not None
        assert 0 < row.snr_db < 30


def test_a_selector_of_the_weight_selects_its_factors() -> None:
    steps = (LowRank(rank=8), sparc.Step(Round(IntGrid(8)), where="2.*"))
    artifact = compiled(two_layers(), batches(32, 64), *steps)
    assert [row.encoding for row in artifact.ledger.sites] == ["dense", "IntGrid(bits=8)"]


def test_the_error_of_low_rank_beside_a_rounded_weight_is_the_sites() -> None:
    model = two_layers()[0]
    artifact = compiled(model, batches(32, 64), LowRank(rank=4, beside=IntGrid(3, 32)))
    x = batches(32, 64)[3][0]  # held out, and what is reported on
    with torch.no_grad():
        wanted = model(x)
        measured = 20 * torch.log10(wanted.norm() / (artifact(x) - wanted).norm())
    (row,) = artifact.ledger.sites
    assert row.snr_db == pytest.approx(float(measured), abs=0.01)
    assert row.encoding == "IntGrid(bits=3, group=32) + dense"
    assert row.file_bytes > 4 * 4 * (64 + 64)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.inner = nn.Embedding(48, 32), nn.RMSNorm(32), nn.Linear(32, 32)
        self.last, self.head = nn.RMSNorm(32), nn.Linear(32, 48, bias=False)
        self.head.weight = self.embed.weight
        with torch.no_grad():
            self.last.weight.mul_(1 + torch.rand(32))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(self.last(x + self.inner(self.norm(x))))  # type: ignore[no-any-return]


def test_a_head_that_was_untied_is_rounded() -> None:
    tokens = [(torch.arange(12).reshape(2, 6) + shift,) for shift in range(8)]
    artifact = compiled(Tied(), tokens, *prepare(), Rotate(untie=True), Round(IntGrid(4, 32)))
    assert {row.weight: row.encoding for row in artifact.ledger.sites}["head.weight"] == "IntGrid(bits=4, group=32)"


# shared weights -----------------------------------------------------------------------------------------------------
class Gained(nn.Module):
    """A layer of its own gains around a linear layer that others have, too."""

    def __init__(self, linear: nn.Linear, seed: int) -> None:
        super().__init__()
        self.linear, self.gain = linear, nn.Parameter(torch.exp(2 * seeded(32, seed=seed)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x * self.gain)) + x


def test_a_weight_of_several_blocks_is_pruned_by_the_inputs_of_all_of_them() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(32, 32), seeded(64, 32)
    model = nn.Sequential(*(Gained(linear, seed) for seed in range(3))).eval()
    squares: list[Tensor] = []
    watch = linear.register_forward_pre_hook(lambda _, given: squares.append(given[0].square().mean(0)))
    with torch.no_grad():
        model(x)
    watch.remove()
    scores = linear.weight.abs() * torch.stack(squares).mean(0).sqrt()
    kept = scores > scores.median(1, keepdim=True).values  # of an even number the lower one
    recipe = [Prune(Unstructured(), density=0.5, method="wanda")]
    artifact = sparc.compile(model, (x,), recipe=recipe, data=[(x,)] * 4, target="reference", measure=False)
    assert torch.equal(artifact.program.weights["0.linear.weight"] != 0, kept)


# inputs -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_swept_weights_are_encoded_without_another_difference(rows: int, dtype: torch.dtype) -> None:
    model = two_layers(32).to(dtype)
    data = [(x.to(dtype),) for (x,) in batches(rows, 32)]
    artifact = compiled(model, data, Round(IntGrid(4, 16), method="gptq"))
    assert all(row.encoding == "IntGrid(bits=4, group=16)" for row in artifact.ledger.sites)


@pytest.mark.parametrize("shape", [(8, 9, 9), (8, 40)])
def test_images_and_signals_without_a_batch_are_calibrated_on(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = (nn.Conv2d if len(shape) == 3 else nn.Conv1d)(8, 16, 3, padding=1)
    alone = compiled(model, batches(*shape), Round(IntGrid(4, 8), method="gptq"))
    batched = compiled(model, [(x.unsqueeze(0),) for (x,) in batches(*shape)], Round(IntGrid(4, 8), method="gptq"))
    assert torch.equal(alone.program.weights["weight_codes"], batched.program.weights["weight_codes"])


def test_a_generator_may_fill_one_buffer_again_and_again() -> None:
    model, kept = two_layers(32), [(x * (1 + torch.arange(32)),) for (x,) in batches(16, 32)]

    def refilled() -> Iterator[tuple[Tensor]]:
        buffer = torch.empty(16, 32)
        for (x,) in kept:
            buffer.copy_(x)
            yield (buffer,)

    steps = Prune(NM(2, 4), method="wanda"), Encode()
    both = [
        sparc.compile(model.eval(), kept[0], recipe=[*steps], data=data, target="reference", measure=False)
        for data in (kept, refilled())
    ]
    assert torch.equal(*(artifact(kept[0][0]) for artifact in both))


def test_an_infinity_in_the_data_is_no_reason_to_smooth() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Sigmoid(), nn.Linear(64, 32))
    data = batches(8, 32)
    data[1][0][0, 0] = float("inf")
    artifact = compiled(model, data, Smooth(), Round(IntGrid(8)))
    assert not [name for name in artifact.program.weights if "smooth" in name]


# choices ------------------------------------------------------------------------------------------------------------
class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.linear = nn.Embedding(64, 64), nn.Linear(64, 64)
        self.depthwise = nn.Conv1d(64, 64, 4, groups=64)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.depthwise(self.linear(self.embed(tokens)).transpose(1, 2))  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", ["nearest", "gptq"])
def test_rounding_chooses_no_mask_where_zeros_are_of_no_use(method: str) -> None:
    tokens = [(torch.arange(14).reshape(2, 7) + shift,) for shift in range(8)]
    artifact = compiled(Lookup(), tokens, Round(NM(2, 4, of=IntGrid(8)), method=method))
    encodings = {row.weight: row.encoding for row in artifact.ledger.sites}
    assert encodings["linear.weight"] == "NM(n=2, m=4, of=IntGrid(bits=8))"
    assert encodings["embed.weight"] == encodings["depthwise.weight"] == "IntGrid(bits=8)"
    assert "was rounded to IntGrid(bits=8) without a mask" in str(list(artifact.diagnostics))


def test_a_finer_encoding_that_is_no_finer_is_not_taken() -> None:
    artifact = compiled(two_layers(), batches(32, 64), Round(IntGrid(8), finer=IntGrid(2, 16), budget=0.9))
    assert {row.encoding for row in artifact.ledger.sites} == {"IntGrid(bits=8)"}
    assert "takes no more bytes" in str(list(artifact.diagnostics))


def test_sensitivities_of_half_precision_models_do_not_overflow() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).half()
    data = [(8 * x.half(),) for (x,) in batches(2048, 64, count=4)]
    recipe = [Prune(Unstructured(), density=0.5, allocation="sensitivity")]
    artifact = sparc.compile(model.eval(), data[0], recipe=recipe, data=data, target="reference", measure=False)
    kept = [artifact.program.weights[name].count_nonzero() for name in ("0.weight", "2.weight")]
    assert abs(int(kept[0] - kept[1])) > 64
