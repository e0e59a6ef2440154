"""Named, invertible ways in which a target stores a program's weight: so that one copy on disk serves both.

A layout is a chain of steps joined by `+`, applied left to right:

- `identity`;
- `transpose`: the last two axes swapped;
- `interleave`: rows of the first half in turns with those of the second;
- `flip_sign`: 8-bit codes with the sign bit inverted (int8 to uint8 offset by 128, and back);
- `pack4`: codes below 16, two to a byte along the last axis, the first one low; an odd end is filled with 0;
- `pad`: the last axis filled up with 0, as the stored shape wants;
- `reshape`: the same bytes in the stored shape. Only as the last step.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

IDENTITY = "identity"
_STEPS = frozenset({IDENTITY, "transpose", "interleave", "flip_sign", "pack4", "pad", "reshape"})


def store(layout: str, tensor: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """The tensor as the target stores it; `shape` is the stored shape where the layout pads or reshapes.

    Raises:
        ValueError: for an unknown step, or a shape that is missing or does not fit.
    """
    for step in _steps(layout):
        if step == "transpose":
            tensor = _transpose(tensor)
        elif step == "interleave":
            tensor = _turns(tensor, (2, -1))
        elif step == "flip_sign":
            tensor = _flip_sign(tensor)
        elif step == "pack4":
            tensor = _pack4(tensor)
        elif step == "pad":
            missing = _row_length(_given(shape), tensor.shape) - tensor.shape[-1]
            tensor = torch.nn.functional.pad(tensor, (0, missing))
        elif step == "reshape":
            tensor = tensor.contiguous().reshape(_given(shape))
    return tensor


def restore(layout: str, stored: Tensor, shape: Sequence[int]) -> Tensor:
    """The program's tensor, of this shape, from what the target stored.

    Raises:
        ValueError: for an unknown step.
    """
    steps = _steps(layout)
    before = [tuple(shape)]
    for step in steps:
        before.append(_shape_after(step, before[-1], stored))
    for step, own in zip(reversed(steps), reversed(before[:-1]), strict=True):
        if step == "transpose":
            stored = _transpose(stored)
        elif step == "interleave":
            stored = _turns(stored, (-1, 2))
        elif step == "flip_sign":
            stored = _flip_sign(stored)
        elif step == "pack4":
            stored = torch.stack([stored & 15, stored >> 4], dim=-1).flatten(-2)[..., : own[-1]].contiguous()
        elif step == "pad":
            stored = stored[..., : own[-1]].contiguous()
        elif step == "reshape":
            stored = stored.reshape(own)
    return stored


def _steps(layout: str) -> list[str]:
    steps = layout.split("+")
    unknown = [step for step in steps if step not in _STEPS]
    if unknown:
        raise ValueError(f"unknown layout step {unknown[0]!r}")
    return steps


def _given(shape: Sequence[int] | None) -> tuple[int, ...]:
    if shape is None:
        raise ValueError("the layout needs the stored shape")
    return tuple(shape)


def _shape_after(step: str, shape: tuple[int, ...], stored: Tensor) -> tuple[int, ...]:
    if step == "transpose":
        return (*shape[:-2], shape[-1], shape[-2])
    if step == "pack4":
        return (*shape[:-1], -(-shape[-1] // 2))
    if step == "pad":
        return (*shape[:-1], _row_length(stored.shape, shape))
    return tuple(stored.shape) if step == "reshape" else shape


def _row_length(stored: Sequence[int], shape: Sequence[int]) -> int:
    return math.prod(stored) // max(math.prod(shape[:-1]), 1)


def _transpose(tensor: Tensor) -> Tensor:
    return tensor.transpose(-1, -2).contiguous()


def _turns(tensor: Tensor, split: tuple[int, int]) -> Tensor:
    """The rows, split in two axes that change places."""
    return tensor.unflatten(-2, split).transpose(-3, -2).flatten(-3, -2).contiguous()


def _flip_sign(tensor: Tensor) -> Tensor:
    other = torch.uint8 if tensor.dtype == torch.int8 else torch.int8
    return (tensor.contiguous().view(torch.uint8) ^ 0x80).view(other)


def _pack4(tensor: Tensor) -> Tensor:
    even = torch.nn.functional.pad(tensor, (0, tensor.shape[-1] % 2)).to(torch.uint8)
    return even[..., ::2] | (even[..., 1::2] << 4)
