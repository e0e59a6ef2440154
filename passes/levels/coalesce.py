"""Levels of a model: coalescing to a smaller one, decoalescing back, and interpolating between the two.

The multigrid V-cycle of the Multi-Level Framework (arXiv 2404.07999): train a little, coalesce, train the small model,
decoalesce, interpolate, train on.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from sparc import codes
from sparc.analysis.repeats import find_repeats
from sparc.diag import PassError
from sparc.passes.levels.depth import merge_layers
from sparc.passes.levels.maps import AxisMap, coalesce_weight, decoalesce_weight
from sparc.passes.levels.width import merge_features
from sparc.program import Program

_HINT = "levels are made of one entry with repeated transformer blocks; canonicalize raises hand-written attention"


@dataclass(frozen=True)
class LevelMap:
    """How a coarser level follows from a finer one.

    Args:
        fine: the program that was coalesced; decoalescing gives one with its graph.
        layers: for a weight of the coarser level that stands for several layers, the finer level's names.
        axes: for a weight of the coarser level, the axes along which it is smaller.
    """

    fine: Program
    layers: Mapping[str, tuple[str, ...]]
    axes: Mapping[str, tuple[AxisMap, ...]]


def coalesce(program: Program, width: int = 2, depth: int = 2) -> tuple[Program, LevelMap]:
    """A smaller program with merged features and averaged layers, and the map that leads back.

    Features are merged in every space of the repeated blocks (the residual stream, whole heads, hidden features), unit
    `j` with unit `j + n`: rows that write a space are averaged, columns that read one are summed. Neighbouring layers
    are averaged. Everything is computed in float64 and rounded once.

    Args:
        program: one entry, with repeated blocks around `scaled_dot_product_attention` (see `canonicalize`).
        width: how many units become one; 1 keeps the features.
        depth: how many neighbouring layers become one; 1 keeps the layers. Of a number of layers that it does not
            divide, the last group is smaller.

    Returns:
        The smaller program, with the names of the first layer of each group, and the map.

    Raises:
        PassError: SPARC209 for a width or depth below 1; SPARC220 when the program has no repeated blocks, or something
            in them cannot be merged.
    """
    for name, value in {"width": width, "depth": depth}.items():
        if value < 1:
            raise PassError(codes.BAD_OPTION, f"{name}={value} merges nothing", hint=f"{name}=1 keeps all, 2 halves")
    coarse = program.clone()
    blocks = find_repeats(coarse.graph) if len(coarse.entries) == 1 else []
    if not blocks:
        raise PassError(
            codes.NOT_COALESCIBLE,
            "the program cannot be coalesced",
            why=f"{len(coarse.entries)} entries" if len(coarse.entries) > 1 else "no block is repeated",
            hint=_HINT,
        )
    layers = merge_layers(coarse, blocks, depth)
    inside = {node for block in blocks for node in block.repetitions[0].nodes}
    axes = merge_features(coarse, inside, width) if width > 1 else {}
    for name in list(coarse.weights):
        members = layers.get(name, (name,))
        if name in axes or len(members) > 1:
            coarse.set_weight(name, coalesce_weight([program.weights[each] for each in members], axes.get(name, ())))
    _infer(coarse)
    return coarse, LevelMap(program, layers, axes)


def decoalesce(small: Program, level: LevelMap) -> Program:
    """The larger program that acts like `small`: every feature and every layer is copied.

    Merged features act exactly like before, since whatever reads copies shares its weight out among them (Net2Net,
    arXiv 1511.05641). Layers that were merged are copies of one another, which is not the same function.

    Args:
        small: a program with the weights' names and shapes of the coarser level, trained or not.
        level: what `coalesce` returned.

    Returns:
        A program with the finer level's graph. Coalescing it gives `small` again.

    Raises:
        PassError: SPARC220 when `small` is not of that level.
    """
    grown = level.fine.clone()
    kept = {member: name for name, members in level.layers.items() for member in members}
    for name in list(grown.weights):
        source = kept.get(name, name)
        if source not in small.weights:
            raise _misfit(f"the smaller program has no weight {source}")
        weight = small.weights[source]
        axes = level.axes.get(source, ())
        if any(weight.shape[axis.axis] != axis.coarse_size for axis in axes):
            raise _misfit(f"{source} has shape {tuple(weight.shape)}")
        value = decoalesce_weight(weight, axes) if axes else weight
        if value.shape != grown.weights[name].shape or value.dtype != grown.weights[name].dtype:
            raise _misfit(f"{source} has shape {tuple(weight.shape)} and dtype {weight.dtype}")
        grown.set_weight(name, value)
    return grown


def interpolate(big: Program, grown: Program, alpha: float) -> Program:
    """`(1 - alpha) * big + alpha * grown`, weight by weight: it breaks the symmetry of the copies in `grown`.

    Args:
        big: the program before it was coalesced.
        grown: what `decoalesce` returned.
        alpha: 0 gives `big`, 1 gives `grown`; the paper takes 0.25 for GPT and 0.5 for BERT.

    Returns:
        A program with the graph of `big`; constants that are not floating are its own. Computed in float64.

    Raises:
        PassError: SPARC209 when alpha is not from 0 to 1, SPARC220 when the two have different weights.
    """
    if not 0 <= alpha <= 1:
        raise PassError(codes.BAD_OPTION, f"alpha={alpha} lies outside the two programs", hint="alpha from 0 to 1")
    shapes = [{name: (tensor.shape, tensor.dtype) for name, tensor in each.weights.items()} for each in (big, grown)]
    if shapes[0] != shapes[1]:
        raise _misfit("the two programs have different weights")
    result = big.clone()
    for name, tensor in big.weights.items():
        if tensor.is_floating_point():
            mixed = (1 - alpha) * tensor.double() + alpha * grown.weights[name].double()
            result.set_weight(name, mixed.to(tensor.dtype))
    return result


def _infer(program: Program) -> None:
    for entry, node in program.nodes():
        if node.op == "call_function":
            entry.infer(node)


def _misfit(why: str) -> PassError:
    return PassError(
        codes.NOT_COALESCIBLE,
        "the programs are not of one family of levels",
        why=why,
        hint="give decoalesce the map that coalesce returned with the program",
    )
