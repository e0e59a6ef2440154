"""What a kernel promises to take, from its problem and configuration."""

from sparc.codegen.triton.kernel import Resources
from sparc.codegen.triton.problem import Configuration, Problem


def expected(problem: Problem, configuration: Configuration) -> Resources:
    """The promise: no spills, loads of 16 bytes, tensor cores where there are tiles of tokens, and the instructions
    that
    decoding takes by its lowering's word, with what the product itself takes.
    """
    weight = problem.weights[0]
    cost = weight.cost(problem.product)
    single = configuration.block_tokens == 1
    cores = {"int8": ("IGMMA", "IMMA"), "float8e4nv": ("QGMMA", "QMMA", "HMMA", "HGMMA"), "float32": ()}
    return Resources(
        load_bytes=16 if not single else 4,
        tensor_core=() if single else cores.get(problem.product, ("HGMMA", "HMMA")),
        issue_slots=cost.issue + 3.0,
        arithmetic_slots=cost.arithmetic + 1.5,
        forbidden=weight.forbidden,
    )
