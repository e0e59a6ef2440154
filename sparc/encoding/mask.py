"""What all masks share: a mask says which elements are kept, another encoding how they are stored."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor

from sparc import codes
from sparc.diag import PassError
from sparc.encoding.base import ElementEncoding, Encoding
from sparc.encoding.grid import Grid


class MaskEncoding(Encoding):
    """A mask around an element encoding.

    The grid's tensors are `mask` (bool, True where kept) and those of `of`, whose groups count the columns of the dense
    matrix. The mask applies after the inner values: a dropped element is exactly 0, even where the inner grid has no 0.
    """

    of: ElementEncoding  # declared as a field by each subclass, in its own order

    def __post_init__(self) -> None:
        if not isinstance(self.of, ElementEncoding):
            raise PassError(
                codes.BAD_OPTION,
                f"{type(self).__name__} cannot hold {self.of}",
                why="a mask chooses among codes of single elements",
                hint="use an encoding such as Dense() or IntGrid(...)",
            )

    @abstractmethod
    def spread(self, mask: Tensor, shape: Sequence[int]) -> Tensor:
        """The grid's mask as a bool tensor of the matrix's shape."""

    @abstractmethod
    def mask(self, parts: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
        """The grid's mask of an encoded matrix of this shape; reads only the parts in `mask_names`.

        Raises:
            ValueError: for parts that fit no matrix of this shape.
        """

    @property
    @abstractmethod
    def mask_names(self) -> tuple[str, ...]:
        """The names of the parts that say what is kept."""

    @abstractmethod
    def keep(self, codes: Tensor, mask: Tensor) -> Tensor:
        """The part `codes`, from the codes of every element `[batch..., out, reduce]`."""

    def fit_masked(
        self, weight: Tensor, mask: Tensor, *, importance: Tensor | None = None, search: bool = False
    ) -> Grid:
        """The grid for a matrix whose mask is decided.

        Dropped elements get importance 0, so that they influence neither the inner range nor the inner search.

        Args:
            weight: `[batch..., out, reduce]`, floating; dropped elements may have any value.
            mask: bool, as `spread` takes it.
            importance: as for `fit`.
            search: as for `fit`.
        """
        kept = self.spread(mask, weight.shape)
        inner = self.of.fit(
            weight.masked_fill(~kept, 0),
            importance=kept.float() if importance is None else kept * importance.float(),
            search=search,
        )
        return Grid(self, {"mask": mask, **inner.tensors})

    def inner(self, grid: Grid) -> Grid:
        """The grid of `of` alone."""
        return Grid(self.of, {name: grid.tensors[name] for name in self.of.grid_names}, grid.view)

    def round(self, weight: Tensor, grid: Grid) -> Tensor:
        """The inner nearest values where the mask keeps, 0 elsewhere."""
        kept = self.spread(grid.tensors["mask"], weight.shape)
        return self.of.round(weight, self.inner(grid)).masked_fill(~kept, 0)

    def compose(self, inner: Encoding) -> Encoding:
        """The same mask around the new inner encoding; another mask replaces this one.

        Raises:
            PassError: SPARC209 when `inner` is neither a mask nor an element encoding: rounding to it would lose the
                mask.
        """
        return inner if isinstance(inner, MaskEncoding) else self.around(inner)

    def around(self, inner: Encoding) -> Self:
        """The same mask with another inner encoding."""
        return replace(self, of=inner)  # type: ignore[call-arg]  # every subclass has the field

    def same_pattern(self, other: Encoding) -> bool:
        """Whether the masks of this encoding's grids fit the other's."""
        return isinstance(other, MaskEncoding) and self.around(other.of) == other


# choosing what is kept ------------------------------------------------------------------------------------------------
def kept_count(density: float, total: int) -> int:
    """How many of `total` a density keeps: to the nearest, halves up."""
    return int(density * total + 0.5)


def check_density(density: float) -> None:
    """Refuse what is no part of a whole.

    Raises:
        PassError: SPARC209 when density is not between 0 and 1.
    """
    if not 0 <= density <= 1:
        raise PassError(codes.BAD_OPTION, f"a mask cannot be selected with density={density!r}", hint="from 0 to 1")


def keep_greatest(score: Tensor, count: int) -> Tensor:
    """Bool, True at exactly `count` greatest entries along the last axis; of equals, the first. NaN counts as 0."""
    total = score.shape[-1]
    if count <= 0 or count >= total:
        return torch.full(score.shape, count > 0, dtype=torch.bool)
    score = score.nan_to_num()
    least = score.kthvalue(total - count + 1, dim=-1, keepdim=True).values
    above, equal = score > least, score == least
    free = count - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= free))
