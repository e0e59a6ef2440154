"""Coalescing: units that compute the same are kept once."""

from sparc.passes.coalesce.neurons import MergeNeurons

__all__ = ["MergeNeurons"]
