"""The recipes sparc ships, by name."""

from sparc.encoding.blocks import Blocks
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.nm import NM
from sparc.pass_base import Pass
from sparc.passes.activation.correct import CorrectBias
from sparc.passes.activation.dynamic import QuantizeActivations
from sparc.passes.activation.static import CalibrateActivations
from sparc.passes.canonicalize import Canonicalize
from sparc.passes.coalesce import MergeNeurons
from sparc.passes.encode import Encode
from sparc.passes.equalize.smooth import Smooth
from sparc.passes.fold import (
    fold_affine,
    fold_batch_norm,
    fold_batch_norm_before,
    fold_norm_affine,
    fold_shared,
    fold_table,
)
from sparc.passes.prune import Prune
from sparc.passes.round import Compensate, Round
from sparc.recipe import Recipe, Step

INT8 = IntGrid(bits=8)
INT4 = IntGrid(bits=4, group=64, symmetric=False)
W4_BUDGET = 0.17  # of the dense bytes, where 4 bits in groups of 64 take 0.143: what is left goes where it is heard
W4 = (
    Round(INT4, fit="search", importance="data", finer=INT8, budget=W4_BUDGET),
    Step(Round(INT8), where="@embedding"),
)


def prepare() -> tuple[Pass, ...]:
    """What every recipe starts with: the same function in fewer, raised operators."""
    return (Canonicalize(), fold_batch_norm, fold_batch_norm_before, fold_shared, fold_affine)


def exact() -> tuple[Pass, ...]:
    """The folds and merges behind `prepare`: fewer operators and bytes, or none of it."""
    return (fold_table, fold_norm_affine, MergeNeurons())


def _recipe(name: str, *steps: Pass | Step) -> Recipe:
    every = (*prepare(), *steps, Encode())
    return Recipe(tuple(step if isinstance(step, Step) else Step(step) for step in every), name=name)


def recipes() -> dict[str, Recipe]:
    """Every shipped recipe.

    - `dense`: nothing is compressed; the graph is cleaned and raised.
    - `exact`: as `dense`, and every fold and merge that changes nothing but rounding.
    - `keep`: a compressed checkpoint's own codes and scales; the graph is cleaned and raised, no weight is changed.
    - `w8`: weights in 8 bits per output channel.
    - `w4`: weights in 4 bits per group of 64, and in 8 per output channel where that removes most output noise for each
    byte of a budget; embeddings (and a head tied to one) in 8.
    - `w4-gptq`: as `w4`, and errors within a row make up for each other on calibration data; it deserves real data.
    - `w8a8`: weights in 8 bits, activations smoothed where that helps and quantized as they come, per tensor or per
    token, whichever pays at each site.
    - `w8a8-static`: weights and activations in 8 bits, ranges calibrated on data, biases corrected.
    - `sparse24-w8`: two of every four weights, in 8 bits; embeddings only rounded.
    - `blocks64-w8`: half of the blocks of 64×64, in 8 bits; embeddings only rounded.
    """
    return {
        "dense": Recipe(tuple(Step(each) for each in prepare()), name="dense"),
        "exact": Recipe(tuple(Step(each) for each in (*prepare(), *exact())), name="exact"),
        "keep": Recipe((Step(Canonicalize()), Step(Encode())), name="keep"),
        "w8": _recipe("w8", Round(INT8)),
        "w4": _recipe("w4", *W4),
        "w4-gptq": _recipe("w4-gptq", *W4, Compensate(refit=True)),
        "w8a8": _recipe("w8a8", Smooth(), Round(INT8), QuantizeActivations()),
        "w8a8-static": _recipe("w8a8-static", Round(INT8), CalibrateActivations(), CorrectBias()),
        "sparse24-w8": _recipe("sparse24-w8", Prune(NM(2, 4)), Round(INT8)),
        "blocks64-w8": _recipe("blocks64-w8", Prune(Blocks((64, 64)), density=0.5), Round(INT8)),
    }
