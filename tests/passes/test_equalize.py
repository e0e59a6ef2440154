"""Equalisation: the function stays, channels get alike ranges, and what cannot be moved through stays where it is."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparc.capture import capture
from sparc.diag import PassError
from sparc.driver import Driver
from sparc.passes.equalize.classes import Classes
from sparc.passes.equalize.equalize import Equalize, factors
from tests.passes.models import driver


def uneven(*shape: int) -> Tensor:
    """Channels (axis 0) of sizes from 1/30 to 30."""
    return torch.randn(*shape) * torch.logspace(-1.5, 1.5, shape[0]).reshape(-1, *[1] * (len(shape) - 1))


class Chain(nn.Module):
    """conv, relu, padded depthwise conv, relu, pointwise conv, pooling, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.pointwise = nn.Conv2d(8, 6, 1)
        self.last = nn.Linear(6, 5)
        with torch.no_grad():
            for layer in (self.first, self.depthwise, self.pointwise):
                layer.weight.copy_(uneven(*layer.weight.shape))
                layer.bias.copy_(uneven(*layer.bias.shape))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(torch.relu(self.first(x)), (1, 1, 1, 1))
        return self.last(self.pointwise(torch.relu(self.depthwise(x))).mean((2, 3)))


class Stream(nn.Module):
    """A residual stream: two writers and two readers share its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.back = nn.Conv2d(3, 6, 1), nn.Conv2d(9, 6, 1, bias=False)
        self.out, self.head = nn.Conv2d(6, 9, 1), nn.Conv2d(6, 4, 1)
        with torch.no_grad():
            self.start.weight.copy_(uneven(6, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        return self.head(x + self.back(torch.relu(self.out(x))))


class Norms(nn.Module):
    """The gain of a norm before two linears, and the gated product before a third."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.gate, self.up, self.down = nn.Linear(12, 20), nn.Linear(12, 20, bias=False), nn.Linear(20, 4)
        with torch.no_grad():
            self.norm.weight.copy_(torch.logspace(-1, 1, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Clipped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.relu6(self.first(x)))


IMAGE = (2, 3, 8, 8)
MODELS = {"chain": (Chain, IMAGE, 3), "stream": (Stream, IMAGE, 2), "norms": (Norms, (2, 5, 12), 2)}


def equalized(name: str, step: Equalize) -> tuple[nn.Module, Tensor, Driver]:
    torch.manual_seed(0)
    kind, shape, _ = MODELS[name]
    model, x = kind().eval(), torch.randn(*shape)
    chosen = driver(model, (x,))
    chosen.run(step)
    return model, x, chosen


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("ranges", ["data", "weights"])
def test_the_function_stays(name: str, strength: float, ranges: str) -> None:
    """The driver checks the contract in float64; here the outputs once more, and that something was moved."""
    model, x, chosen = equalized(name, Equalize(strength, ranges))  # type: ignore[arg-type]
    row = chosen.ledger.passes[-1]
    assert row.matches == MODELS[name][2]
    assert row.changed > 0
    assert row.measured["end to end, float64"] < 1e-6
    expected = model(x).detach()
    assert torch.allclose(chosen.program.run(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_wrong_factor_would_be_noticed() -> None:
    torch.manual_seed(0)
    chosen = driver(Chain(), (torch.randn(*IMAGE),))
    before = chosen.program.run(torch.ones(*IMAGE))
    weight = "pointwise.weight"
    chosen.program.set_weight(weight, chosen.program.weights[weight] * 1.01)
    assert not torch.allclose(chosen.program.run(torch.ones(*IMAGE)), before, rtol=1e-4)


def test_full_strength_gives_every_channel_the_same_range() -> None:
    _, x, chosen = equalized("stream", Equalize(1.0))
    found: list[Tensor] = []

    def keep(node: object, value: Tensor, _: object) -> None:
        if "add" in str(node) or str(node) == "conv2d":
            found.append(value.abs().amax((0, 2, 3)))

    chosen.program.run_flat([x], watch=keep)
    largest = torch.stack(found).amax(0)
    assert torch.allclose(largest, largest[:1].expand_as(largest), rtol=1e-4)


def test_strength_zero_makes_the_columns_alike() -> None:
    torch.manual_seed(0)
    chosen = driver(Norms().eval(), (torch.randn(2, 5, 12),))
    chosen.run(Equalize(0.0), "gate", lambda site: site.weight == "gate.weight")
    read = torch.cat([chosen.program.weights[name] for name in ("gate.weight", "up.weight")]).abs().amax(0)
    assert torch.allclose(read, read[:1].expand_as(read), rtol=1e-4)


def test_half_precision_is_checked_before_rounding() -> None:
    torch.manual_seed(0)
    chosen = driver(Norms().eval().to(torch.bfloat16), (torch.randn(2, 5, 12, dtype=torch.bfloat16),))
    row = chosen.run(Equalize())
    assert row.matches == 2
    assert row.measured["end to end, float64"] < 1e-9


def test_gains_of_multiplications_are_writers() -> None:
    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain, self.last = nn.Parameter(torch.logspace(-1, 1, 12)), nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.gain * nn.functional.rms_norm(x, (12,)))

    model, x = Gain(), torch.randn(5, 12)
    chosen = driver(model, (x,))
    assert chosen.run(Equalize()).matches == 1
    assert not torch.equal(chosen.program.weights["gain"], model.gain.detach())
    assert torch.allclose(chosen.program.run(x), model(x).detach(), rtol=1e-4, atol=1e-4)


def test_factors_by_hand() -> None:
    found = factors(torch.tensor([4.0, 1.0, 0.0, 1.0]), torch.tensor([1.0, 4.0, 1.0, 0.0]), 0.5)
    assert found.tolist() == pytest.approx([0.5, 2.0, 1.0, 1.0])


def test_nothing_moves_through_a_clip() -> None:
    chosen = driver(Clipped(), (torch.randn(*IMAGE),))
    row = chosen.run(Equalize())
    assert row.changed == 0
    assert "last" in {skip.where for skip in row.skips}
    assert all("does not commute with factors" in skip.why for skip in row.skips)


def test_only_what_selected_sites_read_is_moved() -> None:
    torch.manual_seed(0)
    chosen = driver(Chain(), (torch.randn(*IMAGE),))
    row = chosen.run(Equalize(), "last", lambda site: site.weight == "last.weight")
    assert row.matches == 1


def test_weights_used_twice_freeze_their_classes() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.b(self.a(x))))

    chosen = driver(Twice(), (torch.randn(2, 6),))
    assert all(found.frozen for found in Classes(chosen.program, chosen.program.graph))
    assert chosen.run(Equalize(ranges="weights")).changed == 0


def test_what_leaves_the_program_is_not_rescaled() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.a(x)
            return x, self.b(x)

    assert driver(Two(), (torch.randn(2, 6),)).run(Equalize(ranges="weights")).changed == 0


def test_sums_of_sizes_carry_no_channels() -> None:
    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            places = torch.arange(x.shape[0]) + x.shape[0]
            return self.last(x) * places[:, None]

    x = torch.randn(4, 6)
    program = capture(Places(), (x,), dynamic={"x": {0: "rows"}})
    assert list(Classes(program, program.graph))


class Packed(nn.Module):
    """A gated layer whose two branches are written side by side.

    Args:
        twice: read the whole as well.
    """

    def __init__(self, twice: bool = False) -> None:
        super().__init__()
        self.both, self.last, self.twice = nn.Linear(6, 20), nn.Linear(10, 4), twice
        with torch.no_grad():
            self.both.weight.copy_(uneven(20, 6))

    def forward(self, x: Tensor) -> Tensor:
        whole = self.both(x)
        gate, up = whole.chunk(2, -1)
        result = self.last(nn.functional.silu(gate) * up)
        return result + whole.sum() if self.twice else result


@pytest.mark.parametrize("ranges", ["data", "weights"])
def test_pieces_of_a_layer_are_writers(ranges: Any) -> None:
    torch.manual_seed(0)
    model, x = Packed(), torch.randn(7, 6)
    chosen = driver(model, (x,))
    row = chosen.run(Equalize(ranges=ranges))
    assert row.matches == 1
    assert row.measured["end to end, float64"] < 1e-9
    after = chosen.program.weights
    assert torch.equal(after["both.weight"][:10], model.both.weight[:10])
    assert not torch.isclose(after["both.weight"][10:], model.both.weight[10:]).any()
    assert torch.allclose(chosen.program.run(x), model(x).detach(), rtol=1e-4, atol=1e-4)


def test_pieces_of_what_is_read_as_a_whole_stay() -> None:
    torch.manual_seed(0)
    assert driver(Packed(twice=True), (torch.randn(7, 6),)).run(Equalize(ranges="weights")).changed == 0


def test_copies_to_integers_freeze_what_they_copy() -> None:
    class Copy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.first(x)
            return self.last(x.to(torch.float64).to(torch.float32)), x.to(torch.int32)

    row = driver(Copy(), (torch.randn(2, 6),)).run(Equalize(ranges="weights"))
    assert row.changed == 0


def test_strength_is_a_share() -> None:
    with pytest.raises(PassError, match="SPARC209"):
        Equalize(1.5)
