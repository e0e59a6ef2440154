"""Levels: smaller models made of a model's own weights, and the way back."""

from sparc.passes.levels.coalesce import LevelMap, coalesce, decoalesce, interpolate

__all__ = ["LevelMap", "coalesce", "decoalesce", "interpolate"]
