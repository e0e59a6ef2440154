"""Named, invertible ways in which a target stores a program's weight: so that one copy on disk serves both.

A layout is a chain of steps joined by `+`, applied left to right: `identity`; `transpose` (last two axes swapped);
`reshape` (the same bytes in another shape); `flip_sign` (8-bit codes with the sign bit inverted: int8 to uint8 offset
by 128, and back).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

IDENTITY = "identity"


def _transpose(tensor: Tensor) -> Tensor:
    return tensor.transpose(-1, -2).contiguous()


def _flip_sign(tensor: Tensor) -> Tensor:
    other = torch.uint8 if tensor.dtype == torch.int8 else torch.int8
    return (tensor.view(torch.uint8) ^ 0x80).view(other)


def store(layout: str, tensor: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """The tensor as the target stores it; `shape` is the stored shape where the layout reshapes."""
    for step in layout.split("+"):
        if step == "transpose":
            tensor = _transpose(tensor)
        elif step == "flip_sign":
            tensor = _flip_sign(tensor)
        elif step == "reshape":
            assert shape is not None
            tensor = tensor.contiguous().reshape(tuple(shape))
    return tensor


def restore(layout: str, stored: Tensor, shape: Sequence[int]) -> Tensor:
    """The program's tensor, of this shape, from what the target stored."""
    for step in reversed(layout.split("+")):
        if step == "transpose":
            stored = _transpose(stored)
        elif step == "flip_sign":
            stored = _flip_sign(stored)
        elif step == "reshape":
            swapped = (*shape[:-2], shape[-1], shape[-2]) if layout.startswith("transpose") else tuple(shape)
            stored = stored.reshape(swapped)
    return stored
