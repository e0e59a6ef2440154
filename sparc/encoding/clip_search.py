"""Looking for the integer grid of least squared error in each group.

Three ideas, one after the other. Spans: if the values lie on a grid already but do not use its outermost codes, their
range spans fewer steps than min-max gives it; for 2 to 4 bits, each number of steps is tried, which finds such a grid
again. Clips: the range is shrunk step by step and the best is kept (the `mse` option of GPTQ, Frantar et al. 2022, with
exponent 2). Alternation: for the codes found, the best scale and minimum are a linear least squares problem; for the
new grid, the nearest codes are found again (as in llama.cpp's quantizers, and in HQQ, Badri and Shaji 2023).

Every candidate is stored in the grid's dtypes before its error is taken, and min-max is the first candidate: the result
is never worse.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparc.encoding.base import saturate
from sparc.encoding.grid import Grid

if TYPE_CHECKING:
    from sparc.encoding.int_grid import IntGrid

Tensors = Mapping[str, Tensor]
Pieces = list[tuple[Tensor, Tensor | None]]
_STEP = 0.16  # the first clip of a b-bit grid cuts off 0.16 / 2^(b/2) of the range: 4% for 4 bits, 1% for 8
_LEAST_CLIP = 0.02
_ALTERNATIONS = 4
_PATIENCE = 4  # clips in a row that may improve nothing
_WORTH = 1e-3  # the part of the error that an improvement must remove to count
_CHUNK = 2**19  # elements: a chunk and its few temporaries stay in the cache


def clip_search(
    spec: "IntGrid", weight: Tensor, start: Grid, limits: tuple[Tensor, Tensor], importance: Tensor | None
) -> Grid:
    """The best grid found, from min-max on, a chunk of rows at a time.

    Args:
        spec: the encoding.
        weight: `[batch..., out, reduce]`, floating.
        start: the grid of `limits`.
        limits: least and greatest value of each group, `[..., out, groups]`.
        importance: as for `IntGrid.fit`.
    """
    matrix = weight.flatten(0, -2)
    weights = None if importance is None else importance.expand(weight.shape).flatten(0, -2)
    starts = {
        name: tensor.flatten(0, -2) for name, tensor in {**start.tensors, "low": limits[0], "high": limits[1]}.items()
    }
    found = {name: tensor.clone() for name, tensor in start.tensors.items()}
    for pieces, place in _chunks(spec, matrix, weights):
        tensors = {name: tensor[place].reshape(-1, 1) for name, tensor in starts.items()}
        low, high = tensors.pop("low"), tensors.pop("high")
        best = _Search(spec, pieces, weight.dtype, tensors).run(low, high)
        for name, tensor in found.items():
            target = tensor.flatten(0, -2)[place]
            target.copy_(best[name].reshape(target.shape))
    return Grid(spec, found, start.view)


def _chunks(spec: "IntGrid", matrix: Tensor, weights: Tensor | None) -> Iterator[tuple[Pieces, tuple[slice, slice]]]:
    """Chunks of whole groups: pieces `[groups, n]` of them, and their place in the grid's tensors `[rows, groups]`."""
    rows, columns = matrix.shape
    step = max(1, _CHUNK // columns)
    chunks = [slice(row, row + step) for row in range(0, rows, step)]
    if spec.group == "tensor":
        pieces = [
            (matrix[row].reshape(1, -1), None if weights is None else weights[row].reshape(1, -1)) for row in chunks
        ]
        yield pieces, (slice(None), slice(None))
        return
    length = columns if spec.group == "channel" else int(spec.group)
    whole = columns // length
    parts = [
        (slice(0, whole * length), slice(0, whole), length),
        (slice(whole * length, columns), slice(whole, None), columns % length),
    ]
    for row in chunks:
        for column, group, size in parts:
            if size and column.start < column.stop:
                own = None if weights is None else weights[row, column].reshape(-1, size)
                yield [(matrix[row, column].reshape(-1, size), own)], (row, group)


class _Search:
    """The search over groups that are looked at together; grid tensors are `[groups, 1]`.

    Args:
        spec: the encoding.
        pieces: values and importance `[groups, n]` of each piece of the groups.
        dtype: the dtype of the rounded weight.
        start: the grid to start from.
    """

    def __init__(self, spec: "IntGrid", pieces: Pieces, dtype: torch.dtype, start: Tensors) -> None:
        # errors are counted in steps of the first grid, so that their squares neither under- nor overflow
        self.unit = start["scale"].float().reciprocal()
        self.spec, self.dtype = spec, dtype
        self.pieces = [(values.float(), None if h is None else h.float()) for values, h in pieces]
        self.best = dict(start)
        self.error = self.error_of(start)

    def run(self, low: Tensor, high: Tensor) -> Tensors:
        """Spans, clips, alternation."""
        if "zero" in self.best:
            low, high = low.clamp(max=0), high.clamp(min=0)
        for span in self.spans():
            if self.spec.symmetric:
                self.try_range(low * span, high * span)
            else:
                self.try_range(low, low + (high - low) * span)
        centre = (low + high) / 2 if "minimum" in self.best else torch.zeros(())
        clip, idle = 1.0, 0
        while clip > _LEAST_CLIP and idle < _PATIENCE:
            clip *= 1 - _STEP / 2 ** (self.spec.bits / 2)
            gain = self.try_range(centre + (low - centre) * clip, centre + (high - centre) * clip)
            idle = 0 if gain > _WORTH else idle + 1
        for _ in range(_ALTERNATIONS):
            if self.try_grid(self.least_squares()) < _WORTH:
                break
        return self.best

    def spans(self) -> list[float]:
        """By what to stretch the range so that it takes fewer steps, or the one more that a symmetric grid has."""
        if self.spec.bits > 4:
            return []
        steps = self.spec.high
        return [steps / span for span in range(steps + self.spec.symmetric, steps // 2, -1) if span != steps]

    def try_range(self, low: Tensor, high: Tensor) -> float:
        """Try the grid that covers a range."""
        return self.try_grid(self.spec.from_range(low, high).tensors)

    def try_grid(self, tensors: Tensors) -> float:
        """Keep a candidate for the groups where it is better; the part of all error that this removes."""
        error = self.error_of(tensors)
        better = error < self.error
        before, self.error = self.error, torch.where(better, error, self.error)
        self.best = {name: torch.where(better, tensors[name], kept) for name, kept in self.best.items()}
        return 1 - float(self.error.sum() / before.sum())

    def numbers(self, values: Tensor, tensors: Tensors) -> Tensor:
        """Codes less their zero points, in float32."""
        scale = tensors["scale"].float()
        numbers = (values - tensors["minimum"].float()).div_(scale) if "minimum" in tensors else values / scale
        numbers.round_()
        if "zero" not in tensors:
            return numbers.clamp_(self.spec.low, self.spec.high)
        zero = tensors["zero"].float()
        return numbers.add_(zero).clamp_(self.spec.low, self.spec.high).sub_(zero)

    def residual(self, numbers: Tensor, values: Tensor, tensors: Tensors) -> Tensor:
        """Rounded less original values; written over `numbers`."""
        numbers.mul_(tensors["scale"].float())
        if "minimum" in tensors:
            numbers.add_(tensors["minimum"].float())
        if self.dtype != torch.float32:
            numbers = saturate(numbers, self.dtype).float()
        return numbers.sub_(values)

    def error_of(self, tensors: Tensors) -> Tensor:
        """The weighted squared error of every group."""
        total = torch.zeros(())
        for values, h in self.pieces:
            residual = self.residual(self.numbers(values, tensors), values, tensors).mul_(self.unit)
            if h is not None:
                residual.mul_(h.sqrt())
            total = total + torch.linalg.vector_norm(residual, dim=-1, keepdim=True).square()
        return total

    def least_squares(self) -> Tensors:
        """The grid that fits the best grid's codes best; a zero point stays.

        With codes q (less their zero point) and residual r = s*q + o - w, ds and do minimise
        `sum(h * (r + ds*q + do)²)`; do is 0 unless the grid has a minimum.
        """
        # codes around 0 keep the equations well conditioned
        centre = self.spec.high / 2 if "minimum" in self.best else 0.0
        h_, hq, hqq, hr, hqr = [torch.zeros(())] * 5
        for values, own in self.pieces:
            q = self.numbers(values, self.best)
            r = self.residual(q.clone(), values, self.best)
            q.sub_(centre)
            h = torch.ones(()) if own is None else own
            weighted = q * h
            hqq = hqq + (weighted * q).sum(-1, keepdim=True)
            hqr = hqr + (weighted * r).sum(-1, keepdim=True)
            if "minimum" in self.best:
                h_ = h_ + h.expand_as(q).sum(-1, keepdim=True)
                hq = hq + weighted.sum(-1, keepdim=True)
                hr = hr + (r * h).sum(-1, keepdim=True)
        scale = self.best["scale"].float()
        if "minimum" not in self.best:
            return {**self.best, "scale": self.spec.stored_scale(scale - hqr / hqq)}
        determinant = h_ * hqq - hq * hq
        slope = (hq * hr - h_ * hqr) / determinant
        minimum = self.best["minimum"].float() + (hq * hqr - hqq * hr) / determinant - slope * centre
        return {"scale": self.spec.stored_scale(scale + slope), "minimum": self.spec.stored_minimum(minimum)}
