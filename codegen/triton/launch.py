"""How a kernel is called: its grid, its arguments in order, the scratch memory that split sums need."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparc.codegen.triton.generate import generate, is_grouped
from sparc.codegen.triton.interpret import interpret
from sparc.codegen.triton.kernel import Kernel
from sparc.codegen.triton.problem import Configuration, Problem

Launcher = Callable[[Kernel, tuple[int, int, int], Sequence[Tensor | int]], None]


@dataclass(frozen=True)
class Scratch:
    """Memory that split kernels share; launches of one stream follow one another, so one of each is enough.

    Args:
        workspace: float32; where sums are added with atomics it holds zeros before and after every launch.
        counters: int32 zeros, before and after every launch.
    """

    workspace: Tensor
    counters: Tensor


def tiles(problem: Problem, configuration: Configuration, tokens: int) -> tuple[int, int]:
    """Tiles of rows and tiles of tokens."""
    return problem.tiles_of_rows(configuration.block_rows), -(-tokens // configuration.block_tokens)


def grid(problem: Problem, configuration: Configuration, tokens: int) -> tuple[int, int, int]:
    """How many programs are launched along each axis."""
    of_rows, of_tokens = tiles(problem, configuration, tokens)
    if is_grouped(configuration):
        return of_rows * of_tokens, configuration.split, 1
    return of_rows, configuration.split, of_tokens


def scratch_sizes(problem: Problem, configuration: Configuration, tokens: int) -> tuple[int, int]:
    """Elements of the workspace, and counters, that a launch needs."""
    if configuration.split == 1:
        return 0, 0
    of_rows, of_tokens = tiles(problem, configuration, tokens)
    tile = configuration.block_rows * configuration.block_tokens * len(problem.weights)
    parts = configuration.split if configuration.deterministic else 1
    return of_rows * of_tokens * tile * parts, of_rows * of_tokens


def make_scratch(sizes: tuple[int, int], device: torch.device | str = "cpu") -> Scratch:
    """Zeros of these sizes."""
    return Scratch(
        torch.zeros(max(sizes[0], 1), dtype=torch.float32, device=device),
        torch.zeros(max(sizes[1], 1), dtype=torch.int32, device=device),
    )


def arguments(
    configuration: Configuration,
    tensors: Sequence[Tensor],
    output: Tensor,
    tokens: int,
    scratch: Scratch,
) -> list[Tensor | int]:
    """A kernel's arguments in order.

    Args:
        configuration: the kernel's.
        tensors: the activation, the weights' buffers, what the prologue and the epilogue read.
        output: what is written.
        tokens: of the activation.
        scratch: at least of the sizes that `scratch_sizes` says.
    """
    found: list[Tensor | int] = [*tensors, output]
    if configuration.split > 1:
        found += [scratch.workspace, scratch.counters]
    return found if configuration.block_tokens == 1 else [*found, tokens]


def interpret_problem(
    problem: Problem,
    configuration: Configuration,
    tensors: Sequence[Tensor],
    output: Tensor,
    tokens: int,
    scratch: Scratch | None = None,
) -> Kernel:
    """Generate a problem's kernel and run it in the interpreter, on tensors of the CPU; returns the kernel."""
    kernel = generate(problem, configuration)
    own = scratch or make_scratch(scratch_sizes(problem, configuration, tokens))
    interpret(kernel, grid(problem, configuration, tokens), arguments(configuration, tensors, output, tokens, own))
    return kernel
