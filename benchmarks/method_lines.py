"""The lines of `benchmarks.methods`: recipes behind the canonical program, by model and name."""

from collections.abc import Mapping, Sequence

from sparc.encoding.int_grid import IntGrid
from sparc.encoding.nm import NM
from sparc.pass_base import Pass
from sparc.passes.prune import Prune
from sparc.passes.round import Round
from sparc.recipe import Step

Steps = Sequence[Pass | Step]
INNER = ("*", "!@embedding")
"""Products; a head that is tied to an embedding stays as it is."""


def _inner(*passes: Pass) -> Steps:
    return tuple(Step(each, where=INNER) for each in passes)


def _grid(bits: int) -> IntGrid:
    return IntGrid(bits, group=64, symmetric=False)


def _transformer() -> dict[str, Steps]:
    found: dict[str, Steps] = {"float32": ()}
    for bits in (4, 3, 2):
        found |= {
            f"int{bits}, to nearest": _inner(Round(_grid(bits))),
            f"int{bits}, to nearest, searched": _inner(Round(_grid(bits), search=True, importance="data")),
            f"int{bits}, GPTQ": _inner(Round(_grid(bits), method="gptq")),
            f"int{bits}, GPTQ, searched": _inner(Round(_grid(bits), search=True, importance="data", method="gptq")),
        }
    found |= {
        "2:4, magnitude": _inner(Prune(NM(2, 4))),
        "2:4, Wanda": _inner(Prune(NM(2, 4), importance="data")),
        "2:4, SparseGPT": _inner(Round(NM(2, 4), method="gptq")),
        "2:4 and int4, SparseGPT and GPTQ in one sweep": _inner(
            Round(NM(2, 4, of=_grid(4)), search=True, importance="data", method="gptq")
        ),
    }
    return found


LINES: Mapping[str, Mapping[str, Steps]] = {
    "smollm2": _transformer(),
    "minilm": _transformer(),
    "efficientnet": {},
}

SCALE = _inner(Round(NM(2, 4, of=_grid(4)), method="gptq"))
"""Pruning and rounding in one sweep."""
