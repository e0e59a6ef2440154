"""sparc: a compiler for sparse and quantized PyTorch models that shows the evidence."""

from sparc.api import coalesce, compile, decoalesce, deepen, interpolate, load, plan, read_checkpoint, widen
from sparc.artifact import Artifact
from sparc.backend import Backend
from sparc.capture import capture, capture_entries
from sparc.contract import Approximate, Bounded, Exact
from sparc.diag import Diagnostics, SparcError, SparcWarning
from sparc.pass_base import Pass, PassContext, Stage
from sparc.program import Program
from sparc.recipe import Recipe, Step
from sparc.registry import Extension
from sparc.rewrite import Match, Skip, rewrite

__all__ = [
    "Approximate",
    "Artifact",
    "Backend",
    "Bounded",
    "Diagnostics",
    "Exact",
    "Extension",
    "Match",
    "Pass",
    "PassContext",
    "Program",
    "Recipe",
    "Skip",
    "SparcError",
    "SparcWarning",
    "Stage",
    "Step",
    "capture",
    "capture_entries",
    "coalesce",
    "compile",
    "decoalesce",
    "deepen",
    "interpolate",
    "load",
    "plan",
    "read_checkpoint",
    "rewrite",
    "widen",
]
