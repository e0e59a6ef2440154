"""Net2DeeperNet for residual models: one more repetition of a repeated block, which adds nothing yet."""

import torch
from torch import fx

from sparc import codes
from sparc.analysis.repeats import Repetition, find_repeats
from sparc.diag import PassError
from sparc.passes.share_steps import NoSteps, branch_ends
from sparc.program import Program, location, weight_nodes


def deepen(program: Program, block: int = -1, stack: int = 0) -> Program:
    """A program with one more repetition of a repeated block that computes the same.

    The new repetition is a copy of the one before it whose residual branches end with zeros, `h + 0 f(h)`
    (Net2DeeperNet, Chen et al. 2016, section 3.2, with the zero initialisation of residual branches for its identity).

    Args:
        program: stays as it is.
        block: which repetition to copy; the copy comes behind it.
        stack: which repeated block, in the order of the graph.

    Returns:
        A program with copies of the weights that the block alone reads, under their names with a number.

    Raises:
        PassError: SPARC209 when there is no such block, a norm or something else stands between its branches, or a
            branch ends with something that is no layer with weights of its own.
    """
    deeper = program.clone()
    stacks = find_repeats(deeper.graph)
    if len(program.entries) > 1 or not 0 <= stack < len(stacks):
        what = "several entries" if len(program.entries) > 1 else f"{len(stacks)} repeated blocks"
        raise PassError(codes.BAD_OPTION, f"stack {stack} cannot be deepened", why=f"the program has {what}")
    if not -len(stacks[stack]) <= block < len(stacks[stack]):
        raise PassError(codes.BAD_OPTION, f"there is no repetition {block}", why=f"there are {len(stacks[stack])}")
    repetition = stacks[stack].repetitions[block]
    try:
        ends = branch_ends(repetition, norms=False)
    except NoSteps as reason:
        where = location(repetition.result)
        raise PassError(codes.BAD_OPTION, "a block cannot be repeated", where=where, why=str(reason)) from None
    _repeat(deeper, repetition, set(ends))
    return deeper


def _repeat(program: Program, block: Repetition, ends: set[fx.Node]) -> None:
    """Copy the nodes behind the block's result; layers at the ends of branches get zeros."""
    readers = list(block.result.users)
    own = set(block.nodes)
    copies: dict[fx.Node, fx.Node] = {block.carried: block.result}
    zeros: dict[fx.Node, fx.Node] = {}
    for name in block.weights:
        weight, tensor = weight_nodes(program.graph, name)[0], program.weights[name]
        if ends & set(weight.users):
            zeros[weight] = program.add_weight(name, torch.zeros_like(tensor), like=weight)
        if tensor.is_floating_point() and set(weight.users) <= own and not set(weight.users) <= ends:
            copies[weight] = program.add_weight(name, tensor, like=weight)
    after = block.result.next
    for node in block.nodes:
        used = {**copies, **zeros} if node in ends else copies
        with program.graph.inserting_before(after):
            copies[node] = program.graph.node_copy(node, lambda each, used=used: used.get(each, each))  # type: ignore[misc]
        copies[node].meta = dict(node.meta)
    for reader in readers:
        reader.replace_input_with(block.result, copies[block.result])
    program.sweep()
