"""Folds: an operator disappears into the weights of its neighbour."""

from sparc.passes.fold.batch_norm import fold_batch_norm, fold_batch_norm_before

__all__ = ["fold_batch_norm", "fold_batch_norm_before"]
