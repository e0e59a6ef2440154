"""Pruning: which weights are zero."""

from sparc.passes.prune.magnitude import Prune

__all__ = ["Prune"]
