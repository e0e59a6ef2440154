"""Dynamic activations: ONNX Runtime's formulas bit for bit, sharing, choices, and what is left alone."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from sparc.cache import Cache
from sparc.contract import Approximate
from sparc.driver import Driver
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.operators import find_spec, is_decode, is_quantize
from sparc.passes.activation.choose import Errors, output_errors, wants_token
from sparc.passes.activation.dynamic import QuantizeActivations
from sparc.passes.activation.insert import PER_TENSOR, PER_TOKEN
from sparc.passes.round import Round
from sparc.program import Program
from tests.passes.models import driver, models


def quantized(model: nn.Module, inputs: tuple[Tensor, ...], step: QuantizeActivations, grid: IntGrid) -> Driver:
    chosen = driver(model, inputs)
    chosen.run(Round(grid))
    chosen.run(step)
    return chosen


def quantizes(program: Program) -> list[fx.Node]:
    return [node for node in program.graph.nodes if is_quantize(node)]


def value_read(program: Program, inputs: list[Tensor]) -> Tensor:
    """What the first product reads, as the program computes it."""
    product = next(node for node in program.graph.nodes if node.target is torch.ops.aten.linear.default)
    found: dict[str, Tensor] = {}

    def keep(node: fx.Node, value: Tensor, _: object) -> None:
        found[node.name] = value

    program.run_flat(inputs, watch=keep)
    return found[product.args[0].name]  # type: ignore[union-attr]


def dynamic_quantize_linear(x: np.ndarray) -> np.ndarray:
    """ONNX's DynamicQuantizeLinear, then DequantizeLinear, in float32."""
    low, high = min(np.float32(0), x.min()), max(np.float32(0), x.max())
    scale = np.float32((high - low) / np.float32(255)) if high > low else np.float32(1)
    zero = np.clip(np.rint(np.float32(0) - low / scale), 0, 255)
    codes = np.clip(np.rint(x / scale) + zero, 0, 255)
    return ((codes - zero) * scale).astype(np.float32)


def per_token(x: np.ndarray) -> np.ndarray:
    largest = np.abs(x).max(-1, keepdims=True)
    scale = np.where(largest > 0, largest / np.float32(127), np.float32(1)).astype(np.float32)
    return (np.rint(x / scale) * scale).astype(np.float32)


INPUTS = {
    "normal": lambda: torch.randn(3, 5, 24),
    "positive": lambda: torch.rand(3, 5, 24) + 2,
    "negative": lambda: -torch.rand(3, 5, 24) - 2,
    "zero": lambda: torch.zeros(3, 5, 24),
    "outlier": lambda: torch.randn(3, 5, 24) * torch.tensor([1.0] * 23 + [300.0]),
    "ties": lambda: torch.arange(360).reshape(3, 5, 24) / 2,
}


@pytest.mark.parametrize("name", sorted(INPUTS))
@pytest.mark.parametrize(("mode", "model"), [("tensor", dynamic_quantize_linear), ("token", per_token)])
def test_the_formula_bit_for_bit(name: str, mode: str, model: object) -> None:
    torch.manual_seed(0)
    x = INPUTS[name]()
    program = quantized(nn.Linear(24, 6), (x,), QuantizeActivations(mode), IntGrid(8)).program  # type: ignore[arg-type]
    assert np.array_equal(value_read(program, [x]).numpy(), model(x.numpy()))  # type: ignore[operator]


def test_split_is_sixteen_bits() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 7, 24)
    program = quantized(nn.Linear(24, 6), (x,), QuantizeActivations("split"), IntGrid(8)).program
    step = (x.max() - x.min()) / 255
    assert (value_read(program, [x]) - x).abs().max() <= step / 254 * 0.51
    specs = [find_spec(str(node.args[2])) for node in quantizes(program)]
    assert specs == [PER_TENSOR, IntGrid(8, "tensor", symmetric=True)]


@pytest.mark.parametrize("group", [16, 32])
def test_split_by_the_groups_of_the_weight(group: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 7, 64) * torch.logspace(-2, 2, 64)
    program = quantized(nn.Linear(64, 6), (x,), QuantizeActivations("split"), IntGrid(8, group)).program
    greatest = x.reshape(4, 7, -1, group).abs().amax(-1).repeat_interleave(group, -1)
    assert ((value_read(program, [x]) - x).abs() <= greatest / 127 / 2 / 127 * 0.51).all()
    assert [find_spec(str(node.args[2])) for node in quantizes(program)] == [IntGrid(8, group)] * 2


def test_products_in_other_groups_than_the_operators_keep_their_input() -> None:
    chosen = quantized(nn.Linear(48, 6), (torch.randn(4, 48),), QuantizeActivations("split"), IntGrid(8, 24))
    assert not quantizes(chosen.program)


def test_blocks_follow_the_groups_of_the_weight() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 32)
    program = quantized(nn.Linear(32, 6), (x,), QuantizeActivations("block"), IntGrid(4, group=16)).program
    expected = per_token(x.reshape(4, 2, 16).numpy()).reshape(4, 32)
    assert np.array_equal(value_read(program, [x]).numpy(), expected)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(24, 24) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.a(x) + self.b(x)))


def test_a_head_tied_to_an_embedding_meets_stacked_halves() -> None:
    """Both halves have one zero point, and the lookup still reads the float weight."""
    model, inputs = models()["tied"]
    program = quantized(model, inputs, QuantizeActivations("split"), IntGrid(8)).program
    head = [node for node in program.graph.nodes if node.target is torch.ops.aten.linear.default][-1]
    coarse = quantizes(program)[-2]
    assert head.args[0].target is torch.ops.aten.add.Tensor  # type: ignore[union-attr]
    assert find_spec(str(coarse.args[2])) == IntGrid(8, "tensor", symmetric=True)
    (lookup,) = (node for node in program.graph.nodes if node.target is torch.ops.aten.embedding.default)
    assert lookup.args[0] is head.args[1]


def test_products_of_one_value_share_one_quantize() -> None:
    program = quantized(Shared(), (torch.randn(4, 24),), QuantizeActivations("tensor"), IntGrid(8)).program
    assert len(quantizes(program)) == 2
    assert sum(is_decode(node) for node in program.graph.nodes) == 2


@pytest.mark.parametrize("mode", ["auto", "tensor", "token", "split"])
def test_running_it_again_changes_nothing(mode: str) -> None:
    chosen = quantized(Shared(), (torch.randn(4, 24),), QuantizeActivations(mode), IntGrid(8))  # type: ignore[arg-type]
    assert chosen.run(QuantizeActivations(mode)).changed == 0  # type: ignore[arg-type]


def test_a_floor_gives_the_float_input_back() -> None:
    chosen = quantized(Shared(), (torch.randn(4, 24),), QuantizeActivations("tensor", floor=200.0), IntGrid(8))
    assert not quantizes(chosen.program)
    assert chosen.ledger.passes[-1].measured["restored"] == 3
    assert QuantizeActivations(floor=200.0).contract == Approximate("snr_db", 200.0)


def test_what_is_left_alone_says_why() -> None:
    reasons = {}
    for name, (model, inputs) in models().items():
        chosen = quantized(model, inputs, QuantizeActivations("tensor"), IntGrid(8))
        reasons[name] = {skip.why for skip in chosen.ledger.passes[-1].skips}
    assert reasons["convolutions"] == {
        "no dynamic integer product exists for conv",
        "no dynamic integer product exists for conv_transposed",
    }
    chosen = driver(*models()["linear"])
    chosen.run(QuantizeActivations("tensor"))
    assert {skip.why for skip in chosen.ledger.passes[-1].skips} == {"its weight is not rounded to integers"}


@pytest.mark.parametrize("grid", [IntGrid(4), IntGrid(8, group=8), IntGrid(8, symmetric=False, zero="minimum")])
def test_weights_without_an_integer_product_are_left_alone(grid: IntGrid) -> None:
    chosen = quantized(Shared(), (torch.randn(4, 24),), QuantizeActivations("tensor"), grid)
    assert not quantizes(chosen.program)
    assert len(chosen.ledger.passes[-1].skips) == 3


# choosing -------------------------------------------------------------------------------------------------------------
def test_errors_by_hand() -> None:
    """x = [127, 0.4], w = 1: per token the second element becomes 0; the energy is that of 127.4."""
    found = output_errors([torch.tensor([[127.0, 0.4]])], [torch.ones(1, 2)])
    assert found.token == pytest.approx(0.4**2 / 127.4**2, rel=1e-4)
    assert found.tensor == pytest.approx((0.4 - 127 / 255) ** 2 / 127.4**2, rel=1e-2)


def test_a_small_row_counts_as_much_as_a_large_one() -> None:
    """Beside a row of 255s, one step of the tensor's scale is 1: a row of 0.25s is lost altogether."""
    found = output_errors([torch.tensor([[255.0, 255.0], [0.25, 0.25]])], [torch.eye(2)])
    assert found.tensor == pytest.approx(0.5)
    assert found.token == pytest.approx(0.0, abs=1e-9)


def test_a_token_scale_must_pay_for_its_time() -> None:
    errors = Errors(tensor=0.003, token=0.001)
    assert wants_token(errors, share=0.05, price=1e-3)
    assert not wants_token(errors, share=0.10, price=1e-3)
    assert wants_token(errors, share=0.10, price=5e-4)


def test_auto_takes_tokens_where_rows_differ_in_size() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 24)
    even = quantized(Shared(), (x,), QuantizeActivations(), IntGrid(8)).program
    uneven = quantized(Shared(), (x * 100 ** torch.arange(4)[:, None],), QuantizeActivations(), IntGrid(8)).program
    first = [find_spec(str(quantizes(program)[0].args[2])) for program in (even, uneven)]
    assert first == [PER_TENSOR, PER_TOKEN]


@pytest.mark.parametrize(
    ("bits", "group", "cached", "specs"),
    [
        (8, "channel", False, 2),
        (8, "channel", True, [IntGrid(8, 64)]),
        (4, 32, True, [IntGrid(8, 32)]),
        (4, 32, False, []),
        (3, 32, True, []),
        (8, 48, True, []),
    ],
)
def test_fine_depends_on_the_cache(bits: int, group: Any, cached: bool, specs: Any) -> None:
    """`split` where whole sequences are read, blocks of the operator's in entries with a cache."""
    chosen = driver(nn.Linear(192, 8), (torch.randn(5, 192),))
    chosen.program.main.cache = Cache((), 8) if cached else None
    chosen.run(Round(IntGrid(bits, group)))
    chosen.run(QuantizeActivations("fine"))
    found = [find_spec(str(node.args[2])) for node in quantizes(chosen.program)]
    if specs == 2:
        assert [spec.group for spec in found] == ["tensor", "tensor"]
    else:
        assert found == specs
