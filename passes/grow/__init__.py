"""Growth: larger programs that compute the same, to be trained on (Net2Net, arXiv 1511.05641)."""

from sparc.passes.grow.deepen import deepen
from sparc.passes.grow.widen import widen

__all__ = ["deepen", "widen"]
