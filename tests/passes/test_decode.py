"""An encoded weight becomes dense, takes an adapter, and is rounded again."""

import torch
from torch import Tensor, nn

from sparc.capture import capture
from sparc.driver import Driver
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.operators import is_decode
from sparc.pass_base import Samples
from sparc.passes.canonicalize import Canonicalize
from sparc.passes.decode import Decode
from sparc.passes.encode import Encode
from sparc.passes.fold import fold_affine
from sparc.passes.round import Round
from sparc.verify import snr_db


class Adapted(nn.Module):
    """A layer with a low-rank adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(64, 48), nn.Linear(64, 4, bias=False), nn.Linear(4, 48, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.base(x) + self.up(self.down(x)))


def run(*steps) -> Driver:
    torch.manual_seed(0)
    x = torch.randn(8, 64)
    driver = Driver(capture(Adapted().eval(), (x,)), Samples({"forward": [[x]]}), verify="full")
    driver.run(Canonicalize())
    for step in steps:
        driver.run(step, claims=lambda site: site.weight.startswith("base"))
    return driver


ROUND = (Round(IntGrid(4, group=32)), Encode())


def test_decoding_is_bitwise_and_gives_the_name_back() -> None:
    driver = run(*ROUND, Decode())
    assert not any(is_decode(node) for node in driver.program.graph.nodes)
    assert {"base.weight", "down.weight"} <= set(driver.program.weights)
    rounded = run(*ROUND).program
    x = torch.randn(3, 64)
    assert torch.equal(driver.program.run(x=x), rounded.run(x=x))


def test_an_adapter_does_not_fold_into_an_encoded_base() -> None:
    driver = run(*ROUND)
    row = driver.run(fold_affine)
    assert row.changed == 0
    assert any("encoded already" in skip.why for skip in row.skips)


def test_decode_merge_round_again_reports_its_error() -> None:
    driver = run(*ROUND, Decode(), fold_affine)
    assert [node.target for node in driver.program.graph.nodes if node.op == "call_function"] == [
        torch.ops.aten.linear.default,
        torch.ops.aten.relu.default,
    ]
    merged = driver.program
    row = driver.run(ROUND[0])
    assert row.measured["sites measured"] == 1
    assert 15 < row.measured["worst snr_db"] < 30
    driver.run(ROUND[1])
    x = torch.randn(8, 64)
    assert snr_db(merged.run(x=x), driver.program.run(x=x)) > 15
