"""One of several processes that calibrate together: `python -m tests.ranks_worker RANK COUNT FOLDER`."""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as distributed
from safetensors.torch import save_file
from torch import Tensor, nn

import sparc
from sparc.calibration import Calibration
from sparc.capture import capture
from sparc.encoding.int_grid import IntGrid
from sparc.observers import KINDS
from sparc.passes.recipes import prepare
from sparc.passes.round import Round

BATCHES = 21


class Layers(nn.Module):
    """Two blocks and a head; the second block sees what the first one's rounding does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(24, 24), nn.ReLU()) for _ in range(2))
        self.head = nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, 24]` => `[batch, 8]`."""
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def found() -> dict[str, Tensor]:
    """Every kind of statistic of every product's input, and the weights that GPTQ makes of them."""
    torch.manual_seed(0)
    model = Layers().eval()
    data = [(torch.randn(150, 24) @ torch.randn(24, 24),) for _ in range(BATCHES)]
    program = capture(model, data[0])
    nodes = [node.args[0] for node in program.graph.nodes if node.target is torch.ops.aten.linear.default]
    statistics = Calibration(program, {"forward": [list(batch) for batch in data]}).gather_all(
        (node, kind) for node in nodes for kind in KINDS
    )
    tensors = {}
    for place, node in enumerate(nodes):
        for kind in KINDS:
            result = statistics(node, kind)
            parts = [result] if isinstance(result, Tensor) else [torch.as_tensor(part) for part in result]
            tensors |= {f"{place}.{kind}.{index}": part.contiguous() for index, part in enumerate(parts)}
    steps = [*prepare(), Round(IntGrid(3, group=8), fit="search", importance="data", method="gptq")]
    artifact = sparc.compile(model, data[0], recipe=steps, data=data, target="reference", measure=False)
    return tensors | {name: artifact.program.weights[name].contiguous() for name in artifact.program.weights}


def main(rank: int, count: int, folder: Path) -> None:
    """Write what this process found; one that does not come is given up after two minutes."""
    store = f"file://{folder / 'store'}"
    patience = timedelta(minutes=2)
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=count, timeout=patience)
    try:
        save_file(found(), folder / f"{rank}.safetensors")
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
