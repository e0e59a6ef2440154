"""Zero padding before a quantized convolution becomes the convolution's own; other padding stays."""

import pytest
import torch
from torch import Tensor, nn

from sparc.encoding.int_grid import IntGrid
from sparc.passes.activation.static import CalibrateActivations
from sparc.passes.encode import Encode
from sparc.passes.round import Round
from tests.codegen.emitting import emit, operators
from tests.passes.models import driver


class Padded(nn.Module):
    def __init__(self, mode: str, value: float = 0.0) -> None:
        super().__init__()
        self.conv, self.mode, self.value = nn.Conv2d(4, 8, 3, padding=(0, 1)), mode, value

    def forward(self, x: Tensor) -> Tensor:
        value = {"value": self.value} if self.mode == "constant" else {}
        return torch.relu(self.conv(nn.functional.pad(x, (0, 2, 1, 3), self.mode, **value)))


@pytest.mark.parametrize(
    ("mode", "value", "stays"), [("constant", 0.0, False), ("constant", 1.0, True), ("reflect", 0.0, True)]
)
def test_padding(mode: str, value: float, stays: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 7)
    chosen = driver(Padded(mode, value), (x,))
    for step in (Round(IntGrid(8)), CalibrateActivations("minmax"), Encode()):
        chosen.run(step)
    emission = emit(chosen.program)
    assert ("Pad" in operators(emission)) is stays
    (found,), (expected,) = emission.runner(threads=1)([x]), chosen.program.run_flat([x])
    step_size = float(expected.max()) / 255
    assert (found - expected).abs().max() <= 1.01 * step_size
    if not stays:
        conv = next(node for node in emission.models["forward"].graph.node if node.op_type == "Conv")
        assert next(list(each.ints) for each in conv.attribute if each.name == "pads") == [1, 1, 3, 3]
