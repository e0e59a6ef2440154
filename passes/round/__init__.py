"""Rounding: moving weights onto the grids that encodings need."""

from sparc.passes.round.compensate import Compensate
from sparc.passes.round.weights import Round

__all__ = ["Compensate", "Round"]
