"""Gram matrices: second moments of what a weight is multiplied with."""

import json
from typing import NamedTuple

import torch
from torch import Tensor

from sparc.observers.base import finite
from sparc.observers.ranges import Mean

_PATCHES = 2**16
_WIDE, _PANELS = 512, 8


class Geometry(NamedTuple):
    """Where a convolution reads; a kind of statistics is `f"patches:{geometry}"`.

    Args:
        kernel: its size along each of one or two axes.
        stride: likewise.
        padding: zeros before and behind, along each axis.
        dilation: likewise.
        groups: in how many groups channels are convolved.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    def __str__(self) -> str:
        return json.dumps(self)

    @staticmethod
    def parse(text: str) -> "Geometry":
        """The inverse of `str`."""
        kernel, stride, padding, dilation, groups = json.loads(text)
        sides = tuple((before, after) for before, after in padding)
        return Geometry(tuple(kernel), tuple(stride), sides, tuple(dilation), groups)


class Gram(Mean):
    """`gram`: the mean of `x xᵀ` over all rows x, `[channels, channels]` float64.

    Products are float32, sums over batches float64.
    """

    def _add(self, value: Tensor, batch: int) -> None:
        """Accumulate."""
        rows = self.rows_of(value)
        self.absorb([_outer(rows).double(), torch.tensor(rows.shape[-2])])

    def rows_of(self, value: Tensor) -> Tensor:
        """`[..., rows, channels]`, float32."""
        return self.by_channel(value)


class PatchGram(Gram):
    """`patches`: `Gram` of the patches that a convolution multiplies, `[groups, reduce, reduce]`, where a patch is laid
    out like a row of the convolution's weight.

    At most 2^16 evenly spaced patches of a batch are counted.
    """

    def __init__(self, geometry: Geometry) -> None:
        """Args: the convolution's."""
        super().__init__()
        self.geometry = geometry

    def rows_of(self, value: Tensor) -> Tensor:
        """`[groups, patches, reduce]`."""
        kernel, stride, padding, dilation, groups = self.geometry
        image = value.float() if bool(torch.isfinite(value.sum())) else finite(value.float())
        if image.ndim == len(kernel) + 1:  # one image without a batch
            image = image.unsqueeze(0)
        if len(kernel) == 1:
            image, kernel, stride = image.unsqueeze(2), (1, *kernel), (1, *stride)
            padding, dilation = ((0, 0), *padding), (1, *dilation)
        sides = [side for before, after in reversed(padding) for side in (before, after)]
        found, seen, step = [], 0, 1
        for each in torch.nn.functional.pad(image, sides):  # one by one: all patches are kernel times the whole batch
            columns = torch.nn.functional.unfold(each, kernel, dilation=dilation, stride=stride)
            step = max(1, -(-len(image) * columns.shape[1] // _PATCHES))
            found.append(columns[:, -seen % step :: step])
            seen += columns.shape[1]
        return torch.cat(found, 1).unflatten(0, (groups, -1)).transpose(-1, -2)


def _outer(rows: Tensor) -> Tensor:
    """`rowsᵀ rows`, of which a wide one is computed on one side of the diagonal only: two thirds of the time."""
    width = rows.shape[-1]
    if width < _WIDE:
        return rows.transpose(-1, -2) @ rows
    product, panel = rows.new_empty(*rows.shape[:-2], width, width), -(-width // _PANELS)
    for start in range(0, width, panel):
        stop = min(start + panel, width)
        part = rows[..., start:stop].transpose(-1, -2) @ rows[..., start:]
        product[..., start:stop, start:] = part
        product[..., start:, start:stop] = part.transpose(-1, -2)
    return product
