"""Importances of units against plain formulas in float64, and the gradients they are made of."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparc.analysis.dependency import groups
from sparc.calibration import Calibration
from sparc.diag import PassError
from sparc.pass_base import PassContext
from sparc.passes.cut import gradients as taken
from sparc.passes.cut.gradients import gradients, next_token_loss
from sparc.passes.cut.importance import fisher, from_gradients, magnitude, taylor
from sparc.passes.cut.prune_units import PruneUnits
from sparc.program import Program
from tests.passes.pruned import architecture, gated, group_of, images, prepared


def scores(driver, weight, **options):
    """What the pass ranks the units of a group by."""
    program = driver.program
    step, context = PruneUnits(**options), PassContext(calibration=driver.samples.calibration)
    found = [group_of(program, weight)]
    if step.needs:
        calibration = Calibration(program, driver.samples.calibration)
        context.statistics = calibration.gather_all(step.watches(program, context))
    return step._scores(program, context, found)[0]


def square(x: Tensor) -> Tensor:
    return x.double().square()


def test_magnitude_of_gated_neurons():
    model, driver = gated()
    rows = square(model.gate.weight).sum(1) + square(model.up.weight).sum(1) + square(model.down.weight).sum(0)
    assert torch.allclose(scores(driver, "gate.weight"), rows / 3, rtol=1e-12)


def test_magnitude_of_channels_counts_gains_but_no_statistics():
    model, driver = images()
    members = [
        square(model.first.weight).sum((1, 2, 3)),
        square(model.norm.weight),
        square(model.inner.weight).sum((0, 2, 3)),
        square(model.outer.weight).sum((1, 2, 3)),  # it is added to the residual
        square(model.head.weight).sum(0),
    ]
    assert torch.allclose(magnitude(driver.program, group_of(driver.program, "first.weight")), sum(members) / 5)


def test_magnitude_of_heads_with_grouped_queries():
    program = architecture("llama").program
    weights = {name.rpartition("layers.0.self_attn.")[2]: square(tensor) for name, tensor in program.weights.items()}
    (head,) = [each for each in groups(program) if each.kind == "head" and "layers.0." in each.name]
    heads = head.units
    of_rows = [weights[f"{name}_proj.weight"].reshape(heads, -1).sum(1) for name in ("q", "k", "v")]
    of_columns = weights["o_proj.weight"].T.reshape(heads, -1).sum(1)
    assert torch.allclose(magnitude(program, head), (sum(of_rows) + of_columns) / 4, rtol=1e-12)


def test_activation_of_gated_neurons():
    batches = [[torch.randn(4, 12)], [3 * torch.randn(7, 12)]]
    model, driver = gated(*batches)
    x = torch.cat([each for (each,) in batches])
    hidden = (F.silu(model.gate(x)) * model.up(x)).detach()
    plain = square(hidden).mean(0) * square(model.down.weight).sum(0)
    assert torch.allclose(scores(driver, "gate.weight", importance="activation"), plain, rtol=1e-5)


def test_activation_of_channels_is_the_mean_over_readers():
    batches = [[torch.randn(3, 3, 6, 6)]]
    model, driver = images(*batches)
    x = F.relu6(model.inner(torch.relu(model.norm(model.first(batches[0][0])))))
    y = torch.relu(model.deep(x)).detach()
    pooled = y.mean((2, 3), keepdim=True)
    gate = torch.sigmoid(model.excite(torch.relu(model.squeeze(pooled)))).detach()
    squeezed = square(pooled).mean((0, 2, 3)) * square(model.squeeze.weight).sum((0, 2, 3))
    read = square(y * gate).mean((0, 2, 3)) * square(model.outer.weight).sum((0, 2, 3))
    found = scores(driver, "inner.weight", importance="activation")
    assert torch.allclose(found, (squeezed + read) / 2, rtol=1e-5)


class Loss(nn.Module):
    """A model that returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        made = self.down(torch.relu(self.up(x)))
        return {"made": made, "loss": F.mse_loss(made, y)}


@pytest.mark.parametrize(("importance", "power"), [("taylor", 1), ("hessian", 2)])
def test_gradients_of_a_models_own_loss(importance, power):
    torch.manual_seed(0)
    model = Loss()
    batches = [[torch.randn(5, 6), torch.randn(5, 3)] for _ in range(3)]
    driver = prepared(model, tuple(batches[0]), *batches)
    expected = torch.zeros(8, dtype=torch.float64)
    for x, y in batches:
        model.zero_grad()
        model(x, y)["loss"].backward()
        products = [each.weight.detach().double() * each.weight.grad for each in (model.up, model.down)]
        products[1] = products[1].T
        if power == 1:
            expected += sum(each.sum(1).abs() for each in products) / 2
        else:
            expected += sum(each.square().sum(1) / 2 for each in products) / 2
    found = scores(driver, "up.weight", importance=importance, loss="loss")
    assert torch.allclose(found, expected / 3, rtol=1e-5)


def test_projections_estimate_the_squared_jacobian(monkeypatch):
    """The mean of (v^T J)^2 over normal v is the sum over outputs of squared derivatives."""
    monkeypatch.setattr(taken, "PROBES", 4000)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    x = torch.randn(1, 2)
    driver = prepared(model, (x,))
    total, count = torch.zeros(2, 2, dtype=torch.float64), 0
    for found in gradients(driver.program, ["0.weight"], {"forward": [[x]]}, "projection"):
        total, count = total + square(found["0.weight"]), count + 1
    assert count == 4000
    jacobian = torch.autograd.functional.jacobian(lambda w: model[1](F.linear(x, w)), model[0].weight.detach())
    assert torch.allclose(total / count, square(jacobian).sum((0, 1)), rtol=0.15)


def test_the_loss_of_next_tokens_is_that_of_language_models():
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 5, 11), torch.randint(11, (2, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    log_probability = torch.log_softmax(logits, -1)
    pairs = [(row, at) for row in range(2) for at in range(4) if mask[row, at + 1]]
    plain = -sum(log_probability[row, at, tokens[row, at + 1]] for row, at in pairs) / len(pairs)
    assert float(next_token_loss(logits, tokens, mask)) == pytest.approx(float(plain), rel=1e-5)
    some = next_token_loss(logits[:, [1, 4]], tokens, None, torch.tensor([1, 4]))
    plain = -(log_probability[0, 1, tokens[0, 2]] + log_probability[1, 1, tokens[1, 2]]) / 2
    assert float(some) == pytest.approx(float(plain), rel=1e-5)
    assert float(next_token_loss(logits[:, -1:], tokens, None, torch.tensor([-1]))) == 0


def test_a_loss_that_does_not_exist_is_refused():
    _, driver = gated()
    for loss in ("next_token", "anything"):
        with pytest.raises(PassError, match=r"SPARC209.*has no loss"):
            driver.run(PruneUnits(importance="taylor", loss=loss))


@pytest.mark.parametrize("importance", ["taylor", "hessian"])
def test_outputs_without_a_gradient_score_nothing(importance):
    class Looked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chosen, self.table = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)), nn.Embedding(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.table(self.chosen(x).argmax(-1))

    row = prepared(Looked(), (torch.randn(3, 6),)).run(PruneUnits(keep=0.5, importance=importance))
    assert row.matches == 0
    assert ("chosen.0.weight[0]", "its units stay (neuron): no gradient of the loss reaches it") in [
        (skip.where, skip.why) for skip in row.skips
    ]


def test_without_a_floating_output_there_is_no_projection():
    class Numbers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chosen = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.chosen(x).argmax(-1)

    with pytest.raises(PassError, match=r"SPARC209.*has no loss 'projection'"):
        prepared(Numbers(), (torch.randn(3, 6),)).run(PruneUnits(importance="taylor"))


def test_what_no_gradient_reaches_has_no_score():
    _, driver = gated()
    program: Program = driver.program
    group = group_of(program, "gate.weight")
    for score in (taylor, fisher):
        assert from_gradients(program, [group], iter([{}]), score) == ["no gradient of the loss reaches it"]
