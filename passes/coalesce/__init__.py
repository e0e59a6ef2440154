"""Coalescing: what is computed twice is computed once, and several operators become one, larger one."""

from sparc.passes.coalesce.neurons import MergeNeurons
from sparc.passes.coalesce.parallel import coalesce_parallel
from sparc.passes.coalesce.projections import stack_projections

__all__ = ["MergeNeurons", "coalesce_parallel", "stack_projections"]
