"""The catalogue of diagnostic codes: one entry each, stable for ever; `docs/diagnostics.md` is generated from it.

1xx capture, 2xx passes and recipes, 3xx verification, 4xx lowering, 5xx artifacts; a module for each.
"""

# ruff: noqa: F403, I001  (in the order of the numbers)
from sparc.codes.code import Code as Code
from sparc.codes.capture import *
from sparc.codes.recipes import *
from sparc.codes.verification import *
from sparc.codes.lowering import *
from sparc.codes.artifacts import *


def catalogue() -> dict[str, Code]:
    """Every code by its id, in order."""
    codes = [value for value in globals().values() if isinstance(value, Code)]
    return {code.id: code for code in sorted(codes, key=lambda code: code.id)}
