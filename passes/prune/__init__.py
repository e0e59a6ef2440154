"""Pruning: which weights are zero."""

from sparc.passes.prune.permute import PermuteChannels
from sparc.passes.prune.prune import Prune

__all__ = ["PermuteChannels", "Prune"]
