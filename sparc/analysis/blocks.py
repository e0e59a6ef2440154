"""The repeated blocks of a model, as a cut of each graph into stretches that run one after the other."""

import re
from collections import Counter

from torch import fx

_NUMBERED = re.compile(r"^((?:[^.]*[^.\d][^.]*\.)*?)(\d+)(?:\.|$)")


def block_container(graph: fx.Graph) -> str:
    """The path prefix (`encoder.layer.`) of the outermost numbered container with the most nodes; empty when there
    is none.
    """
    counts: Counter[str] = Counter()
    members: dict[str, set[str]] = {}
    for node in graph.nodes:
        found = _NUMBERED.match(str(node.meta.get("module", "")))
        if found:
            counts[found[1]] += 1
            members.setdefault(found[1], set()).add(found[2])
    repeated = [(count, prefix) for prefix, count in counts.items() if len(members[prefix]) > 1]
    return max(repeated)[1] if repeated else ""


def assign_blocks(graph: fx.Graph) -> int:
    """Number every node's block in `meta["block"]` and return how many blocks there are.

    Block numbers never decrease along an edge: block 0 is what comes before the first repeated block, the last is
    what comes after.
    """
    prefix = block_container(graph)
    numbers: dict[str, int] = {}
    for node in graph.nodes:
        found = _NUMBERED.match(str(node.meta.get("module", "")))
        if found and found[1] == prefix:
            numbers.setdefault(found[2], len(numbers) + 1)
    last = len(numbers) + 1 if numbers else 0
    inside = last - 1
    for node in graph.nodes:
        block = max((used.meta["block"] for used in node.all_input_nodes if used.op != "get_attr"), default=0)
        found = _NUMBERED.match(str(node.meta.get("module", "")))
        if found and found[1] == prefix and numbers:
            block = max(block, numbers[found[2]])
        elif numbers and block == inside and node.op == "call_function":
            block = last
        node.meta["block"] = block
    return last + 1


def renumber_blocks(graph: fx.Graph) -> None:
    """Bring `meta["block"]` up to date after edits: a node without a number is in the block of what it reads."""
    for node in graph.nodes:
        inputs = (used.meta["block"] for used in node.all_input_nodes if used.op != "get_attr")
        node.meta["block"] = max(node.meta.get("block", 0), max(inputs, default=0))
