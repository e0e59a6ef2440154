"""A generated kernel: its source, how it is called, and the resources it promises to take."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Regime = Literal["gemv", "skinny", "gemm"]


@dataclass(frozen=True)
class Argument:
    """An argument of a kernel.

    Args:
        name: its name in the source.
        type: Triton's name of its type: `*fp16`, `*i32`, `i32`.
        aligned: whether it is a multiple of 16 (a pointer: its address), which the code is specialised for.
    """

    name: str
    type: str
    aligned: bool = False


@dataclass(frozen=True)
class Resources:
    """What a kernel may take, judged on its machine code.

    Args:
        shared_bytes: the most shared memory of one program.
        load_bytes: the width that the weight's loads must have, in bytes.
        tensor_core: how the machine instructions that multiply may begin (`HGMMA`, `HMMA`, `IMMA`, `QGMMA`); one of
            them
            must be in the main loop, unless there are none.
        issue_slots: the most instructions in the main loop for one weight.
        arithmetic_slots: the most of them on the integer and logic units.
        forbidden: beginnings of instructions that the main loop must not hold, such as `I2F`.
    """

    shared_bytes: int = 227 * 1024
    load_bytes: int = 16
    tensor_core: tuple[str, ...] = ()
    issue_slots: float = float("inf")
    arithmetic_slots: float = float("inf")
    forbidden: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kernel:
    """One generated kernel, specialised for a site and a configuration: shapes and tile sizes are literals in the
    source.

    Args:
        name: the function's name in the source.
        source: the module that defines it.
        arguments: what it is called with.
        num_warps: warps of one program.
        num_stages: depth of the software pipeline.
        loop_weights: weights that one program decodes in one iteration of its main loop.
        iterations: how often a program runs its main loop, where that is known: it may be unrolled.
        weight_bits: stored bits of one weight, its scales included.
        expects: the resources it promises to take.
    """

    name: str
    source: str
    arguments: tuple[Argument, ...]
    num_warps: int = 4
    num_stages: int = 3
    loop_weights: int = 0
    iterations: int = 0
    weight_bits: float = 0.0
    expects: Resources = field(default_factory=Resources)

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that name the code and how it is compiled."""
        text = f"{self.source}\n{self.arguments}\n{self.num_warps} {self.num_stages}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def signature(arguments: Sequence[Argument]) -> dict[str, str]:
    """Triton's signature: types by name, in order."""
    return {argument.name: argument.type for argument in arguments}
