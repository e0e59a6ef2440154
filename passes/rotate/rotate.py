"""Rotations of residual streams and attention heads, folded into the weights."""

from dataclasses import dataclass
from typing import ClassVar

from sparc import codes
from sparc.analysis.sites import find_sites
from sparc.contract import Bounded
from sparc.diag import PassError
from sparc.pass_base import Pass, PassContext, Stage
from sparc.passes.rotate.apply import apply_plan
from sparc.passes.rotate.hadamard import Kind
from sparc.passes.rotate.heads import rotate_heads
from sparc.passes.rotate.online import rotate_inputs
from sparc.passes.rotate.plan import make_plan
from sparc.passes.rotate.weights import Store
from sparc.program import Program


@dataclass(frozen=True)
class Rotate(Pass):
    """x => x R with an orthogonal R, undone by what reads x: no feature of x stands out, and x quantizes better.

    Residual streams: what writes one (embeddings, linear layers, constants) writes `x R`, what reads one behind a norm
    takes `W diag(gain) R` and `b + W shift` over, and the norm keeps no gain; `rms_norm(x R) = rms_norm(x) R`. Where
    the norms are layer norms the writers lose their mean over the features, and the norms become RMS norms. Heads: the
    values of an attention head are written as `v R` and read so. (Ashkboos et al., "QuaRot", 2024, section 4; Liu et
    al., "SpinQuant", 2024, section 3.)

    Args:
        seed: draws the signs of Hadamard matrices, and random matrices.
        kind: `hadamard` spreads every feature evenly where such a matrix can be made, else and for `orthogonal` a
            random orthogonal matrix is taken.
        heads: rotate attention heads.
        online: also rotate what a linear layer that writes a rotated stream reads from an activation function, by an
            operator before it (two small products).
        untie: store a weight twice where the embedding and the head share it and the last norm's gain, which only the
            head takes over, is not the same for all features.
    """

    name: ClassVar[str] = "rotate"
    stage: ClassVar[Stage] = Stage.ROTATE
    scope: ClassVar[str] = "program"

    seed: int = 0
    kind: Kind = "hadamard"
    heads: bool = True
    online: bool = False
    untie: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in ("hadamard", "orthogonal"):
            raise PassError(codes.BAD_OPTION, f"kind={self.kind!r}", hint="'hadamard' or 'orthogonal'")

    @property
    def contract(self) -> Bounded:
        """The function stays the same."""
        return Bounded(1e-4)

    def run(self, program: Program, context: PassContext) -> None:
        """Rotate every stream and every head that can be."""
        store = Store(program, context)
        selected = {site.weight: context.selects(site) for site in find_sites(program)[0]}
        plan = make_plan(program, selected, self.untie)
        for node, why in plan.refused:
            context.skip(node, f"its residual stream cannot be rotated: {why}")
        downs = [node for node, role in plan.roles.items() if role.rows is not None]
        if plan.rotated and context.edit():
            apply_plan(program, plan, store, self.kind, self.seed)
            if self.online:
                rotate_inputs(program, context, store, downs, self.kind, self.seed)
        if self.heads:
            rotate_heads(program, context, store, selected, self.kind, self.seed)
