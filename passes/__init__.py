"""The pass library, installed as `sparc.passes`."""

if __name__ != "sparc.passes":
    raise ImportError("import this package as `sparc.passes`")

from sparc.pass_base import Pass
from sparc.registry import Extension


def extension() -> Extension:
    """sparc's own passes, encodings and recipes, as the extension they are."""
    from sparc.encoding.parse import BUILTIN
    from sparc.passes.activation.correct import CorrectBias
    from sparc.passes.activation.dynamic import QuantizeActivations
    from sparc.passes.activation.minimum import SplitMinimum
    from sparc.passes.activation.pairs import CancelPairs
    from sparc.passes.activation.static import CalibrateActivations
    from sparc.passes.canonicalize import Canonicalize
    from sparc.passes.clean import RemoveDead
    from sparc.passes.coalesce import MergeNeurons, coalesce_parallel, stack_projections
    from sparc.passes.cut.blocks import DropBlocks
    from sparc.passes.cut.merge_blocks import MergeBlocks
    from sparc.passes.cut.prune_units import PruneUnits
    from sparc.passes.decode import Decode
    from sparc.passes.encode import Encode
    from sparc.passes.equalize.awq import Awq
    from sparc.passes.equalize.equalize import Equalize
    from sparc.passes.equalize.smooth import Smooth
    from sparc.passes.fold import (
        FoldPrompt,
        fold_affine,
        fold_batch_norm,
        fold_batch_norm_before,
        fold_norm_affine,
        fold_shared,
        fold_table,
    )
    from sparc.passes.low_rank import LowRank
    from sparc.passes.prune import PermuteChannels, Prune
    from sparc.passes.recipes import recipes
    from sparc.passes.rotate import Rotate
    from sparc.passes.round import Compensate, Round
    from sparc.passes.share_steps import ShareSteps

    steps = dict.fromkeys(type(step) for step in Canonicalize().steps())
    norms = (fold_batch_norm, fold_batch_norm_before)
    folds = (FoldPrompt, *norms, fold_shared, fold_affine, fold_table, fold_norm_affine)
    stacks = (Decode, RemoveDead, *folds, coalesce_parallel, stack_projections)
    exact: tuple[type[Pass] | Pass, ...] = (Canonicalize, *steps, *stacks)
    cuts: tuple[type[Pass] | Pass, ...] = (MergeNeurons, ShareSteps, DropBlocks, MergeBlocks, PruneUnits)
    moves: tuple[type[Pass] | Pass, ...] = (Rotate, Equalize, Smooth, Awq, LowRank, PermuteChannels, Prune)
    activations = (SplitMinimum, QuantizeActivations, CalibrateActivations, CancelPairs, CorrectBias)
    passes = (*exact, *cuts, *moves, Round, Compensate, *activations, Encode)
    return Extension("sparc", passes=passes, encodings=tuple(BUILTIN.values()), recipes=recipes())
