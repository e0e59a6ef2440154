"""Rotations: orthogonal matrices folded into the weights around a value, so that no channel of it stands out."""

from sparc.passes.rotate.rotate import Rotate

__all__ = ["Rotate"]
