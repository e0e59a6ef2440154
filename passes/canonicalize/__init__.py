"""Raise what models write by hand to one node, or one recognised form, each."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from sparc.contract import Bounded, Contract
from sparc.pass_base import Pass, PassContext, Stage
from sparc.passes.canonicalize.activation import ACTIVATION
from sparc.passes.canonicalize.attention import ATTENTION
from sparc.passes.canonicalize.grouped import GROUPED
from sparc.passes.canonicalize.linear import LINEAR
from sparc.passes.canonicalize.mask import MASK
from sparc.passes.canonicalize.norm import NORM
from sparc.passes.canonicalize.padding import PADDING
from sparc.passes.canonicalize.product import PRODUCT
from sparc.passes.canonicalize.rotary import ROTARY
from sparc.passes.clean import MergeCommon, RemoveNoOps
from sparc.passes.constants import FoldConstants
from sparc.program import Program

CLEAN: tuple[Pass, ...] = (RemoveNoOps(), FoldConstants(), MergeCommon())
FORMS: tuple[Pass, ...] = (*LINEAR, *GROUPED, *PRODUCT, *NORM, *ACTIVATION, *ROTARY, *ATTENTION, *MASK)


@dataclass(frozen=True)
class Canonicalize(Pass):
    """What recipes start with: clean up, raise every known form, clean up again.

    Every step of `steps()` is a pass of its own and may be named in a recipe by itself.
    """

    name: ClassVar[str] = "canonicalize"
    stage: ClassVar[Stage] = Stage.CANONICALIZE

    @property
    def contract(self) -> Contract:
        """Rounding only; most steps are bitwise."""
        return Bounded(1e-4)

    def steps(self) -> Iterator[Pass]:
        """The passes in order."""
        yield RemoveNoOps()
        yield from LINEAR
        yield from GROUPED  # before constants are folded: a transpose of the weight would become another weight
        yield from PADDING  # before constants are folded: the border is compared in float64
        yield from CLEAN
        yield from FORMS
        yield from CLEAN

    def run(self, program: Program, context: PassContext) -> None:
        """Run every step; the driver checks each rewritten region and the whole."""
        for step in self.steps():
            step.run(program, context)


__all__ = ["CLEAN", "FORMS", "Canonicalize"]
