"""Which weights a mask is worth anything on."""

from sparc.analysis.sites import Site
from sparc.program import Program


def why_not_masked(program: Program, site: Site) -> str:
    """Why a site's zeros would be of no use, or cost too much; empty when they are worth having."""
    if any(use.operator == "embedding" for use in site.uses):
        return "it is an embedding: no product skips its zeros"
    if any(use.operator == "conv" for use in site.uses) and program.weights[site.weight].shape[1] == 1:
        return "it is a depthwise convolution: each output reads a single channel"
    return ""
