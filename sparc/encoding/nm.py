"""N:M sparsity: exactly n of every m consecutive columns are kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor

from sparc import codes as diagnostic_codes
from sparc.diag import PassError
from sparc.encoding.base import ElementEncoding, Parts
from sparc.encoding.bits import pack_bits, unpack_bits
from sparc.encoding.dense import Dense
from sparc.encoding.grid import Grid
from sparc.encoding.mask import MaskEncoding


@dataclass(frozen=True)
class NM(MaskEncoding):
    """Exactly `n` of every `m` consecutive columns of each row.

    Parts: `codes`, the kept codes of each row in column order, packed by `of`; the tensors of `of`'s grid; `positions`,
        for each kept
    element its column within its m, in `ceil(log2 m)` bits, packed row by row as `sparc.encoding.bits` says. At 2:4
    with b-bit codes that is (b + 2) / 2 bits per dense element. The grid's `mask` is bool in the matrix's shape.

    Args:
        n: kept columns, 1 to m - 1.
        m: columns they are chosen from, 2 to 256.
        of: how kept elements are stored; its groups count the columns of the dense matrix.
    """

    shown = ("n", "m")

    n: int = 2
    m: int = 4
    of: ElementEncoding = Dense()

    def __post_init__(self) -> None:
        if type(self.n) is not int or type(self.m) is not int or not 1 <= self.n < self.m <= 256:
            raise PassError(
                diagnostic_codes.BAD_OPTION, f"there is no NM(n={self.n!r}, m={self.m!r})", hint="1 ≤ n < m ≤ 256"
            )
        super().__post_init__()

    @property
    def position_bits(self) -> int:
        """Bits of one stored position."""
        return (self.m - 1).bit_length()

    @property
    def part_names(self) -> tuple[str, ...]:
        """The parts of `of`, then the positions."""
        return (*self.of.part_names, *self.mask_names)

    @property
    def mask_names(self) -> tuple[str, ...]:
        """The positions."""
        return ("positions",)

    def accepts(self, shape: Sequence[int]) -> str | None:
        """Matrices that `of` accepts and whose last size m divides."""
        if len(shape) >= 2 and shape[-1] % self.m:
            return f"{self.m} does not divide its reduced size {shape[-1]}"
        return self.of.accepts(shape)

    # the mask -------------------------------------------------------------------------------------------------------
    def select(self, weight: Tensor, importance: Tensor | None = None) -> Tensor:
        """The mask that keeps the n largest of `|w| * sqrt(importance)` in every m columns; of equals, the first.

        Without importance this is magnitude pruning (as in NVIDIA's ASP); with the mean square of each column's
        activations it is Wanda's score (Sun et al. 2023).
        """
        score = weight.float().abs()
        if importance is not None:
            score = score * importance.float().sqrt()
        score = score.unflatten(-1, (-1, self.m))
        rank = torch.zeros(score.shape, dtype=torch.int16, device=score.device)
        column = torch.arange(self.m, device=score.device)
        for other in range(self.m):
            rival = score[..., other : other + 1]
            rank += (rival > score) | ((rival == score) & (other < column))
        return (rank < self.n).flatten(-2)

    def spread(self, mask: Tensor, shape: Sequence[int]) -> Tensor:
        """The mask itself."""
        return mask

    def fit(self, weight: Tensor, *, importance: Tensor | None = None, search: bool = False) -> Grid:
        """Select the mask, then fit `of` to what it keeps."""
        return self.fit_masked(weight, self.select(weight, importance), importance=importance, search=search)

    # storage --------------------------------------------------------------------------------------------------------
    def encode(self, weight: Tensor, grid: Grid) -> Parts:
        """Kept codes, the inner grid's tensors, positions.

        Raises:
            PassError: SPARC209 when the mask does not keep exactly n of every m columns.
        """
        mask = grid.tensors["mask"]
        counts = mask.unflatten(-1, (-1, self.m)).sum(-1)
        if not bool((counts == self.n).all()):
            raise PassError(
                diagnostic_codes.BAD_OPTION, f"the mask does not keep exactly {self.n} of every {self.m} columns"
            )
        kept = (*weight.shape[:-1], weight.shape[-1] // self.m * self.n)
        position = torch.arange(weight.shape[-1], device=mask.device).remainder_(self.m).to(torch.uint8)
        return {
            "codes": self.keep(self.of.codes(weight, grid.tensors), mask),
            **self.inner(grid).tensors,
            "positions": pack_bits(position.expand(mask.shape)[mask].reshape(kept), self.position_bits),
        }

    def decode(self, parts: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Put the kept codes back in their columns, look up their values, and zero the rest."""
        columns = self._columns(parts, shape)
        chosen = self.of.unpack(parts["codes"], columns.shape[-1])
        dense = chosen.new_zeros(tuple(shape)).scatter_(-1, columns, chosen)
        return self.of.values(dense, parts, dtype).masked_fill_(~self.mask(parts, shape), 0)

    def mask(self, parts: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
        """What the positions say."""
        columns = self._columns(parts, shape)
        if tuple(columns.shape[:-1]) != tuple(shape[:-1]) or not bool((columns < shape[-1]).all()):
            raise ValueError(f"the positions are not those of a matrix {list(shape)}")
        return torch.zeros(tuple(shape), dtype=torch.bool, device=columns.device).scatter_(-1, columns, True)

    def keep(self, codes: Tensor, mask: Tensor) -> Tensor:
        """The kept codes of each row in column order, packed."""
        return self.of.pack(codes[mask].reshape(*codes.shape[:-1], codes.shape[-1] // self.m * self.n))

    def _columns(self, parts: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
        kept = int(shape[-1]) // self.m * self.n
        positions = unpack_bits(parts["positions"], self.position_bits, kept).to(torch.int64)
        return positions + torch.arange(kept, device=positions.device).div(self.n, rounding_mode="floor") * self.m

    def bytes(self, shape: Sequence[int | sympy.Expr]) -> sympy.Expr:
        """Kept codes, the inner grid of the dense matrix, positions."""
        kept = sympy.sympify(shape[-1]) * self.n / self.m
        row = self.of.code_bytes(kept) + sympy.ceiling(kept * self.position_bits / 8)
        return sympy.prod(shape[:-1]) * row + self.of.grid_bytes(shape)
