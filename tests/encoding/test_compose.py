import pytest
import torch

from sparc.diag import PassError
from sparc.encoding.base import Encoding
from sparc.encoding.blocks import Blocks
from sparc.encoding.compose import compose, refit
from sparc.encoding.dense import Dense
from sparc.encoding.grid import Grid
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.nm import NM

INT4 = IntGrid(4, 128)


def weights(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("existing", "new", "composed"),
    [
        (None, INT4, INT4),
        (Dense(), INT4, INT4),
        (IntGrid(8), INT4, INT4),
        (NM(2, 4), INT4, NM(2, 4, of=INT4)),
        (NM(2, 4, of=IntGrid(8)), INT4, NM(2, 4, of=INT4)),
        (Blocks((8, 8)), INT4, Blocks((8, 8), of=INT4)),
        (NM(2, 4), NM(2, 4, of=INT4), NM(2, 4, of=INT4)),
        (NM(2, 4), NM(1, 4), NM(1, 4)),
        (Blocks((8, 8), of=INT4), NM(2, 4), NM(2, 4)),
        (NM(2, 4, of=INT4), Dense("float16"), NM(2, 4, of=Dense("float16"))),
    ],
)
def test_a_mask_stays_and_all_else_is_replaced(existing, new, composed):
    assert compose(existing, new) == composed


def test_rounding_keeps_the_mask():
    weight = weights(8, 64)
    pruned = NM(2, 4).fit(weight)
    zeroed = NM(2, 4).round(weight, pruned)
    grid = refit(Grid(pruned.spec, pruned.tensors, "conv"), zeroed, IntGrid(4, 32, symmetric=False, zero="minimum"))
    assert str(grid.spec) == "NM(n=2, m=4, of=IntGrid(bits=4, group=32, symmetric=False, zero='minimum'))"
    assert grid.view == "conv"
    assert torch.equal(grid.tensors["mask"], pruned.tensors["mask"])
    rounded = grid.spec.round(zeroed, grid)
    assert not bool(rounded[~pruned.tensors["mask"]].any())
    assert torch.equal(grid.spec.decode(grid.spec.encode(rounded, grid), (8, 64), torch.float32), rounded)


def test_a_mask_that_is_no_longer_the_largest_is_still_kept():
    mask = torch.tensor([[True, False, False, True]])
    grid = refit(Grid(NM(2, 4), {"mask": mask}), torch.tensor([[0.1, 0, 0, 0.0]]), NM(2, 4, of=IntGrid(8)))
    assert torch.equal(grid.tensors["mask"], mask)


def test_another_pattern_selects_a_mask_of_its_own():
    weight = weights(8, 64)
    grid = refit(NM(2, 4).fit(weight), weight, NM(1, 4))
    assert torch.equal(grid.tensors["mask"], NM(1, 4).select(weight))


def test_blocks_keep_their_mask():
    weight, encoding = weights(16, 16), Blocks((4, 4))
    existing = encoding.fit_masked(weight, encoding.select(weight, 0.25))
    grid = refit(existing, encoding.round(weight, existing), IntGrid(8))
    assert grid.spec == Blocks((4, 4), of=IntGrid(8))
    assert int(grid.tensors["mask"].sum()) == 4


def test_without_a_grid_it_is_a_plain_fit():
    weight = weights(8, 64)
    assert torch.equal(refit(None, weight, INT4).tensors["scale"], INT4.fit(weight).tensors["scale"])


def test_search_and_importance_are_passed_on():
    weight, importance = weights(8, 64) ** 3, torch.linspace(0.1, 3, 64)
    spec = IntGrid(4, "channel")
    existing = NM(2, 4).fit(weight)
    found = refit(existing, weight, spec, importance=importance, search=True)
    direct = NM(2, 4, of=spec).fit_masked(weight, existing.tensors["mask"], importance=importance, search=True)
    plain = refit(existing, weight, spec)
    assert torch.equal(found.tensors["scale"], direct.tensors["scale"])
    assert not torch.equal(found.tensors["scale"], plain.tensors["scale"])


class Opaque(Encoding):  # an encoding without codes for single elements
    part_names = ("all",)

    def accepts(self, shape):
        return None

    def fit(self, weight, *, importance=None, search=False):
        return Grid(self)

    def round(self, weight, grid):
        return weight

    def encode(self, weight, grid):
        return {"all": weight}

    def decode(self, parts, shape, dtype):
        return parts["all"].to(dtype)

    def bytes(self, shape):
        return 0


def test_an_encoding_that_would_lose_the_mask_is_refused():
    with pytest.raises(PassError, match=r"NM cannot hold Opaque\(\)") as caught:
        refit(NM(2, 4).fit(weights(4, 8)), weights(4, 8), Opaque())
    assert caught.value.code == "SPARC209"
