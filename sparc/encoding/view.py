"""Weight views: how each use of a weight reads it as matrices `[batch..., out, reduce]`.

A view is named by a short string so that a graph can carry it: `matrix`, `transposed`, `conv`,
`conv_transposed:groups`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class WeightView:
    """A bijection between a weight's own layout and its matrix.

    `matrix` is the identity (linear `[out, in]`, embedding `[rows, features]`, experts `[experts, out, in]`),
    `transposed` swaps the last two axes (`[in, out]`), `conv` flattens `[out, in/groups, *kernel]` to `[out, in/groups
    * kernel]`, and `conv_transposed:g` turns `[in, out/g, *kernel]` into `[g, out/g, in/g * kernel]`.
    """

    kind: str = "matrix"
    groups: int = 1

    def __str__(self) -> str:
        return f"{self.kind}:{self.groups}" if self.kind == "conv_transposed" else self.kind

    @staticmethod
    def parse(name: str) -> "WeightView":
        """The inverse of `str`."""
        kind, _, groups = name.partition(":")
        return WeightView(kind, int(groups or 1))

    def matrix_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The matrix's shape for a weight of this shape."""
        if self.kind == "conv":
            return (shape[0], math.prod(shape[1:]))
        if self.kind == "conv_transposed":
            return (self.groups, shape[1], shape[0] // self.groups * math.prod(shape[2:]))
        if self.kind == "transposed":
            return (*shape[:-2], shape[-1], shape[-2])
        return tuple(shape)

    def to_matrix(self, weight: Tensor) -> Tensor:
        """The weight as its matrix; contiguous."""
        if self.kind == "conv":
            return weight.reshape(weight.shape[0], -1).contiguous()
        if self.kind == "conv_transposed":
            split = weight.reshape(self.groups, weight.shape[0] // self.groups, weight.shape[1], -1)
            return split.transpose(1, 2).reshape(self.matrix_shape(weight.shape)).contiguous()
        if self.kind == "transposed":
            return weight.transpose(-1, -2).contiguous()
        return weight.contiguous()

    def from_matrix(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        """The matrix back in the weight's own layout and shape; contiguous."""
        if self.kind == "conv":
            return matrix.reshape(tuple(shape)).contiguous()
        if self.kind == "conv_transposed":
            split = matrix.reshape(self.groups, shape[1], shape[0] // self.groups, -1)
            return split.transpose(1, 2).reshape(tuple(shape)).contiguous()
        if self.kind == "transposed":
            return matrix.transpose(-1, -2).contiguous()
        return matrix.contiguous()
