"""A grid: the set of values a weight may take. It is what rounding decides and what encoding needs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from sparc.encoding.base import Encoding


@dataclass(frozen=True, eq=False)
class Grid:
    """An encoding's spec and the tensors that fix its values for one weight.

    Args:
        spec: the encoding.
        tensors: scales, zero points, codebook, mask, by name, in the layout of the weight's matrix view.
        view: the name of the matrix view they were fitted in.
    """

    spec: "Encoding"
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    view: str = "matrix"
