"""Calibration: statistics of activations, gathered block by block behind the blocks that were already compressed.

For each block in order: run it on every batch and observe; let the passes change it; run it again and keep only the
values that later
blocks read. So statistics always see the errors that deployment will see, and memory holds one block's boundary, not
the model's
activations. (The scheme of SparseGPT and GPTQ.)

Under `torchrun`, or wherever torch.distributed is initialised, each process runs its share of the batches, statistics
are taken together, and every process goes on with the same ones.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from sparc.analysis.blocks import assign_blocks, renumber_blocks
from sparc.execute import Values, run_node
from sparc.observers import ByRun, Observer, observer
from sparc.program import Program
from sparc.progress import track
from sparc.ranks import Ranks

Statistics = Callable[[fx.Node, str], Any]


class Calibration:
    """Streams batches through a program, one block at a time.

    Args:
        program: the program that passes edit meanwhile; nodes they insert belong to the block of the node they are
            like.
        batches: for each entry, flat input tensors; of several processes each takes its share.
        ranks: the processes that calibrate together, on the same batches; those of torch.distributed by default.
    """

    def __init__(
        self, program: Program, batches: Mapping[str, Sequence[list[Tensor]]], ranks: Ranks | None = None
    ) -> None:
        self.program = program
        self._ranks = ranks or Ranks.current()
        self._live: dict[str, list[dict[str, Any]]] = {}
        count = 1
        for name, entry in program.entries.items():
            count = max(count, assign_blocks(entry.graph))
            inputs = [node.name for node in entry.placeholders]
            mine = self._ranks.share(batches.get(name, ()))
            self._live[name] = [dict(zip(inputs, tensors, strict=True)) for tensors in mine]
        self.blocks = range(count)

    def gather(self, block: int, watches: Iterable[tuple[fx.Node, str]]) -> Statistics:
        """Run a block on every batch and observe the watched nodes.

        Returns:
            A function from a node and a kind to the statistic; None for a node that no batch reached, or that holds no
            finite numbers.
        """
        wanted: dict[str, dict[str, set[str]]] = {}  # kinds by entry and node: entries have nodes of equal names
        for node, kind in watches:
            wanted.setdefault(self._entry(node), {}).setdefault(node.name, set()).add(kind)
        observers = {
            (entry, name, kind): observer(kind)
            for entry, nodes in sorted(wanted.items())
            for name, kinds in sorted(nodes.items())
            for kind in sorted(kinds)
        }

        def see(entry: str, batch: int, node: fx.Node, values: Values) -> None:
            for kind in wanted[entry][node.name] if isinstance(values[node], Tensor) else ():
                watching = observers[entry, node.name, kind]
                if isinstance(watching, ByRun) and _is_grouped(node):
                    x, ends = (values[node.args[place]] for place in (0, 2))  # type: ignore[index]
                    watching.update_runs(x, ends, batch)
                else:
                    watching.update(values[node], batch)

        for entry, graph, index in self._batches(block):
            here = wanted.get(entry, {})
            needed = [node for node in graph.nodes if node.name in here and node.meta["block"] <= block]
            number = self._ranks.number(index)
            grouped = {node.name for node in needed if _is_grouped(node)}  # their operands are looked at, too
            live = {name: value for name, value in self._live[entry][index].items() if name not in grouped}
            _run(needed, live, self.program.weights, partial(see, entry, number))
        observers = {key: self._together(key[2], found) for key, found in observers.items()}

        def statistics(node: fx.Node, kind: str) -> Any:
            found = observers.get((self._entry(node), node.name, kind))
            return found.result() if found is not None and found.seen else None

        return statistics

    def gather_all(self, watches: Iterable[tuple[fx.Node, str]]) -> Statistics:
        """Run every block as it is and observe the watched nodes; afterwards nothing is left to run."""
        everything = list(watches)
        found: dict[tuple[str, str], Statistics] = {}
        for block in self.blocks:
            here = [(node, kind) for node, kind in everything if node.meta["block"] == block]
            gathered = self.gather(block, here)
            found.update(((self._entry(node), node.name), gathered) for node, _ in here)
            self.advance(block)

        def statistics(node: fx.Node, kind: str) -> Any:
            gathered = found.get((self._entry(node), node.name))
            return gathered(node, kind) if gathered is not None else None

        return statistics

    def _together(self, kind: str, mine: Observer) -> Observer:
        """What all processes have seen, the same on each; in the order of their ranks, so that sums agree bitwise."""
        if self._ranks.count == 1:
            return mine
        found = observer(kind)
        for state in self._ranks.exchange(mine.state() if mine.seen else []):
            if state:
                found.absorb(state)
        return found

    def _entry(self, node: fx.Node) -> str:
        """The name of the entry that holds a node; empty for a node of another program."""
        return next((name for name, entry in self.program.entries.items() if entry.graph is node.graph), "")

    def advance(self, block: int) -> None:
        """Run a block as it is now, and keep what later blocks read."""
        for entry, graph, index in self._batches(block):
            kept: dict[str, Any] = {}
            needed = [node for node in graph.nodes if node.op == "placeholder" or _outlives(node, block)]
            _run(needed, self._live[entry][index], self.program.weights, partial(_keep, kept))
            self._live[entry][index] = kept

    def _batches(self, block: int) -> Iterator[tuple[str, fx.Graph, int]]:
        """Every batch as (entry, graph, index); the graphs' block numbers are brought up to date first."""
        for name in self._live:
            renumber_blocks(self.program.entries[name].graph)
        work = [(name, index) for name, live in self._live.items() for index in range(len(live))]
        what = f"calibrating block {block + 1} of {len(self.blocks)}"
        for name, index in track(work, what) if self._ranks.rank == 0 else work:
            yield name, self.program.entries[name].graph, index


def _outlives(node: fx.Node, block: int) -> bool:
    """Whether a value of this block, or of an earlier one, is read by a later block; outputs are not kept."""
    if node.op != "call_function" or node.meta["block"] > block:
        return False
    return any(user.op != "output" and user.meta["block"] > block for user in node.users)


def _is_grouped(node: fx.Node) -> bool:
    return node.target is torch.ops.sparc.grouped_linear.default


def _keep(kept: dict[str, Any], node: fx.Node, values: Values) -> None:
    kept[node.name] = values[node]


def _run(
    needed: Sequence[fx.Node],
    live: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    see: Callable[[fx.Node, Values], None],
) -> None:
    """Compute the needed nodes from live values, showing each one, with what it was computed from, as soon as it is
    there and freeing what is done with.

    Inputs of the graph are always live, so every node can be computed; what lies before a live value is not.
    """
    order, uses = _plan(needed, live)
    names = {node.name for node in needed}
    env: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in order:
            env[node] = live[node.name] if node.name in live else run_node(node, env, weights)
            if node.name in names:
                see(node, env)
            for used in [] if node.name in live else node.all_input_nodes:
                uses[used] -= 1
                if uses[used] == 0:
                    del env[used]
            if uses[node] == 0:
                del env[node]


def _plan(needed: Sequence[fx.Node], live: Mapping[str, Any]) -> tuple[list[fx.Node], Counter[fx.Node]]:
    """The nodes to run, in the graph's order, and how many of them read each one."""
    uses: Counter[fx.Node] = Counter()
    reached: set[fx.Node] = set()
    stack = list(needed)
    while stack:
        node = stack.pop()
        if node in reached:
            continue
        reached.add(node)
        if node.name not in live:
            uses.update(node.all_input_nodes)
            stack.extend(node.all_input_nodes)
    return [node for node in needed[0].graph.nodes if node in reached] if needed else [], uses
