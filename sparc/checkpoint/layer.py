"""A layer of a compressed checkpoint as the tensors under its name, and codes packed in words of 32 bits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparc.checkpoint.base import StoredWeight, decoded, malformed, unknown
from sparc.encoding.bits import packed_length, unpack_bits
from sparc.encoding.int_grid import IntGrid

ScaleName = Literal["float16", "bfloat16", "float32"]
SCALE_NAMES: Mapping[torch.dtype, ScaleName] = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
}


@dataclass(frozen=True, eq=False)
class Layer:
    """The tensors of one layer.

    Args:
        name: its path in the model.
        tensors: by the last part of their names.
    """

    name: str
    tensors: Mapping[str, Tensor]

    def tensor(self, part: str, dtype: torch.dtype | Sequence[torch.dtype], rank: int | None = 2) -> Tensor:
        """A tensor of a dtype and a rank.

        Raises:
            CaptureError: SPARC117 when it is missing, empty or of another kind.
        """
        found = self.tensors.get(part)
        if found is None:
            raise malformed(f"layer {self.name!r} has no {part}")
        wanted = (dtype,) if isinstance(dtype, torch.dtype) else tuple(dtype)
        if found.dtype not in wanted or (rank is not None and found.ndim != rank) or not found.numel():
            kind = f"{str(found.dtype).removeprefix('torch.')} {list(found.shape)}"
            raise malformed(f"{part} of layer {self.name!r} is {kind}")
        return found

    def scales(self, part: str, rank: int | None = 2) -> Tensor:
        """Scales, in the dtype in which they are stored."""
        return self.tensor(part, tuple(SCALE_NAMES), rank)

    def check(self, good: bool, why: str) -> None:
        """Raises CaptureError SPARC117 when the tensors do not fit each other."""
        if not good:
            shapes = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in self.tensors.items())
            raise malformed(f"the tensors of layer {self.name!r} do not fit each other", f"{why}: {shapes}")


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """Rows of codes from little-endian words of 32 bits.

    Args:
        words: int32 `[rows, words]`.
        bits: of a code.
        count: of the codes of a row.

    Returns:
        uint8 `[rows, count]`.
    """
    stream = words.contiguous().view(torch.uint8)
    return unpack_bits(stream[:, : packed_length(count, bits)], bits, count)


def word_count(bits: int, count: int) -> int:
    """How many words hold a row of codes."""
    return -(-count * bits // 32)


def integer_weight(
    layer: Layer, bits: int, codes: Tensor, scale: Tensor, zero: Tensor | None, order: Tensor | None = None
) -> StoredWeight:
    """`(code - zero) * scale`, computed in float32.

    Where every zero point is the middle code, the grid is symmetric and needs none.

    Args:
        layer: for messages.
        bits: 2, 3, 4 or 8.
        codes: uint8 `[out, in]`.
        scale: `[out, groups]`, `[1, 1]` for one of everything.
        zero: uint8 in the shape of the scales; None for the middle code.
        order: as in `StoredWeight`.

    Raises:
        CaptureError: SPARC117 when the shapes do not fit, SPARC118 for another number of bits.
    """
    if bits not in (2, 3, 4, 8):
        raise unknown(f"layer {layer.name!r} has codes of {bits} bits", "codes of 2, 3, 4 and 8 bits are read")
    group = group_of(layer, codes, scale)
    layer.check(zero is None or zero.shape == scale.shape, "a zero point per scale")
    middle = 1 << (bits - 1)
    dtype = SCALE_NAMES[scale.dtype]
    name = f"{layer.name}.weight"
    if zero is None or bool((zero == middle).all()):
        signed = (codes.to(torch.int16) - middle).to(torch.int8)
        weight = decoded(IntGrid(bits, group, scale_dtype=dtype), signed, {"scale": scale}, name)
    else:
        spec = IntGrid(bits, group, symmetric=False, scale_dtype=dtype)
        weight = decoded(spec, codes, {"scale": scale, "zero": zero}, name)
    return StoredWeight(weight.dense, weight.grid, order)


def group_of(layer: Layer, codes: Tensor, scale: Tensor) -> "int | Literal['channel', 'tensor']":
    """What shares a scale, by the shape of the scales `[out, groups]`."""
    rows, columns = codes.shape
    if scale.shape == (1, 1) and rows > 1:
        return "tensor"
    groups = int(scale.shape[-1])
    layer.check(scale.ndim == 2 and scale.shape[0] == rows and 0 < groups <= columns, "a scale per row and group")
    if groups == 1:
        return "channel"
    layer.check(columns % groups == 0, "groups of equal size")
    group = columns // groups
    layer.check(group > 1, "more than one column per scale")
    return group


def sorted_columns(layer: Layer, part: str, columns: int, groups: int) -> Tensor | None:
    """The inputs sorted by the group that `part`, `[in]`, says they belong to: int64 `[in]`; None when they are.

    Raises:
        CaptureError: SPARC117 when groups are not of equal size.
    """
    if part not in layer.tensors:
        return None
    index = layer.tensor(part, (torch.int32, torch.int64), 1).to(torch.int64)
    if bool((index == -1).all()):  # how compressed-tensors says that there are none
        return None
    layer.check(len(index) == columns and columns % groups == 0, "groups of equal size")
    expected = torch.arange(columns) // (columns // groups)
    if torch.equal(index, expected):
        return None
    order = torch.argsort(index, stable=True)
    layer.check(torch.equal(index[order], expected), "as many inputs in every group")
    return order
