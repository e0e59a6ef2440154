"""Codebooks: a few numbers, as uneven as the weights, and the index of one for each element."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import sympy
import torch
from torch import Tensor

from sparc.encoding.bits import pack_bits, unpack_bits
from sparc.encoding.grid import Grid
from sparc.encoding.groups import (
    Group,
    ScaleDtype,
    alone,
    bad_option,
    check_group,
    check_scale_dtype,
    column,
    group_count,
    grouped,
    magnitudes,
    stored_scale,
    ungrouped,
)
from sparc.encoding.kmeans import kmeans
from sparc.encoding.scaled import ScaledEncoding

# Dettmers et al. 2023, "QLoRA", appendix E
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class Codebook(ScaledEncoding):
    """Entries of a table, times a scale per group: `table[code] * max |w|`.

    Args:
        kind: `"nf4"`, the 16 quantiles of a normal distribution of QLoRA, or `"kmeans"`, a table for each matrix of a
            batch by weighted k-means (SqueezeLLM, Kim et al. 2023, makes one for each row), stored as `table`,
            `[..., 2**bits]` float32, ascending.
        bits: 2, 3 or 4; 4 for nf4.
        group: how many consecutive columns share a scale; `"channel"` for a whole row, `"tensor"` for everything;
            `"none"`, for k-means, for no scales. The last group of a row may be shorter.
        scale_dtype: the dtype of scales. Values are always computed in float32.
    """

    shown = ("kind", "bits")

    kind: Literal["nf4", "kmeans"] = "nf4"
    bits: int = 4
    group: int | Literal["channel", "tensor", "none"] = 64
    scale_dtype: ScaleDtype = "float32"

    def __post_init__(self) -> None:
        if self.kind not in ("nf4", "kmeans"):
            raise bad_option(f"Codebook has no kind={self.kind!r}", '"nf4" or "kmeans"')
        if type(self.bits) is not int or self.bits not in ((4,) if self.kind == "nf4" else (2, 3, 4)):
            raise bad_option(
                f"Codebook has no {self.bits!r}-bit codes for {self.kind}", "2, 3 or 4 for kmeans, 4 for nf4"
            )
        if self.group != "none":
            check_group(self, self.group)
        elif self.kind == "nf4":
            raise bad_option("nf4 has no values without a scale", 'group=64, "channel" or "tensor"')
        check_scale_dtype(self, self.scale_dtype)

    @property
    def columns(self) -> Group:
        """`group`; one for everything where there are no scales."""
        return "tensor" if self.group == "none" else self.group

    @property
    def grid_names(self) -> tuple[str, ...]:
        """Table, if it was made for the matrix, and scale, if there is one."""
        return ("table",) * (self.kind == "kmeans") + ("scale",) * (self.group != "none")

    def ungrouped(self) -> Self:
        """One scale a row, if there are any."""
        return self if self.group == "none" else replace(self, group=alone(self.group))

    # fitting --------------------------------------------------------------------------------------------------------
    def fit(self, weight: Tensor, *, importance: Tensor | None = None, search: bool = False) -> Grid:
        """For nf4, cover each group or search for its scale; for k-means, the table of the weights so scaled.

        A table is the outcome of a search already, so `search` changes nothing for k-means.
        """
        if self.kind == "nf4":
            return super().fit(weight, importance=importance, search=search)
        scale = {} if self.group == "none" else self.covering(magnitudes(weight, self.columns, importance))
        spread = column(scale.get("scale", weight.new_ones(1)))
        numbers = ungrouped(grouped(weight.float(), self.columns) / spread, weight.shape, self.columns)
        h = torch.ones(()) if importance is None else importance.float()
        h = grouped(h.expand(weight.shape), self.columns) * (spread / spread.amax()).square()
        table = kmeans(
            numbers.nan_to_num().flatten(-2), ungrouped(h, weight.shape, self.columns).flatten(-2), 2**self.bits
        )
        return Grid(self, {"table": table, **scale})

    def covering(self, magnitude: Tensor) -> dict[str, Tensor]:
        """The greatest magnitude becomes 1.

        Scales of empty ranges are 1, or where the table may have no 0, so small that all values are almost 0.
        """
        scale = stored_scale(magnitude, self.scale_dtype, 1)
        if self.kind == "kmeans":
            scale = scale.masked_fill(magnitude == 0, torch.finfo(scale.dtype).tiny)
        return {"scale": scale}

    # codes ----------------------------------------------------------------------------------------------------------
    def table(self, tensors: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """The entries, ascending: `[..., 2**bits]`, float32."""
        return tensors["table"] if self.kind == "kmeans" else torch.tensor(NF4, device=like.device)

    def scales(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The scales, widened; 1 where there are none."""
        return tensors["scale"].float() if "scale" in tensors else tensors["table"].new_ones(1)

    def nearest(self, numbers: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The index of the nearest entry; of two equally near ones, the lesser."""
        table = self.table(tensors, numbers).double()
        middle = ((table[..., 1:] + table[..., :-1]) / 2).float()
        codes = torch.searchsorted(middle, numbers.flatten(-2).contiguous(), out_int32=True)
        return codes.to(torch.uint8).reshape(numbers.shape)

    def numbers(self, codes: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The entries."""
        table, flat = self.table(tensors, codes), codes.flatten(-2)
        return table.expand(*flat.shape[:-1], -1).gather(-1, flat.to(torch.int64)).reshape(codes.shape)

    # storage --------------------------------------------------------------------------------------------------------
    def pack(self, codes: Tensor) -> Tensor:
        """As `pack_bits` says."""
        return pack_bits(codes, self.bits)

    def unpack(self, packed: Tensor, length: int) -> Tensor:
        """The inverse of `pack`."""
        return unpack_bits(packed, self.bits, length)

    def code_bytes(self, length: int | sympy.Expr) -> sympy.Expr:
        """`ceil(length * bits / 8)`."""
        return sympy.ceiling(sympy.sympify(length) * self.bits / 8)

    def grid_bytes(self, shape: Sequence[int | sympy.Expr]) -> sympy.Expr:
        """A table per matrix, and the scale of every group."""
        table = sympy.prod(shape[:-2]) * 2**self.bits * 4 if self.kind == "kmeans" else sympy.Integer(0)
        if self.group == "none":
            return table
        return table + group_count(shape, self.group) * getattr(torch, self.scale_dtype).itemsize
