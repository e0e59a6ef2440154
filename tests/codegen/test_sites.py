"""Encoded weights and quantized activations: every flavour computes what the program computes."""

import itertools
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from sparc.capture import capture
from sparc.codegen.onnx.check import check_model
from sparc.encoding.int_grid import IntGrid
from sparc.program import Program
from tests.codegen.emitting import FLAVOURS, assert_agrees, emit, operators, optimized
from tests.codegen.encoding import encode_weights, quantize_input, quantized

EXACT = 1e-5


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same numbers in whatever order tests run: elsewhere a last bit may flip a rounding, which is no error."""
    torch.manual_seed(1)


class Linear(nn.Module):
    def __init__(self, reduce: int = 64, out: int = 24, bias: bool = True) -> None:
        super().__init__()
        self.fc = nn.Linear(reduce, out, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def linear(reduce: int = 64, bias: bool = True, rank: int = 3) -> tuple[Program, Tensor]:
    x = torch.randn(*(2, 5, reduce)[-rank:])
    return capture(Linear(reduce, bias=bias), (x,)), x


def check(program: Program, x: Tensor, flavour: str, tolerance: float = EXACT, **options: int) -> list[str]:
    emission = emit(program, flavour, **options)
    check_model(emission.models["forward"])
    assert_agrees(program, emission, [x], tolerance)
    return operators(emission)


GRIDS = [
    IntGrid(8),
    IntGrid(8, "tensor"),
    IntGrid(8, symmetric=False),
    IntGrid(8, symmetric=False, zero="minimum"),
    IntGrid(8, 32),
    IntGrid(8, 32, symmetric=False),
    IntGrid(4, 32),
    IntGrid(4, 16, symmetric=False),
    IntGrid(4, 32, symmetric=False, zero="minimum"),
    IntGrid(4),
    IntGrid(4, "tensor"),
    IntGrid(4, symmetric=False),
    IntGrid(4, 48),
    IntGrid(4, 48, symmetric=False),
    IntGrid(4, 10),
    IntGrid(4, 32, scale_dtype="float16"),
    IntGrid(2, 16),
    IntGrid(3, 16),
    IntGrid(3, 20, symmetric=False),
    IntGrid(4, symmetric=False, zero="minimum"),
    IntGrid(4, 96, symmetric=False, zero="minimum"),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("reduce", [64, 51, pytest.param(80, marks=pytest.mark.slow)])
def test_weight_only(grid: IntGrid, flavour: str, reduce: int) -> None:
    program, x = linear(reduce)
    check(encode_weights(program, grid), x, flavour)


@pytest.mark.parametrize(("rank", "bias"), list(itertools.product((1, 2), (True, False))))
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_ranks(rank: int, bias: bool, flavour: str) -> None:
    program, x = linear(64, bias, rank)
    check(encode_weights(program, IntGrid(4, 32)), x, flavour)
    check(encode_weights(program, IntGrid(8)), x, flavour)


@pytest.mark.parametrize(
    "kind", ["tensor", "tensor symmetric", "token", "split", "stack", "split block", "static", "minimum", "block"]
)
@pytest.mark.parametrize(
    "grid", [IntGrid(8), IntGrid(8, "tensor"), IntGrid(8, symmetric=False), IntGrid(4, 32)], ids=str
)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_activations(kind: str, grid: IntGrid, flavour: str) -> None:
    program, x = linear()
    check(quantize_input(encode_weights(program, grid), kind), x, flavour)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "grid",
    [
        IntGrid(8, 32),
        IntGrid(8, 16, scale_dtype="float16"),
        IntGrid(8, 32, symmetric=False),
        IntGrid(8, 32, symmetric=False, zero="minimum"),
        IntGrid(8, 64),
        IntGrid(8, 48),
    ],
    ids=str,
)
@pytest.mark.parametrize("reduce", [64, 80])
def test_both_halves_of_an_input_in_blocks_are_rows_of_one_product(
    grid: IntGrid, rank: int, bias: bool, reduce: int
) -> None:
    """Each half is rounded to the codes that the program gives it, so that 16 bits are left of x."""
    program, x = linear(reduce, bias, rank)
    found = check(quantize_input(encode_weights(program, grid), "split block", int(grid.group)), x, "cpu", 1e-4)
    assert found.count("MatMulNBits") == (rank > 1 and grid.group != 48)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_static_input_needs_no_decoded_matrix(rank: int) -> None:
    """Spelt as DequantizeLinear, MatMul, Add, ONNX Runtime would decode the matrix in every run."""
    program, x = linear(rank=rank)
    found = check(quantize_input(encode_weights(program, IntGrid(8)), "static"), x, "cpu")
    assert "MatMulIntegerToFloat" in found
    assert "DequantizeLinear" not in found


class Convolution(nn.Module):
    def __init__(self, groups: int = 1, rank: int = 2, activation: bool = False) -> None:
        super().__init__()
        self.conv = (nn.Conv1d, nn.Conv2d)[rank - 1](4, 8, 3, padding=1, stride=2, groups=groups)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return nn.functional.relu6(y) if self.activation else y


@pytest.mark.parametrize(
    "grid", [IntGrid(8), IntGrid(8, "tensor"), IntGrid(8, symmetric=False), IntGrid(4, 12), IntGrid(8, 7)], ids=str
)
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("kind", ["", "static"])
def test_convolution(grid: IntGrid, flavour: str, groups: int, kind: str) -> None:
    x = torch.randn(2, 4, 9, 9)
    program = encode_weights(capture(Convolution(groups), (x,)), grid)
    check(quantize_input(program, kind) if kind else program, x, flavour)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_convolutions_of_other_kinds(flavour: str) -> None:
    x = torch.randn(2, 4, 9)
    check(encode_weights(capture(Convolution(rank=1), (x,)), IntGrid(8)), x, flavour)
    x = torch.randn(2, 4, 5, 5)
    for groups in (1, 2):
        transposed = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=groups, output_padding=1))
        check(encode_weights(capture(transposed, (x,)), IntGrid(8, 5)), x, flavour)


class Tied(nn.Module):
    """A table read as rows and as a product."""

    def __init__(self, features: int = 64) -> None:
        super().__init__()
        self.table = nn.Embedding(40, features)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids).tanh() @ self.table.weight.t()


class TiedHead(Tied):
    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.linear(self.table(ids).tanh(), self.table.weight)


class Table(Tied):
    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_embedding(grid: IntGrid, flavour: str) -> None:
    ids = torch.randint(0, 40, (3, 7))
    for features in (64, 51):
        check(encode_weights(capture(Table(features), (ids,)), grid), ids, flavour, 1e-6)


@pytest.mark.parametrize(
    "grid",
    [IntGrid(8), IntGrid(8, symmetric=False), IntGrid(8, 32), IntGrid(4, 32), IntGrid(4, 32, symmetric=False)],
    ids=str,
)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_tied_weights_are_stored_once(grid: IntGrid, flavour: str) -> None:
    ids = torch.randint(0, 40, (3, 7))
    program = encode_weights(capture(TiedHead(), (ids,)), grid)
    parts = sum(program.weights[name].nbytes for name in program.weights)
    for each in (program, quantize_input(program, "split"), quantize_input(program, "split block")):
        emission = emit(each, flavour)
        assert_agrees(each, emission, [ids], EXACT)
        if flavour == "cpu":
            assert sum(stored.tensor.nbytes for stored in emission.stored) <= parts


@pytest.mark.parametrize("grid", [IntGrid(8), IntGrid(8, symmetric=False), IntGrid(8, "tensor")], ids=str)
@pytest.mark.parametrize("kind", ["tensor", "token", "split", "stack"])
@pytest.mark.parametrize("flavour", ["portable", "cpu"])
@pytest.mark.parametrize("shape", [(3, 7), (7,)], ids=str)
def test_lookups_and_integer_products_read_the_same_bytes(
    grid: IntGrid, kind: str, flavour: str, shape: tuple[int, ...]
) -> None:
    """Of rank 3, as ONNX Runtime would copy a constant matrix of rank 2; so it is in memory once."""
    ids = torch.randint(0, 40, shape)
    program = quantize_input(encode_weights(capture(TiedHead(), (ids,)), grid), kind)
    emission = emit(program, flavour)
    check_model(emission.models["forward"])
    assert_agrees(program, emission, [ids], EXACT)
    (stored,) = (each for each in emission.stored if each.weight == "table.weight_codes")
    graph = emission.models["forward"].graph
    readers = {(node.op_type, list(node.input).index(name)) for node, name in readers_of(graph, stored.name)}
    assert readers == {("Gather", 0), ("MatMulIntegerToFloat" if flavour == "cpu" else "MatMulInteger", 1)}
    assert {len(tensor.dims) for tensor in graph.initializer if tensor.name.startswith(stored.name)} == {3}
    parts = sum(program.weights[name].nbytes for name in program.weights if name.startswith("table.weight_"))
    assert emission.kernels["table.weight"].resident_bytes == parts


def readers_of(graph: onnx.GraphProto, stored: str) -> list[tuple[onnx.NodeProto, str]]:
    found = [(node, name) for node in graph.node for name in node.input]
    return [(node, name) for node, name in found if name.partition("#")[0] == stored]


def test_rows_of_a_head_that_meets_float_inputs_stay_rows() -> None:
    ids = torch.randint(0, 40, (3, 7))
    program = encode_weights(capture(TiedHead(), (ids,)), IntGrid(8))
    emission = emit(program)
    assert_agrees(program, emission, [ids], EXACT)
    (stored,) = (each for each in emission.stored if each.weight == "table.weight_codes")
    assert stored.tensor.shape == program.weights["table.weight_codes"].shape


def test_tied_dense_weight_is_stored_once() -> None:
    ids = torch.randint(0, 40, (3, 7))
    program = capture(TiedHead(), (ids,))
    for flavour in FLAVOURS:
        emission = emit(program, flavour)
        assert_agrees(program, emission, [ids])
        assert [stored.name for stored in emission.stored] == ["table.weight"]


class Block(nn.Module):
    """A convolution, its activation and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(nn.functional.relu6(self.first(x)))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_integer_convolution(flavour: str, tmp_path: Path) -> None:
    """Between two static quantizations the runtime makes it one integer operator, a step of its output away at most."""
    x = torch.rand(2, 4, 9, 9) * 2
    program = encode_weights(capture(Block(), (x,)), IntGrid(8))
    program = quantize_input(program, "static", params=(6 / 255, 0))
    emission = emit(program, flavour)
    check_model(emission.models["forward"])
    assert_agrees(program, emission, [x], 6 / 255)
    assert emission.kernels["first.weight"].operator == "QLinearConv"
    assert "QLinearConv" in optimized(emission, tmp_path)


class FloatBetween(nn.Module):
    """A convolution, a transposed one and a product whose weights stay float."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up, self.fc = nn.Conv2d(4, 4, 3, padding=1), nn.ConvTranspose2d(4, 4, 2, 2), nn.Linear(18, 18)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.conv(x), self.up(x), self.fc(self.up(x))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_float_weights_between_quantized_activations_stay_float(flavour: str) -> None:
    """ONNX Runtime would round them to 8 bits by itself."""
    x = torch.rand(2, 4, 9, 9) * 2
    program = quantize_input(capture(FloatBetween(), (x,)), "static", params=(0.01, 0))
    entry = program.main
    results = list(entry.output.args[0])  # type: ignore[arg-type]
    for index, result in enumerate(results):
        results[index] = quantized(program, entry, result, entry.output, "static", 32, (0.02, 128))
    entry.output.args = (results,)
    assert_agrees(program, emit(program, flavour), [x], 1e-6)
