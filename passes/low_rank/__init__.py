"""Low rank: one product becomes two thinner ones."""

from sparc.passes.low_rank.low_rank import LowRank

__all__ = ["LowRank"]
