"""Calibration: statistics of activations, gathered block by block behind the blocks that were already compressed.

For each block in order: run it on every batch and observe; let the passes change it; run it again and keep only the
values that later
blocks read. So statistics always see the errors that deployment will see, and memory holds one block's boundary, not
the model's
activations. (The scheme of SparseGPT and GPTQ.)
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sparc.analysis.blocks import assign_blocks
from sparc.execute import run_node
from sparc.observers import Observer, observer
from sparc.program import Program
from sparc.progress import track

Statistics = Callable[[fx.Node, str], Any]


class Calibration:
    """Streams batches through a program, one block at a time.

    Args:
        program: the program that passes edit meanwhile; nodes they insert belong to the block of the node they are
            like.
        batches: for each entry, flat input tensors.
    """

    def __init__(self, program: Program, batches: Mapping[str, Sequence[list[Tensor]]]) -> None:
        self.program = program
        self._live: dict[str, list[dict[str, Any]]] = {}
        count = 1
        for name, entry in program.entries.items():
            count = max(count, assign_blocks(entry.graph))
            inputs = [node.name for node in entry.placeholders]
            self._live[name] = [dict(zip(inputs, tensors, strict=True)) for tensors in batches.get(name, ())]
        self.blocks = range(count)

    def gather(self, block: int, watches: Iterable[tuple[fx.Node, str]]) -> Statistics:
        """Run a block on every batch and observe the watched nodes.

        Returns:
            A function from a node and a kind to the statistic; None for a node that never ran in or before this block.
        """
        observers: dict[tuple[str, str], Observer] = {}
        wanted: dict[str, set[str]] = {}
        for node, kind in watches:
            wanted.setdefault(node.name, set()).add(kind)
        if wanted:
            self._run(block, wanted, observers, keep=False)

        def statistics(node: fx.Node, kind: str) -> Any:
            found = observers.get((node.name, kind))
            return found.result() if found is not None else None

        return statistics

    def advance(self, block: int) -> None:
        """Run a block as it is now, and keep what later blocks read."""
        self._run(block, {}, {}, keep=True)

    def _run(
        self, block: int, wanted: Mapping[str, set[str]], observers: dict[tuple[str, str], Observer], *, keep: bool
    ) -> None:
        work = [(name, index) for name, live in self._live.items() for index in range(len(live))]
        for name, index in track(work, f"calibrating block {block + 1} of {len(self.blocks)}"):
            entry = self.program.entries[name]
            live = self._live[name][index]
            values = self._run_batch(entry.graph, block, live)
            for node_name, kinds in wanted.items():
                value = values.get(node_name)
                if isinstance(value, Tensor):
                    for kind in kinds:
                        observers.setdefault((node_name, kind), observer(kind)).update(value)
            if keep:
                self._live[name][index] = _survivors(entry.graph, block, values)

    def _run_batch(self, graph: fx.Graph, block: int, live: Mapping[str, Any]) -> dict[str, Any]:
        values = dict(live)
        env: dict[fx.Node, Any] = {}
        with torch.no_grad():
            for node in graph.nodes:
                if node.name in values:
                    env[node] = values[node.name]
                elif node.op == "get_attr":
                    env[node] = self.program.weights[str(node.target)]
                elif node.op == "call_function" and node.meta.get("block", 0) == block:
                    values[node.name] = env[node] = run_node(node, env, self.program.weights)
        return values


def _survivors(graph: fx.Graph, block: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a later block or the output reads."""
    kept = {}
    for node in graph.nodes:
        if node.name in values and any(user.op == "output" or user.meta.get("block", 0) > block for user in node.users):
            kept[node.name] = values[node.name]
    return kept
