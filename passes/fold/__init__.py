"""Folds: an operator disappears into the weights of its neighbour."""

from sparc.passes.fold.batch_norm import fold_batch_norm, fold_batch_norm_before
from sparc.passes.fold.norm import fold_norm_affine

__all__ = ["fold_batch_norm", "fold_batch_norm_before", "fold_norm_affine"]
