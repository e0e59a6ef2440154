"""Half precision: products read and give halves, everything around them keeps its type."""

import pytest
import torch
from torch import nn

from sparc.diag import PassError
from sparc.passes.cast import Cast
from sparc.testing import assert_pass


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_products_are_half_and_the_rest_is_not(dtype):
    program, row = assert_pass(Cast(dtype), Block(), (torch.randn(3, 5, 8),), dynamic={"x": {0: "batch"}})
    types = {node.target._opname: node.meta["val"].dtype for node in program.graph.nodes if node.op == "call_function"}
    assert types["linear"] == getattr(torch, dtype)
    assert {types[name] for name in ("layer_norm", "gelu", "add")} == {torch.float32}
    assert program.run(torch.randn(2, 5, 8)).dtype == torch.float32
    assert row.measured["worst snr_db"] > (30 if dtype == "bfloat16" else 50)
    assert sum(tensor.nbytes for tensor in program.weights.values()) < 0.6 * sum(p.nbytes for p in Block().parameters())


def test_weights_beyond_the_range_are_left_alone():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight[0, 0] = 1e6
    _, row = assert_pass(Cast("float16"), model, (torch.randn(2, 8),))
    assert "range of float16" in row.skips[0].why


def test_a_wrong_dtype_is_refused():
    with pytest.raises(PassError, match="float8"):
        Cast("float8")
