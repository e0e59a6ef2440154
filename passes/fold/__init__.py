"""Folds: an operator disappears into the weights of its neighbour."""

from sparc.passes.fold.affine_merge import fold_affine
from sparc.passes.fold.batch_norm import fold_batch_norm, fold_batch_norm_before
from sparc.passes.fold.norm import fold_norm_affine
from sparc.passes.fold.prompt import FoldPrompt
from sparc.passes.fold.shared import fold_shared
from sparc.passes.fold.table import fold_table

__all__ = [
    "FoldPrompt",
    "fold_affine",
    "fold_batch_norm",
    "fold_batch_norm_before",
    "fold_norm_affine",
    "fold_shared",
    "fold_table",
]
