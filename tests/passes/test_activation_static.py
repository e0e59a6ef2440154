"""Static activations: numbers by hand, which values of a convolutional stretch are quantized, and pairs that cancel."""

import pytest
import torch
from torch import Tensor, fx, nn

from sparc.diag import PassError
from sparc.driver import Driver
from sparc.encoding.grid import Grid
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.operators import is_quantize
from sparc.passes.activation.insert import PER_TENSOR, add_params, insert_static
from sparc.passes.activation.pairs import CancelPairs
from sparc.passes.activation.static import CalibrateActivations, static_params
from sparc.passes.round import Round
from sparc.program import Program
from tests.passes.models import driver

aten = torch.ops.aten


def calibrated(model: nn.Module, x: Tensor, step: CalibrateActivations | None = None) -> Driver:
    chosen = driver(model, (x,))
    chosen.run(Round(IntGrid(8)))
    chosen.run(step or CalibrateActivations("minmax"))
    return chosen


def quantized_values(program: Program) -> list[str]:
    """What the quantize nodes read, by operator."""
    nodes = [node.args[0] for node in program.graph.nodes if is_quantize(node)]
    return [getattr(node.target, "_opname", node.op) for node in nodes]  # type: ignore[union-attr]


def test_params_by_hand() -> None:
    assert static_params((0.0, 255.0)) == (1.0, 0)
    assert static_params((-64.0, 191.0)) == (1.0, 64)
    assert static_params((0.0, 0.0)) == (1.0, 0)


def test_minmax_uses_the_range_that_was_seen() -> None:
    x = torch.tensor([[-64.0, 191.0, 3.4, 0.0]])
    program = calibrated(nn.Linear(4, 40), x).program
    found = {name.rpartition("_")[2]: tensor for name, tensor in program.weights.items() if "_" in name}
    scale, zero = found["scale"], found["zero"]
    assert (scale.item(), zero.item(), scale.ndim, zero.dtype) == (1.0, 64, 0, torch.uint8)


class Residual(nn.Module):
    """A small inverted residual network: padding apart from the convolution, ReLU6, an add, pooling and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.expand = nn.Conv2d(8, 16, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.project = nn.Conv2d(16, 8, 1)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(8, 30)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu6(self.stem(x))
        y = nn.functional.relu6(self.expand(x))
        y = nn.functional.relu6(self.depthwise(nn.functional.pad(y, (1, 1, 1, 1))))
        return self.head(self.pool(x + self.project(y)).mean((2, 3)))


def residual() -> tuple[Residual, Tensor]:
    torch.manual_seed(0)
    return Residual().eval(), torch.randn(2, 3, 10, 10)


def test_every_value_of_a_stretch_is_quantized_once() -> None:
    """The input, three clipped convolutions (behind the clip), the projection, the sum and the mean; not the logits."""
    found = quantized_values(calibrated(*residual()).program)
    clip = found[1]
    assert clip in ("relu6", "hardtanh")
    assert found == ["placeholder", clip, clip, clip, "conv2d", "add", "mean"]


def test_ranges_end_where_clips_do() -> None:
    model, x = residual()
    program = calibrated(model, x * 100).program
    clipped = [name for name in program.weights if "relu6" in name or "hardtanh" in name]
    scales = [float(program.weights[name]) for name in clipped if name.endswith("_scale")]
    assert scales
    assert max(scales) == pytest.approx(6 / 255, rel=1e-6)


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy", "mse"])
def test_every_method_keeps_the_function(method: str) -> None:
    model, x = residual()
    chosen = calibrated(model, x, CalibrateActivations(method))  # type: ignore[arg-type]
    expected, found = model(x), chosen.program.run(x)
    assert (expected - found).norm() < 0.1 * expected.norm()


def test_only_selected_linears_are_quantized() -> None:
    model, x = residual()
    chosen = driver(model, (x,))
    chosen.run(Round(IntGrid(8)))
    chosen.run(CalibrateActivations("minmax"), "@linear", lambda site: site.operator == "linear")
    assert quantized_values(chosen.program) == ["mean"]


def test_running_it_again_changes_nothing() -> None:
    chosen = calibrated(*residual())
    assert chosen.run(CalibrateActivations("minmax")).changed == 0


def test_unrounded_weights_are_left_alone() -> None:
    model, x = residual()
    chosen = driver(model, (x,))
    row = chosen.run(CalibrateActivations())
    assert row.changed == 0
    assert {skip.why for skip in row.skips} == {"its weight is not rounded to integers"}


def test_a_percentile_must_be_one() -> None:
    with pytest.raises(PassError, match="SPARC209"):
        CalibrateActivations("percentile", percentile=0.999)


# biases ---------------------------------------------------------------------------------------------------------------
def test_a_switched_off_channel_keeps_its_bias_in_32_bits() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(4, 8, 1)
    with torch.no_grad():
        model.weight[0] *= 1e-12
        model.weight[1] = 0
        model.bias[:2] = torch.tensor([0.7, -0.3])
    x = torch.randn(2, 4, 5, 5)
    chosen = calibrated(model, x)
    program = chosen.program
    grid = program.grid("weight")
    assert isinstance(grid, Grid)
    product = next(node for node in program.graph.nodes if node.target is aten.conv2d.default)
    decoded = product.args[0]
    assert isinstance(decoded, fx.Node)
    step = program.weights[str(decoded.args[0][1].target)] * grid.tensors["scale"].flatten()  # type: ignore[index, union-attr]
    codes = (program.weights["bias"] / step).double().round()
    assert codes.abs().max() < 2**30
    assert torch.allclose((codes * step).float()[:2], torch.tensor([0.7, -0.3]), rtol=1e-6, atol=0)
    plain = driver(model, (x,))
    plain.run(Round(IntGrid(8)))
    assert torch.equal(program.weights["weight"][2:], plain.program.weights["weight"][2:])
    assert program.weights["weight"][:2].abs().max() < 1e-6


# pairs ----------------------------------------------------------------------------------------------------------------
class Moves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.max_pool2d(x, 2).flatten(1).unsqueeze(0) + 1


def twice(second: float) -> Driver:
    """A pair before the movement and one behind it, with a scale of its own unless it is the same."""
    chosen = driver(Moves(), (torch.randn(2, 3, 4, 4),))
    program, entry = chosen.program, chosen.program.main
    x = entry.placeholders[0]
    moved = next(node for node in program.graph.nodes if "unsqueeze" in node.name)
    params = add_params(program, "first", 0.02, 100, x)
    others = params if second == 0.02 else add_params(program, "second", second, 100, x)
    users = list(x.users)
    decoded = insert_static(entry, x, params, PER_TENSOR, users[0])
    for user in users:
        user.replace_input_with(x, decoded)
    last = next(iter(moved.users))
    last.replace_input_with(moved, insert_static(entry, moved, others, PER_TENSOR, last))
    return chosen


def test_a_pair_behind_its_own_pair_cancels_through_what_only_moves() -> None:
    chosen = twice(0.02)
    before = chosen.program.run(torch.ones(2, 3, 4, 4))
    row = chosen.run(CancelPairs())
    assert (row.matches, len(quantized_values(chosen.program))) == (1, 1)
    assert torch.equal(chosen.program.run(torch.ones(2, 3, 4, 4)), before)
    assert chosen.run(CancelPairs()).changed == 0


def test_a_pair_with_another_scale_stays() -> None:
    assert twice(0.03).run(CancelPairs()).changed == 0
