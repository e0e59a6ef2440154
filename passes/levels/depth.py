"""Merging neighbouring layers: one repetition of a block stands for several, with the average of their weights."""

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from sparc import codes
from sparc.analysis.repeats import Repeats
from sparc.diag import PassError
from sparc.program import Program, location


def merge_layers(program: Program, blocks: Sequence[Repeats], depth: int) -> dict[str, tuple[str, ...]]:
    """Keep the first of every `depth` neighbouring repetitions, in place; the last group may be smaller.

    Args:
        program: edited: nodes of the other repetitions are removed, weights keep their values.
        blocks: the repeated blocks of its graph.
        depth: how many repetitions become one.

    Returns:
        For every weight of the repetitions, by the name that is kept, the names that it stands for, one each
        repetition.

    Raises:
        PassError: SPARC220 when something outside reads a value of every repetition, or a weight of one of them, or
            when their constants differ.
    """
    layers: dict[str, tuple[str, ...]] = {}
    for block in blocks:
        layers |= _members(program, block, depth)
        if depth > 1:
            if block.escape is not None:
                raise refused(block.escape, "it is read outside its layer, so the number of layers cannot change")
            _join(block, depth)
    _check_disjoint(layers, blocks)
    program.sweep()
    return layers


def refused(node: fx.Node, why: str) -> PassError:
    """The error for a program that has no coarser level."""
    return PassError(codes.NOT_COALESCIBLE, "the program cannot be coalesced", where=location(node), why=why)


def _members(program: Program, block: Repeats, depth: int) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for first in range(0, len(block), depth):
        group = block.repetitions[first : first + depth]
        for names in zip(*(repetition.weights for repetition in group), strict=True):
            _check_constants(program, group[0].result, names)
            found[names[0]] = names
    return found


def _check_constants(program: Program, node: fx.Node, names: Sequence[str]) -> None:
    first = program.weights[names[0]]
    if not first.is_floating_point() and not all(torch.equal(first, program.weights[name]) for name in names):
        raise refused(node, f"the constant {names[0]} differs between layers that would become one")


def _join(block: Repeats, depth: int) -> None:
    kept = block.repetitions[::depth]
    for index, repetition in enumerate(kept[1:], 1):
        for node in repetition.nodes:
            node.replace_input_with(repetition.carried, kept[index - 1].result)
    block.repetitions[-1].result.replace_all_uses_with(kept[-1].result)


def _check_disjoint(layers: Mapping[str, tuple[str, ...]], blocks: Sequence[Repeats]) -> None:
    owners: dict[str, str] = {}
    inside = {node for block in blocks for repetition in block for node in repetition.nodes}
    for name, names in layers.items():
        for member in names:
            if owners.setdefault(member, name) != name:
                raise refused(blocks[0].repetitions[0].result, f"{member} is shared by layers that are not neighbours")
    graph = blocks[0].repetitions[0].result.graph
    for node in graph.nodes:
        if node.op == "get_attr" and owners.get(str(node.target), node.target) != node.target:
            outside = [user for user in node.users if user not in inside]
            if outside:
                raise refused(outside[0], f"{node.target} is also read outside its layer")
