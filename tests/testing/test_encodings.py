from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import sympy
import torch

from sparc.encoding.base import ElementEncoding, Encoding
from sparc.encoding.binary_code import BinaryCode
from sparc.encoding.blocks import Blocks
from sparc.encoding.codebook import Codebook
from sparc.encoding.dense import Dense
from sparc.encoding.float8 import Float8
from sparc.encoding.grid import Grid
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.microscaling import MXFP4, NVFP4
from sparc.encoding.nm import NM
from sparc.encoding.unstructured import Unstructured
from sparc.testing import assert_encoding, encoding_mutants

SHAPE = (48, 64)
RIGHT = {
    "Dense": Dense(),
    "channel": IntGrid(8),
    "groups": IntGrid(4, 32),
    "minimum": IntGrid(4, 16, symmetric=False, zero="minimum", scale_dtype="float16"),
    "three bits": IntGrid(3, 32),
    "Float8": Float8(),
    "MXFP4": MXFP4(),
    "NVFP4": NVFP4(),
    "nf4": Codebook("nf4", 4, 32),
    "kmeans": Codebook("kmeans", 3, 32),
    "BinaryCode": BinaryCode(2, 32),
    "NM": NM(2, 4),
    "NM of minimum": NM(2, 4, of=IntGrid(4, 32, symmetric=False, zero="minimum")),
    "Blocks": Blocks((8, 16), of=IntGrid(2, 8, symmetric=False)),
    "Unstructured": Unstructured(of=IntGrid(4, 8, symmetric=False)),
}
EXPECTED = {
    "Dense": {"OffByOneCode"},
    "channel": {"OffByOneCode", "DroppedScale"},
    "groups": {"OffByOneCode", "DroppedScale", "TransposedGroups", "SwappedNibbles"},
    "minimum": {"OffByOneCode", "DroppedScale", "TransposedGroups", "SwappedNibbles"},
    "three bits": {"OffByOneCode", "DroppedScale", "TransposedGroups", "SwappedNibbles"},
    "Float8": {"OffByOneCode", "DroppedScale"},
    "MXFP4": {"OffByOneCode", "DroppedScale", "TransposedGroups", "SwappedNibbles"},
    "NVFP4": {"OffByOneCode", "DroppedScale", "TransposedGroups", "SwappedNibbles"},
    "nf4": {"OffByOneCode", "DroppedScale", "TransposedGroups", "SwappedNibbles"},
    "kmeans": {"OffByOneCode", "DroppedScale", "TransposedGroups", "SwappedNibbles"},
    "BinaryCode": {"OffByOneCode", "SwappedNibbles"},
    "NM": {"OffByOneCode", "UnmaskedRound"},
    "NM of minimum": {
        "OffByOneCode",
        "DroppedScale",
        "TransposedGroups",
        "SwappedNibbles",
        "UnmaskedRound",
        "UnmaskedZero",
    },
    "Blocks": {"OffByOneCode", "DroppedScale", "TransposedGroups", "SwappedNibbles", "UnmaskedRound", "UnmaskedZero"},
    "Unstructured": {
        "OffByOneCode",
        "DroppedScale",
        "TransposedGroups",
        "SwappedNibbles",
        "UnmaskedRound",
        "UnmaskedZero",
    },
}
ALWAYS = {"ScaledRound", "WrongBytes", "LostDtype"}
MUTANTS = {
    f"{kind}: {name}": mutant
    for kind, encoding in RIGHT.items()
    for name, mutant in encoding_mutants(encoding, SHAPE).items()
}


@pytest.mark.parametrize("kind", RIGHT)
def test_every_fault_that_makes_a_difference_has_a_mutant(kind):
    names = set(encoding_mutants(RIGHT[kind], SHAPE))
    assert names - {"UnitScale"} == EXPECTED[kind] | ALWAYS
    assert ("UnitScale" in names) == ("DroppedScale" in names and kind != "Float8")


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_rejected(name):
    with pytest.raises(AssertionError) as caught:
        assert_encoding(MUTANTS[name])
    assert type(MUTANTS[name]).__name__ in str(caught.value)


# a third party's encodings ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PowersOfTwo(ElementEncoding):
    """Sign and exponent: `±2^(e - bias)`, one scale-free byte each; 0 is the least exponent."""

    bias: int = 120

    grid_names = ()

    def accepts(self, shape):
        return None if len(shape) >= 2 else "it is no matrix"

    def fit(self, weight, *, importance=None, search=False):
        return Grid(self)

    def codes(self, weight, tensors):
        size = weight.double().abs()
        exponent = (size / 1.5).log2().ceil().clamp(1 - self.bias, 126 - self.bias) + self.bias
        exponent = torch.where(size < 2.0**-self.bias, 0.0, exponent)
        return torch.where((weight < 0) & (exponent > 0), exponent + 128, exponent).to(torch.uint8)

    def values(self, codes, tensors, dtype):
        size = torch.where(codes % 128 > 0, 2.0 ** ((codes % 128).double() - self.bias), 0.0)
        return torch.where(codes >= 128, -size, size).to(dtype)

    def pack(self, codes):
        return codes

    def unpack(self, packed, length):
        return packed

    def code_bytes(self, length):
        return sympy.sympify(length)

    def grid_bytes(self, shape):
        return sympy.Integer(0)


@dataclass(frozen=True)
class RankOne(Encoding):
    """`column * row`, an encoding without codes for single elements."""

    part_names = ("column", "row")

    def accepts(self, shape):
        return None if len(shape) == 2 else "it is not one matrix"

    def fit(self, weight, *, importance=None, search=False):
        left, sizes, right = torch.linalg.svd(weight.double(), full_matrices=False)
        return Grid(self, {"column": (left[:, :1] * sizes[0]).float(), "row": right[:1].float()})

    def round(self, weight, grid):
        return self.decode(grid.tensors, weight.shape, weight.dtype)

    def encode(self, weight, grid):
        return {name: grid.tensors[name].contiguous() for name in self.part_names}

    def decode(self, parts: Mapping[str, torch.Tensor], shape, dtype):
        greatest = torch.finfo(dtype).max
        return (parts["column"].double() * parts["row"].double()).clamp(-greatest, greatest).to(dtype)

    def bytes(self, shape):
        return 4 * (sympy.sympify(shape[0]) + shape[1])


def test_an_encoding_of_ones_own_passes():
    assert_encoding(RankOne(), dtypes=(torch.float32,))


def test_an_element_encoding_of_ones_own_passes_and_goes_into_masks():
    assert_encoding(PowersOfTwo())
    assert_encoding(NM(2, 4, of=PowersOfTwo()))
    assert_encoding(Blocks((8, 8), of=PowersOfTwo()))
    for mutant in encoding_mutants(PowersOfTwo(), SHAPE).values():
        with pytest.raises(AssertionError):
            assert_encoding(mutant)


class Vectors(IntGrid):
    def accepts(self, shape):
        return None


class Silent(IntGrid):
    def accepts(self, shape):
        return "" if len(shape) == 3 else super().accepts(shape)


class Random(IntGrid):
    def fit(self, weight, **options):
        grid = super().fit(weight, **options)
        return Grid(self, {"scale": grid.tensors["scale"] * (1 + torch.rand(()))})


class InPlace(IntGrid):
    def round(self, weight, grid):
        return weight.copy_(super().round(weight, grid))


class Strided(IntGrid):
    def encode(self, weight, grid):
        parts = super().encode(weight, grid)
        return {**parts, "codes": parts["codes"].mT.contiguous().mT}


class Reordered(IntGrid):
    def encode(self, weight, grid):
        return dict(reversed(super().encode(weight, grid).items()))


class Numeric(IntGrid):
    def bytes(self, shape):
        return sympy.Integer(sum(part.nbytes for part in self._parts(shape)) if all(map(int_like, shape)) else 1)

    def _parts(self, shape):
        weight = torch.zeros([int(size) for size in shape])
        return self.encode(weight, self.fit(weight)).values()


def int_like(size):
    return isinstance(size, int)


class Unreadable(IntGrid):
    def __str__(self):
        return "IntGrid(bits=2)"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (Vectors(), "accepts a vector"),
        (Silent(), "without a reason"),
        (Random(), "fitting twice"),
        (InPlace(), "written to"),
        (Strided(), "no plain contiguous tensor"),
        (Reordered(), "part_names says"),
        (Numeric(), "in symbols"),
        (Unreadable(), "reads as"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, IntGrid) else "",
)
def test_other_faults_are_named(wrong, says):
    with pytest.raises(AssertionError, match=says):
        assert_encoding(wrong)


def test_shapes_that_none_fit_are_an_error():
    with pytest.raises(AssertionError, match="accepts none"):
        assert_encoding(NM(2, 4), [(4, 3), (2, 6)])
