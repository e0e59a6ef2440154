"""Kernels on the device: compiled ahead in several processes, launched, recorded in CUDA graphs and timed in turns."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing import TimeoutError, get_context
from multiprocessing.pool import AsyncResult
from statistics import median

import torch
from torch import Tensor

from sparc.codegen.triton.accept import fits
from sparc.codegen.triton.generate import generate
from sparc.codegen.triton.kernel import Kernel
from sparc.codegen.triton.launch import Scratch, arguments, grid, make_scratch, scratch_sizes
from sparc.codegen.triton.operators import launch
from sparc.codegen.triton.prior import SKINNY, bare
from sparc.codegen.triton.problem import Configuration, Problem
from sparc.diag import LoweringError

COLD_BYTES = 150_000_000  # more than any second-level cache holds
_WORKERS = 12
_AHEAD_CYCLES = 400_000  # that the GPU waits while launches queue up, so that none of them is waited for


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


# timing ---------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Replay:
    """A recorded graph that does the same several times, each on weights of its own."""

    graph: torch.cuda.CUDAGraph
    count: int


def copies_of(nbytes: int) -> int:
    """How many copies of weights of this size are more than caches hold."""
    return COLD_BYTES // max(nbytes, 1) + 2


def record(functions: Sequence[Callable[[], object]]) -> Replay:
    """A graph of all functions, one after another; they are called twice before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for function in (*functions, *functions):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        for function in functions:
            function()
    return Replay(graph, len(functions))


def time_in_turns(replays: Mapping[str, Replay], rounds: int = 30) -> dict[str, float]:
    """The median seconds of one function of each graph; every other round goes backwards."""
    names = list(replays)
    times: dict[str, list[float]] = {name: [] for name in names}
    for replay in replays.values():
        replay.graph.replay()
    torch.cuda.synchronize()
    for index in range(rounds):
        events = {}
        for name in names if index % 2 == 0 else names[::-1]:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(_AHEAD_CYCLES)
            start.record()
            replays[name].graph.replay()
            end.record()
            events[name] = start, end
        torch.cuda.synchronize()
        for name, (start, end) in events.items():
            times[name].append(start.elapsed_time(end) / 1e3 / replays[name].count)
    return {name: median(values) for name, values in times.items()}


def said(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:200]
