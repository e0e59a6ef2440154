"""Wrong twins of encodings: each has one fault that a real one could have, and `assert_encoding` must reject it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from sparc.encoding.base import ElementEncoding, Encoding, Parts
from sparc.encoding.grid import Grid
from sparc.encoding.mask import MaskEncoding

Change = Callable[[Parts], Parts]


def encoding_mutants(encoding: Encoding, shape: tuple[int, ...] = (48, 64), *, seed: int = 0) -> dict[str, Encoding]:
    """Wrong twins of an encoding, by what is wrong with them.

    Args:
        encoding: the right one.
        shape: a matrix shape it accepts, on which each twin differs from it.
        seed: of the weight that shows which twins differ.
    """
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    grid = encoding.fit(weight)
    parts = encoding.encode(encoding.round(weight, grid), grid)
    inner = encoding.of if isinstance(encoding, MaskEncoding) else encoding
    changes: dict[str, Change] = {"OffByOneCode": _off_by_one}
    if "scale" in parts:
        changes |= {"DroppedScale": _dropped_scale, "TransposedGroups": _transposed_groups}
    if isinstance(inner, ElementEncoding) and inner.code_bytes(8) < 8:
        changes["SwappedNibbles"] = _swapped_nibbles
    right = encoding.decode(parts, shape, weight.dtype)
    twins = {
        name: _decoding(encoding, name, change)
        for name, change in changes.items()
        if not torch.equal(encoding.decode(change(parts), shape, weight.dtype), right)
    }
    twins["ScaledRound"] = _twin(encoding, "ScaledRound", round=_scaled_round)
    twins["WrongBytes"] = _twin(encoding, "WrongBytes", bytes_on=_wrong_bytes)
    twins["LostDtype"] = _twin(encoding, "LostDtype", decode=_lost_dtype)
    if "scale" in grid.tensors and _loses(encoding, weight, _unit_scaled(grid)):
        twins["UnitScale"] = _twin(encoding, "UnitScale", fit=_unit_scale)
    if isinstance(encoding, MaskEncoding):
        twins["UnmaskedRound"] = _twin(encoding, "UnmaskedRound", round=_unmasked_round)
        if bool(_of_code_zero(encoding, parts, shape, weight.dtype).any()):
            twins["UnmaskedZero"] = _twin(encoding, "UnmaskedZero", decode=_unmasked_zero)
    return twins


def _twin(encoding: Encoding, name: str, **methods: Callable[..., Any]) -> Encoding:
    """An encoding of a class of its own, whose methods are `method(right class, self, ...)`."""
    right = type(encoding)

    def bound(method: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, *args, **options: method(right, self, *args, **options)

    body = {each: bound(method) for each, method in methods.items()}
    wrong: Any = dataclass(frozen=True)(type(f"{right.__name__}{name}", (right,), body))
    twin: Encoding = wrong(**{field.name: getattr(encoding, field.name) for field in fields(encoding)})
    return twin


def _decoding(encoding: Encoding, name: str, change: Change) -> Encoding:
    """A twin that decodes changed parts."""

    def decode(
        right: type[Encoding], self: Encoding, parts: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        return right.decode(self, change(dict(parts)), shape, dtype)

    return _twin(encoding, name, decode=decode)


# changes of parts -----------------------------------------------------------------------------------------------------
def _off_by_one(parts: Parts) -> Parts:
    raw = parts["codes"].view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[parts["codes"].itemsize])
    return {**parts, "codes": (raw ^ 1).view(parts["codes"].dtype)}


def _dropped_scale(parts: Parts) -> Parts:
    return {**parts, "scale": torch.ones_like(parts["scale"])}


def _transposed_groups(parts: Parts) -> Parts:
    scale = parts["scale"]
    return {**parts, "scale": scale.transpose(-1, -2).reshape(scale.shape)}


def _swapped_nibbles(parts: Parts) -> Parts:
    codes = parts["codes"]
    return {**parts, "codes": (codes << 4) | (codes >> 4)}


# wrong methods --------------------------------------------------------------------------------------------------------
def _scaled_round(right: type[Encoding], self: Encoding, weight: Tensor, grid: Grid) -> Tensor:
    return right.round(self, weight * 1.25, grid)


def _wrong_bytes(right: type[Encoding], self: Encoding, grid: Grid, shape: Sequence[Any]) -> Any:
    return right.bytes_on(self, grid, shape) + 1


def _lost_dtype(
    right: type[Encoding], self: Encoding, parts: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return right.decode(self, parts, shape, torch.float32)


def _unit_scale(right: type[Encoding], self: Encoding, weight: Tensor, **options: Any) -> Grid:
    return _unit_scaled(right.fit(self, weight, **options))


def _unit_scaled(grid: Grid) -> Grid:
    return replace(grid, tensors={**grid.tensors, "scale": torch.ones_like(grid.tensors["scale"])})


def _loses(encoding: Encoding, weight: Tensor, grid: Grid) -> bool:
    """Whether rounding loses half of the weight; 8-bit floats keep most of it at many scales, which is no fault."""
    return bool(2 * (encoding.round(weight, grid) - weight).square().sum() > weight.square().sum())


def _unmasked_round(right: type[MaskEncoding], self: MaskEncoding, weight: Tensor, grid: Grid) -> Tensor:
    return self.of.round(weight, self.inner(grid))


def _unmasked_zero(
    right: type[MaskEncoding],
    self: MaskEncoding,
    parts: Mapping[str, Tensor],
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    values = right.decode(self, parts, shape, dtype)
    return torch.where(values == 0, _of_code_zero(self, parts, shape, dtype), values)


def _of_code_zero(
    encoding: MaskEncoding, parts: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """What dropped elements would be if the mask were not applied after the inner values."""
    codes = torch.zeros(tuple(shape), dtype=encoding.of.unpack(parts["codes"], 0).dtype)
    return encoding.of.values(codes, parts, dtype)
