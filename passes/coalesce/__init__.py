"""Coalescing: several operators become one, larger one."""

from sparc.passes.coalesce.parallel import coalesce_parallel

__all__ = ["coalesce_parallel"]
