"""What a kernel promises to take, from its problem and configuration."""

from sparc.codegen.triton.kernel import Resources
from sparc.codegen.triton.problem import Configuration, Problem

# What a weight takes beside its decoding, measured on machine code and rounded up: without tensor cores (multiply, add,
# convert, read the activation), with them, and for each weight's share of a tile of tokens.
_VECTOR, _TENSOR, _SHARE, _NORM, _LEAST_NORM = 5.0, 1.2, 1.5, 7.0, 2.5
_CORES = {"int8": ("IGMMA", "IMMA"), "float8e4nv": ("QGMMA", "QMMA", "HGMMA", "HMMA"), "float32": ()}


def expected(problem: Problem, configuration: Configuration) -> Resources:
    """The promise: no spills, loads of 16 bytes, tensor cores where there are tiles of tokens, and the instructions
    that
    decoding takes by its lowering's word, with those of the product and of what is done to the activation.
    """
    weight, single = problem.weights[0], configuration.block_tokens == 1
    cost = weight.cost(problem.product)
    share = 1.0 if single else configuration.block_tokens / configuration.block_rows
    around = _VECTOR if single else _TENSOR + _SHARE * share
    changed = problem.prologue.kind != "none" or problem.prologue.quantized
    before = max(_NORM * share, _LEAST_NORM) if changed else 0.0
    return Resources(
        load_bytes=4 if single else 16,
        tensor_core=() if single else _CORES.get(problem.product, ("HGMMA", "HMMA")),
        issue_slots=cost.issue + around + before,
        arithmetic_slots=cost.arithmetic + around / 3 + before / 3,
        forbidden=weight.forbidden,
    )
