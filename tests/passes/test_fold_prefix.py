"""Prefix tuning: keys and values that depend on no input become constants, for every batch size."""

import torch
from torch import Tensor, nn

from sparc.capture import capture
from sparc.driver import Driver
from sparc.pass_base import Samples
from sparc.passes.canonicalize import Canonicalize


class Prefixed(nn.Module):
    """Attention to a learned prefix, which a network makes from an embedding (Li and Liang, 2021), and to the input."""

    def __init__(self, heads: int = 2, size: int = 8, length: int = 3) -> None:
        super().__init__()
        self.heads, self.size, self.length, width = heads, size, length, heads * size
        self.table = nn.Embedding(length, 6)
        self.network = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 2 * width))
        self.project = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        prefix = self.network(self.table(torch.arange(self.length)))[None].expand(batch, -1, -1)
        query, *pair = self.project(x).chunk(3, -1)
        key, value = (torch.cat([p, each], 1) for p, each in zip(prefix.chunk(2, -1), pair, strict=True))
        query, key, value = (
            each.reshape(batch, -1, self.heads, self.size).transpose(1, 2) for each in (query, key, value)
        )
        return nn.functional.scaled_dot_product_attention(query, key, value)


def test_a_prefix_becomes_constant_keys_and_values() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16)
    dynamic = {"x": {0: "batch", 1: "length"}}
    driver = Driver(capture(Prefixed().eval(), (x,), dynamic=dynamic), Samples({"forward": [[x]]}), verify="full")
    before = driver.program
    driver.run(Canonicalize())
    targets = [node.target for node in driver.program.graph.nodes if node.op == "call_function"]
    assert targets.count(torch.ops.aten.linear.default) == 1
    assert torch.ops.aten.tanh.default not in targets
    assert torch.ops.aten.embedding.default not in targets
    kept = {name: tuple(tensor.shape) for name, tensor in driver.program.weights.items()}
    assert sorted(kept.values()) in ([(1, 3, 16)] * 2 + [(48,), (48, 16)], [(1, 3, 32), (48,), (48, 16)])
    other = torch.randn(4, 7, 16)
    torch.testing.assert_close(driver.program.run(x=other), before.run(x=other))
