"""Whether a kernel may be used: it compiles for the chip, does not spill, and fits."""

from functools import lru_cache

from sparc.codegen.triton.cubin import report
from sparc.codegen.triton.generate import generate
from sparc.codegen.triton.kernel import Kernel
from sparc.codegen.triton.prior import SKINNY, bare
from sparc.codegen.triton.problem import Configuration, Problem
from sparc.codegen.triton.regimes import Accept


def acceptance(capability: int) -> Accept:
    """A judge of configurations for a chip."""

    def accept(problem: Problem, configuration: Configuration) -> bool:
        return fits(_kernel(problem, configuration), capability)

    return accept


def _kernel(problem: Problem, configuration: Configuration) -> Kernel:
    return generate(bare(problem) if configuration.block_tokens > SKINNY else problem, configuration)


@lru_cache(maxsize=4096)
def fits(kernel: Kernel, capability: int) -> bool:
    """Whether a kernel's machine code spills no registers and fits a multiprocessor."""
    found = report(kernel, capability)
    return found.spill_bytes == 0 and found.programs_per_sm > 0
