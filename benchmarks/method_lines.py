"""The lines of `benchmarks.methods`: recipes behind the canonical program, by model and name."""

from collections.abc import Mapping, Sequence

from sparc.encoding.int_grid import IntGrid
from sparc.encoding.nm import NM
from sparc.encoding.unstructured import Unstructured
from sparc.pass_base import Pass
from sparc.passes.activation.correct import CorrectBias
from sparc.passes.activation.static import CalibrateActivations
from sparc.passes.cut.prune_units import PruneUnits
from sparc.passes.equalize.awq import Awq
from sparc.passes.prune import Prune
from sparc.passes.rotate import Rotate
from sparc.passes.round import Compensate, Round
from sparc.recipe import Step

Steps = Sequence[Pass | Step]
HALF = Unstructured()
INNER = ("*", "!@embedding")
"""Products; a head that is tied to an embedding stays as it is."""


def _inner(*passes: Pass) -> Steps:
    return tuple(Step(each, where=INNER) for each in passes)


def _grid(bits: int) -> IntGrid:
    return IntGrid(bits, group=64, symmetric=False)


def _minimum(bits: int) -> IntGrid:
    """What HQQ fits: a floating minimum instead of the integer zero point, in half precision both."""
    return IntGrid(bits, group=64, symmetric=False, zero="minimum", scale_dtype="float16")


def _swept(bits: int) -> Round:
    return Round(_grid(bits), fit="search", importance="data", method="gptq")


def _transformer() -> dict[str, Steps]:
    found: dict[str, Steps] = {"float32": ()}
    for bits in (4, 3, 2):
        found |= {
            f"int{bits}, to nearest": _inner(Round(_grid(bits))),
            f"int{bits}, to nearest, searched": _inner(Round(_grid(bits), fit="search", importance="data")),
            f"int{bits}, HQQ": _inner(Round(_minimum(bits), fit="hqq")),
            f"int{bits}, AWQ": _inner(Awq(_grid(bits)), Round(_grid(bits), fit="search", importance="data")),
            f"int{bits}, GPTQ": _inner(Round(_grid(bits), method="gptq")),
            f"int{bits}, GPTQ, searched": _inner(_swept(bits)),
            f"int{bits}, AWQ, GPTQ, searched": _inner(Awq(_grid(bits)), _swept(bits)),
            f"int{bits}, rotated, GPTQ, searched": (Rotate(), *_inner(_swept(bits))),
        }
    found |= {
        "2:4, magnitude": _inner(Prune(NM(2, 4))),
        "2:4, Wanda": _inner(Prune(NM(2, 4), method="wanda")),
        "2:4, Wanda, DSnoT": _inner(Prune(NM(2, 4), method="wanda", refine=True)),
        "2:4, SparseGPT": _inner(Prune(NM(2, 4), method="sparsegpt")),
        "2:4, SparseGPT, DSnoT": _inner(Prune(NM(2, 4), method="sparsegpt", refine=True)),
        "2:4, SparseGPT, descended": _inner(Prune(NM(2, 4), method="sparsegpt"), Compensate(refit=True)),
        "50%, magnitude": _inner(Prune(HALF, density=0.5)),
        "50%, Wanda": _inner(Prune(HALF, density=0.5, method="wanda")),
        "50%, Wanda, DSnoT": _inner(Prune(HALF, density=0.5, method="wanda", refine=True)),
        "50%, SparseGPT": _inner(Prune(HALF, density=0.5, method="sparsegpt")),
        "50%, SparseGPT, descended": _inner(Prune(HALF, density=0.5, method="sparsegpt"), Compensate(refit=True)),
        "50%, SparseGPT, mixed": _inner(
            Prune(HALF, density=0.5, method="sparsegpt", criterion="isc", allocation="sensitivity")
        ),
        "2:4, SparseGPT, then int8": _inner(Prune(NM(2, 4), method="sparsegpt"), Round(IntGrid(8))),
        "2:4, SparseGPT, then int4 by GPTQ": _inner(Prune(NM(2, 4), method="sparsegpt"), _swept(4)),
        "2:4 and int4, SparseGPT and GPTQ in one sweep": _inner(
            Round(NM(2, 4, of=_grid(4)), fit="search", importance="data", method="gptq")
        ),
    }
    return found


def _convolutional() -> dict[str, Steps]:
    activations = (CalibrateActivations(), CorrectBias())
    found: dict[str, Steps] = {
        "float32": (),
        "int8": (Round(IntGrid(8)),),
        "int8, activations too": (Round(IntGrid(8)), *activations),
    }
    for bits in (4, 3):
        found |= {
            f"int{bits}, to nearest": (Round(_grid(bits)),),
            f"int{bits}, to nearest, searched": (Round(_grid(bits), fit="search", importance="data"),),
            f"int{bits}, GPTQ": (Round(_grid(bits), method="gptq"),),
            f"int{bits}, GPTQ, searched": (_swept(bits),),
        }
    found |= {
        "2:4, magnitude": (Prune(NM(2, 4)),),
        "2:4, Wanda": (Prune(NM(2, 4), method="wanda"),),
        "2:4, SparseGPT": (Prune(NM(2, 4), method="sparsegpt"),),
        "50%, magnitude": (Prune(HALF, density=0.5),),
        "50%, Wanda": (Prune(HALF, density=0.5, method="wanda"),),
        "50%, SparseGPT": (Prune(HALF, density=0.5, method="sparsegpt"),),
    }
    for keep in (0.95, 0.9, 0.75):
        refitted = PruneUnits(keep=keep, importance="activation", compensate=True)
        found |= {
            f"{keep:.0%} of the channels, magnitude": (PruneUnits(keep=keep),),
            f"{keep:.0%} of the channels, activation": (PruneUnits(keep=keep, importance="activation"),),
            f"{keep:.0%} of the channels, activation, refitted": (refitted,),
            f"{keep:.0%} of the channels, activation, refitted, then int8": (refitted, Round(IntGrid(8)), *activations),
        }
    return found


LINES: Mapping[str, Mapping[str, Steps]] = {
    "smollm2": _transformer(),
    "minilm": _transformer(),
    "efficientnet": _convolutional(),
}

SCALE = LINES["smollm2"]["2:4 and int4, SparseGPT and GPTQ in one sweep"]
