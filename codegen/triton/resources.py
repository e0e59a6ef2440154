"""What a kernel promises to take, from its problem and configuration."""

import math

from sparc.codegen.triton.kernel import Resources
from sparc.codegen.triton.problem import Configuration, Problem

# What a weight takes beside its decoding, measured on machine code and rounded up: without tensor cores (multiply, add,
# convert, read the activation), with them; and where the activation is changed on the way. It is promised for tiles of
# few tokens, whose time is that of reading weights; with many, the product itself takes more.
_VECTOR, _TENSOR, _CHANGED_VECTOR, _CHANGED_TENSOR = 5.0, 2.6, 12.0, 4.0
_CHANGED_LOOKUP = 60.0  # for one of a step's columns, which all rows share
_FEW = 16
_STEPS = 4  # of the loop, below which what is around it counts more than what is in it
_CORES = {"int8": ("IGMMA", "IMMA"), "float8e4nv": ("QGMMA", "QMMA", "HGMMA", "HMMA"), "float32": ()}


def expected(problem: Problem, configuration: Configuration) -> Resources:
    """The promise: no spills, loads of 16 bytes, tensor cores where there are tiles of tokens, and the instructions
    that
    decoding takes by its lowering's word, with those of the product and of what is done to the activation.
    """
    weight, cost = problem.weights[0], problem.cost(configuration)
    vector = configuration.block_tokens == 1 and configuration.form == "product"
    around = _around(problem, configuration)
    if weight.padded_columns < _STEPS * configuration.block_columns:
        around = math.inf
    return Resources(
        load_bytes=4 if vector else 16,
        tensor_core=() if vector else _CORES.get(problem.product, ("HGMMA", "HMMA")),
        issue_slots=cost.issue + around,
        arithmetic_slots=cost.arithmetic + around / 3,
        forbidden=weight.forbidden,
    )


def _around(problem: Problem, configuration: Configuration) -> float:
    if configuration.form == "lookup":
        around, changed = 0.0, _CHANGED_LOOKUP / configuration.block_rows
    elif configuration.block_tokens == 1:
        around, changed = _VECTOR, _CHANGED_VECTOR
    else:
        around, changed = _TENSOR if configuration.block_tokens <= _FEW else math.inf, _CHANGED_TENSOR
    return around + (changed if problem.prologue.kind != "none" or problem.prologue.quantized else 0.0)
