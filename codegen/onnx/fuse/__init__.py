"""Regions of a program that one ONNX operator computes.

They are found on the program's graph before anything is emitted; the emitter then asks the plan first.
"""

from sparc.codegen.onnx.fuse.plan import Plan, plan_fusions

__all__ = ["Plan", "plan_fusions"]
