"""The recipes sparc ships, by name."""

from sparc.encoding.int_grid import IntGrid
from sparc.pass_base import Pass
from sparc.passes.activation.dynamic import QuantizeActivations
from sparc.passes.canonicalize import Canonicalize
from sparc.passes.encode import Encode
from sparc.passes.fold import fold_batch_norm, fold_batch_norm_before
from sparc.passes.round import Round
from sparc.recipe import Recipe, Step

INT8 = IntGrid(bits=8)
INT4 = IntGrid(bits=4, group=32, symmetric=False)


def prepare() -> tuple[Pass, ...]:
    """What every recipe starts with: the same function in fewer, raised operators."""
    return (Canonicalize(), fold_batch_norm, fold_batch_norm_before)


def _recipe(name: str, *steps: Pass | Step) -> Recipe:
    every = (*prepare(), *steps, Encode())
    return Recipe(tuple(step if isinstance(step, Step) else Step(step) for step in every), name=name)


def recipes() -> dict[str, Recipe]:
    """Every shipped recipe.

    - `dense`: nothing is compressed; the graph is cleaned and raised.
    - `w8`: weights in 8 bits per output channel.
    - `w4`: weights in 4 bits per group of 32, embeddings (and a head tied to one) in 8.
    - `w8a8`: weights in 8 bits, activations quantized as they come, per tensor or per token, whichever pays at each site.
    """
    return {
        "dense": Recipe(tuple(Step(each) for each in prepare()), name="dense"),
        "w8": _recipe("w8", Round(INT8)),
        "w4": _recipe("w4", Round(INT4, search=True, importance="norm"), Step(Round(INT8), where="@embedding")),
        "w8a8": _recipe("w8a8", Round(INT8), QuantizeActivations()),
    }
