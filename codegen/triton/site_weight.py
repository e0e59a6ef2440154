"""The weight of a product as the tensors and the matrix that a kernel reads."""

import math
from dataclasses import dataclass

from torch import Tensor, fx

from sparc.encoding.base import Encoding, Parts
from sparc.encoding.blocks import Blocks
from sparc.encoding.view import WeightView


@dataclass(frozen=True)
class SiteWeight:
    """The weight of one product, as a matrix.

    Args:
        names: the original weights' names; several when matrices were stacked.
        encoding: how it is stored.
        shape: `[rows, columns]`, or `[batch, rows, columns]`.
        parts: the stored tensors.
        source: the node whose value is the weight in its own layout.
        view: how that is a matrix.
    """

    names: tuple[str, ...]
    encoding: Encoding
    shape: tuple[int, ...]
    parts: Parts
    source: fx.Node
    view: WeightView

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Rows and columns; the rows of a batch are below one another."""
        return math.prod(self.shape[:-1]), self.shape[-1]

    @property
    def matrix_parts(self) -> Parts:
        """The parts of that matrix: what there is for every row, or once for all, loses the axis of the batch."""
        if len(self.shape) == 2:
            return self.parts
        return {name: each.flatten(0, 1) if self._has_rows(name, each) else each for name, each in self.parts.items()}

    def _has_rows(self, name: str, part: Tensor) -> bool:
        if isinstance(self.encoding, Blocks) and name == "codes":
            return False  # it has blocks, of all matrices
        return part.ndim == 3 and tuple(part.shape[:2]) in (self.shape[:2], (1, 1))
