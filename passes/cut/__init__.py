"""Cutting: programs made smaller along their dependency groups."""

from sparc.passes.cut.slice import cut, cut_groups, mask

__all__ = ["cut", "cut_groups", "mask"]
