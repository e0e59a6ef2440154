"""Round with a budget: which sites get the finer encoding, and that the budget is kept."""

import pytest
import torch
from torch import Tensor, nn

from sparc.capture import capture
from sparc.diag import PassError
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.nm import NM
from sparc.passes.encode import Encode
from sparc.passes.prune import Prune
from sparc.passes.round import Round
from sparc.passes.round.mixed import sensitivities
from tests.passes.models import driver, models

COARSE, FINE = IntGrid(4, group=32), IntGrid(8)


class Branches(nn.Module):
    """Two equal layers; what the second says is multiplied by 100, the third is not heard at all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.quiet, self.loud, self.mute = (nn.Linear(32, 32, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.quiet(x) + 100 * self.loud(x) + 0 * self.mute(x)


def specs(model: nn.Module, inputs: tuple[Tensor, ...], budget: float) -> dict[str, object]:
    chosen = driver(model, inputs)
    chosen.run(Round(COARSE, finer=FINE, budget=budget))
    program = chosen.program
    return {name: grid.spec for name in program.weights if (grid := program.grid(name)) is not None}


def test_the_site_that_is_heard_most_gets_the_bytes() -> None:
    inputs = (torch.randn(8, 32),)
    coarse, fine, dense = int(COARSE.bytes((32, 32))), int(FINE.bytes((32, 32))), 3 * 32 * 32 * 4
    names = ("quiet.weight", "loud.weight", "mute.weight")
    one = dict(zip(names, (COARSE, FINE, COARSE), strict=True))
    assert specs(Branches(), inputs, (2 * coarse + fine) / dense) == one
    assert specs(Branches(), inputs, (2 * coarse + fine - 1) / dense) == dict.fromkeys(names, COARSE)
    two = dict(zip(names, (FINE, FINE, COARSE), strict=True))
    assert specs(Branches(), inputs, 1.0) == two, "what nobody hears is not worth a byte"


def test_a_budget_below_the_coarse_encoding_upgrades_nothing() -> None:
    assert set(specs(Branches(), (torch.randn(8, 32),), 0.01).values()) == {COARSE}


@pytest.mark.parametrize("budget", [0.3, 0.34, 0.4])
@pytest.mark.parametrize("kind", list(models()))
def test_the_budget_is_kept_and_encoding_stays_exact(kind: str, budget: float) -> None:
    model, inputs = models()[kind]
    chosen = driver(model, inputs)
    dense = dict(chosen.program.weights)
    chosen.run(Round(COARSE, finer=FINE, budget=budget, fit="search", importance="data"))
    sites = [name for name in chosen.program.weights if chosen.program.grid(name) is not None]
    row = chosen.run(Encode())
    assert row.measured == {"end to end": 0.0}
    parts = [name for name in chosen.program.weights if name.startswith(tuple(f"{site}_" for site in sites))]
    stored = sum(chosen.program.weights[name].nbytes for name in parts)
    coarse = sum(int(COARSE.bytes(matrix_shape(kind, name, dense[name]))) for name in sites)
    assert stored <= max(coarse, budget * sum(dense[name].nbytes for name in sites))


def matrix_shape(kind: str, name: str, weight: Tensor) -> tuple[int, ...]:
    if kind != "convolutions":
        return (*weight.shape[:-2], weight.shape[-1], weight.shape[-2]) if kind == "experts" else tuple(weight.shape)
    if name == "transposed.weight":
        return (2, weight.shape[1], weight.shape[0] // 2 * weight[0, 0].numel())
    return (weight.shape[0], weight[0].numel())


def test_masks_survive_an_upgrade() -> None:
    chosen = driver(Branches(), (torch.randn(8, 32),))
    chosen.run(Prune(NM(2, 4)))
    zeros = chosen.program.weights["loud.weight"] == 0
    chosen.run(Round(COARSE, finer=FINE, budget=1.0))
    grid = chosen.program.grid("loud.weight")
    assert grid is not None
    assert grid.spec == NM(2, 4, of=FINE)
    assert bool((chosen.program.weights["loud.weight"][zeros] == 0).all())


def test_sensitivity_is_the_jacobian_by_hand() -> None:
    """For y = a * linear(x), each output's gradient at the linear's value is a times a standard normal number."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 5000, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return 3 * self.inner(x)

    inputs = (torch.randn(2, 4),)
    program = capture(Scaled(), inputs)
    (node,) = (node for _, node in program.nodes() if node.target is torch.ops.aten.linear.default)
    found = sensitivities(program, {node: "forward"}, {"forward": list(inputs)})
    assert found[node] == pytest.approx(9 * 10_000, rel=0.05)


def test_integer_outputs_have_no_gradient() -> None:
    class Argmax(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).argmax(-1)

    assert specs(Argmax(), (torch.randn(3, 32),), 1.0) == {"inner.weight": COARSE}
    assert reasons(Argmax(), (torch.randn(3, 32),), 1.0) == ["no floating output depends on a site"]


def reasons(model: nn.Module, inputs: tuple[Tensor, ...], budget: float) -> list[str]:
    """Why no site is rounded to the finer encoding, up to the first comma."""
    chosen = driver(model, inputs)
    chosen.run(Round(COARSE, finer=FINE, budget=budget))
    return [each.why.partition(",")[0] for each in chosen.diagnostics if each.what == f"no site is rounded to {FINE}"]


def test_a_budget_that_is_spent_already_says_so() -> None:
    inputs = (torch.randn(8, 32),)
    assert reasons(Branches(), inputs, 0.01) == ["a budget of 0.01 leaves no bytes"]
    assert reasons(Branches(), inputs, 1.0) == []


def test_operators_without_a_derivative_leave_the_coarse_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise NotImplementedError("the derivative for 'some_operator' is not implemented\nand a trace")

    monkeypatch.setattr("sparc.passes.round.mixed.sensitivities", refuse)
    assert set(specs(Branches(), (torch.randn(8, 32),), 1.0).values()) == {COARSE}
    (why,) = reasons(Branches(), (torch.randn(8, 32),), 1.0)
    assert why == "gradients cannot be taken: the derivative for 'some_operator' is not implemented"


@pytest.mark.parametrize("options", [{"finer": FINE}, {"budget": 0.2}, {"finer": FINE, "budget": 0.0}])
def test_options_that_make_no_sense(options: dict[str, object]) -> None:
    with pytest.raises(PassError, match="SPARC209"):
        Round(COARSE, **options)  # type: ignore[arg-type]
