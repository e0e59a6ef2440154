"""Verification: SPARC3xx."""

from sparc.codes.code import Code

CONTRACT_BROKEN = Code(
    "SPARC301",
    "a rewrite broke its contract",
    "An Exact or Bounded pass changed what the program computes. The match named is the guilty one.",
    "report it to the author of the pass; compile without the pass meanwhile",
)
RESTORED = Code(
    "SPARC302",
    "a site fell below its floor and was restored",
    "An Approximate pass changed the site's output by more than its floor allows, so the original weight was put back.",
    "raise the bits, lower the floor, or accept the site in higher precision",
)
METRIC_FAILED = Code(
    "SPARC303",
    "the end-to-end metric failed",
    "The user's metric on held-out data is below what was asked for.",
    "use a milder recipe, or exclude the worst sites listed in the report",
)
TYPES_CHANGED = Code(
    "SPARC304",
    "a pass changed a shape or dtype it must keep",
    "Every value that survives a pass keeps its shape and dtype.",
    "report it to the author of the pass",
)
NOT_FINITE = Code(
    "SPARC305",
    "the program produced NaN or Inf",
    "An intermediate value overflowed on the inputs of the check.",
    "check the inputs; if eager is finite, report it to the author of the pass",
)
