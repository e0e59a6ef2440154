"""Kernels to be launched: compiled ahead in several processes."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing import TimeoutError, get_context
from multiprocessing.pool import AsyncResult

from torch import Tensor

from sparc.codegen.triton.accept import fits
from sparc.codegen.triton.generate import generate
from sparc.codegen.triton.kernel import Kernel
from sparc.codegen.triton.launch import Scratch, arguments, grid, make_scratch, scratch_sizes
from sparc.codegen.triton.operators import launch
from sparc.codegen.triton.prior import SKINNY, bare
from sparc.codegen.triton.problem import Configuration, Problem
from sparc.diag import LoweringError

_WORKERS = 12


@dataclass(frozen=True)
class Trial:
    """A configuration for a problem and a number of tokens, and the cost model's seconds."""

    problem: Problem
    configuration: Configuration
    tokens: int
    modelled: float = 0.0

    @property
    def own(self) -> Problem:
        """What its kernel computes: a normalisation is apart where there are many tokens."""
        return bare(self.problem) if self.configuration.block_tokens > SKINNY else self.problem

    @cached_property
    def kernel(self) -> Kernel:
        """The kernel."""
        return generate(self.own, self.configuration)

    def specialised(self) -> Kernel:
        """The kernel as a launch compiles it: a number of tokens that 16 divides is known to be one."""
        kernel = self.kernel
        if self.tokens % 16:
            return kernel
        return replace(kernel, arguments=tuple(replace(each, aligned=True) for each in kernel.arguments))

    def scratch(self, device: str) -> Scratch:
        """Memory for split sums."""
        return make_scratch(scratch_sizes(self.own, self.configuration, self.tokens), device)

    def run(
        self, x: Tensor, buffers: Sequence[Tensor], operands: Sequence[Tensor], y: Tensor, scratch: Scratch
    ) -> None:
        """Launch it: on the GPU, or in the interpreter for tensors of the CPU.

        Args:
            x: `[tokens, columns]`.
            buffers: the weights' tensors.
            operands: what `own`'s prologue reads.
            y: `[tokens, rows]`, written.
            scratch: of the size that `scratch` makes.
        """
        given = arguments(self.configuration, [x, *buffers, *operands], y, self.tokens, scratch)
        launch(self.kernel, grid(self.own, self.configuration, self.tokens), given)


# compiling ------------------------------------------------------------------------------------------------------------
class Compiler:
    """Compiles kernels in other processes, into Triton's cache, where launches find them."""

    def __init__(self, capability: int) -> None:
        """Args: the capability of the GPU."""
        self._capability = capability
        self._pool = get_context("spawn").Pool(max(1, min(_WORKERS, (os.cpu_count() or 2) - 2)))
        self._results: dict[str, AsyncResult[bool]] = {}
        self._stalled = False

    def __enter__(self) -> "Compiler":
        return self

    def __exit__(self, *raised: object) -> None:
        self._pool.terminate()

    def submit(self, trials: Iterable[Trial]) -> None:
        """Compile what trials launch, in order; returns at once."""
        for trial in trials:
            kernel = trial.specialised()
            if kernel.digest not in self._results:
                self._results[kernel.digest] = self._pool.apply_async(_judge, (kernel, self._capability))

    def fits(self, trial: Trial, seconds: float = 60) -> bool:
        """Whether a trial's kernel compiles, spills nothing and fits; also true when that is not known in time, and
        then nothing is waited for any more.
        """
        self.submit([trial])
        try:
            return self._results[trial.specialised().digest].get(timeout=0 if self._stalled else seconds)
        except TimeoutError:
            self._stalled = True
            return True


def _judge(kernel: Kernel, capability: int) -> bool:
    try:
        return fits(kernel, capability)
    except LoweringError:
        return False


def said(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:200]
