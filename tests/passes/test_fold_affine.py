"""Affine regions become one product: published blocks, adapters, sequences, and every reason to leave one alone."""

import operator
from functools import reduce

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn

from sparc.capture import capture
from sparc.driver import Driver
from sparc.ledger import PassRow
from sparc.pass_base import Samples
from sparc.passes.canonicalize import Canonicalize
from sparc.passes.fold import fold_affine, fold_table
from sparc.passes.fold.affine import AffineMap, Impossible, diagonal, plus, regrouped, then
from sparc.program import Program
from sparc.testing import assert_mutants_caught, assert_pass
from sparc.verify import relative_error
from tests.passes.reparameterized import (
    AsymmetricBlock,
    DiverseBranch,
    MobileOne,
    NormAndPad,
    Orepa,
    RepVGG,
)

IMAGE = (2, 8, 12, 13)


def folded(model: nn.Module, *inputs: Tensor, steps: tuple = (fold_affine,)) -> tuple[Program, PassRow]:
    """The canonical program after the folds, which agrees with the model in float64."""
    model = model.eval()
    program = capture(model, inputs)
    driver = Driver(program, Samples({"forward": [list(inputs)]}), verify="full")
    driver.run(Canonicalize())
    rows = [driver.run(step) for step in steps]
    expected = program.run_flat(list(inputs), wide=True)
    found = driver.program.run_flat(list(inputs), wide=True)
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(expected, found, strict=True))  # weights are rounded once
    return driver.program, rows[0]


def operators(program: Program) -> list[str]:
    return [node.target._opname for node in program.graph.nodes if node.op == "call_function"]


BLOCKS = {
    "RepVGG": lambda: RepVGG(8, 8),
    "RepVGG with stride": lambda: RepVGG(8, 16, stride=2),
    "RepVGG in groups": lambda: RepVGG(8, 8, groups=4),
    "MobileOne": lambda: MobileOne(8),
    "MobileOne depthwise": lambda: MobileOne(8, groups=8),
    "MobileOne 5x5": lambda: MobileOne(8, kernel=5),
    "ACNet": lambda: AsymmetricBlock(8),
    "ACNet 5x5 with stride": lambda: AsymmetricBlock(8, kernel=5, stride=2),
    "DBB": lambda: DiverseBranch(8, 12),
    "DBB 5x5 with stride": lambda: DiverseBranch(8, 8, kernel=5, stride=2),
    "DBB in groups": lambda: DiverseBranch(8, 8, groups=2),
    "OREPA": lambda: Orepa(8, 12),
}


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_becomes_one_convolution(block: str) -> None:
    torch.manual_seed(0)
    program, row = folded(BLOCKS[block](), torch.randn(IMAGE))
    assert operators(program) == ["conv2d", "relu"]
    assert row.matches == 1
    assert row.measured["region, float64"] < 1e-12
    assert len(program.weights) == 2


def test_a_network_of_blocks_keeps_its_sizes_dynamic() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(RepVGG(4, 4), RepVGG(4, 6, stride=2), AsymmetricBlock(6)).eval()
    assert_pass(fold_affine, model, {"input": torch.randn(2, 4, 8, 8)}, dynamic={"input": {0: "batch"}})


@pytest.mark.parametrize("block", [lambda: RepVGG(4, 4), lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))])
def test_wrong_twins_are_caught(block) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 8, 8)
    assert assert_mutants_caught(fold_affine, block().eval(), (x,))


# adapters: PEFT's own merge is the oracle ----------------------------------------------------------------------------
class Layers(nn.Module):
    """Every kind of layer that PEFT adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(50, 32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.table(ids))
        x = x + x.mean(1, keepdim=True)
        x = x + self.down(torch.relu(self.up(x)))
        return self.conv(torch.tanh(x).reshape(2, 4, 8, -1))


ADAPTERS: dict[str, PeftConfig] = {
    "LoRA": LoraConfig(r=4, lora_alpha=8, target_modules=["table", "up", "down", "conv"], init_lora_weights=False),
    "rsLoRA": LoraConfig(r=4, use_rslora=True, target_modules=["up", "down"], init_lora_weights=False),
    "DoRA": LoraConfig(r=4, use_dora=True, target_modules=["up", "down"], init_lora_weights=False),
    "IA3": IA3Config(target_modules=["up", "down"], feedforward_modules=["down"], init_ia3_weights=False),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_are_merged_as_peft_merges_them(adapter: str) -> None:
    torch.manual_seed(0)
    plain, ids = Layers(), torch.randint(0, 50, (2, 8))
    expected = operators(folded(plain, ids, steps=(fold_affine, fold_table))[0])
    adapted = get_peft_model(plain, ADAPTERS[adapter])
    for name, parameter in adapted.named_parameters():
        if "ia3" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    program, _ = folded(adapted.base_model.model, ids, steps=(fold_affine, fold_table))
    assert operators(program) == expected
    merged, _ = folded(adapted.merge_and_unload(), ids, steps=(fold_affine, fold_table))
    for ours, theirs in zip(_weights(program), _weights(merged), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def _weights(program: Program) -> list[Tensor]:
    """In the order in which operators read them."""
    nodes = [used for node in program.graph.nodes for used in node.all_input_nodes if used.op == "get_attr"]
    return [program.weights[str(node.target)] for node in dict.fromkeys(nodes)]


# sequences -----------------------------------------------------------------------------------------------------------
def test_products_in_a_row_are_one_where_it_is_not_larger() -> None:
    torch.manual_seed(0)
    program, row = folded(nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 32)), torch.randn(3, 5, 8))
    assert operators(program) == ["linear"]
    assert row.bytes_after < row.bytes_before
    assert set(program.weights.record("0.weight").origins) >= {"0.weight", "1.weight", "2.weight"}


def left_alone(model: nn.Module, *inputs: Tensor) -> str:
    _, row = folded(model, *inputs)
    assert row.changed == 0
    return row.skips[0].why


class Tapped(nn.Module):
    """Two products, whose inner value something else reads, or the first of which is used once more."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.second, self.kind = nn.Linear(16, 8), nn.Linear(8, 8), kind

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y) * torch.sigmoid(y if self.kind == "value" else self.first(x.flip(0)))


class Branches(nn.Module):
    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return reduce(operator.add, [branch(x) for branch in self.branches])


def test_reasons_to_leave_it_alone() -> None:
    torch.manual_seed(0)
    rows, image = torch.randn(3, 16), torch.randn(IMAGE)
    narrow = nn.Sequential(nn.Linear(32, 4), nn.Linear(4, 32))
    assert "would be larger: 1024 elements instead of 256" in left_alone(narrow, torch.randn(3, 32))
    assert "also read by" in left_alone(Tapped("value"), rows)
    assert "would be larger: 128 elements instead of 64" in left_alone(Tapped("weight"), rows)
    padded = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1))
    assert "pads with zeros" in left_alone(padded, image)
    grids = nn.Sequential(nn.Conv2d(8, 8, 3, dilation=2), nn.Conv2d(8, 8, 3))
    assert "different grids" in left_alone(grids, image)
    wide = Branches(nn.Conv2d(8, 8, 3, padding=2, dilation=2), nn.Conv2d(8, 8, 3, padding=1))
    assert "different dilations" in left_alone(wide, image)
    uneven = Branches(nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.AvgPool2d(2, ceil_mode=True))
    assert folded(uneven, image)[1].changed == 0
    off = Branches(nn.Conv2d(8, 8, 3, stride=3, padding=0), nn.Conv2d(8, 8, 1, stride=3, padding=0))
    assert "same position" in left_alone(off, torch.randn(2, 8, 12, 12))


@pytest.mark.parametrize("wrong", ["value", "place"])
def test_a_border_that_is_not_what_the_layer_gives_for_zero_is_left(wrong: str) -> None:
    class Wrong(NormAndPad):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            if wrong == "value":
                out[:, 1, 0] = 0.5
            else:
                out[:, :, 1:2, 1:2] = out[:, :, 2:3, 2:3]
            return out

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 1), Wrong(8, 1), nn.Conv2d(8, 8, 3)).eval()
    x = torch.randn(IMAGE)
    driver = Driver(capture(model, (x,)), Samples({"forward": [[x]]}))
    row = driver.run(Canonicalize())
    assert "slice_scatter" in operators(driver.program)
    assert wrong == "place" or any("not what the layer gives for zero" in skip.why for skip in row.skips)


# the algebra ---------------------------------------------------------------------------------------------------------
def _run(found: AffineMap, x: Tensor) -> Tensor:
    given = (found.stride, found.padding, found.dilation, found.groups)
    return torch.nn.functional.conv2d(x, found.kernel, found.bias, *given)


@st.composite
def _map(draw: st.DrawFn, inputs: int, outputs: int) -> AffineMap:
    window = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    groups = draw(st.sampled_from([1, 2, 4]))
    torch.manual_seed(draw(st.integers(0, 1000)))
    kernel = torch.randn(outputs, inputs // groups, *window, dtype=torch.float64)
    bias = torch.randn(outputs, dtype=torch.float64) if draw(st.booleans()) else None
    pairs = (st.tuples(st.integers(1, 2), st.integers(1, 2)), st.tuples(st.integers(0, 2), st.integers(0, 2)))
    return AffineMap(kernel, bias, draw(pairs[0]), draw(pairs[1]), draw(pairs[0]), groups)


@settings(max_examples=150, deadline=None)
@given(_map(4, 8), _map(8, 4))
def test_one_map_after_another(first: AffineMap, second: AffineMap) -> None:
    x = torch.randn(2, 4, 13, 14, dtype=torch.float64)
    try:
        both = then(first, second)
    except Impossible:
        return
    torch.testing.assert_close(_run(both, x), _run(second, _run(first, x)), rtol=1e-9, atol=1e-9)


@settings(max_examples=150, deadline=None)
@given(_map(4, 8), _map(4, 8))
def test_sums_of_maps(first: AffineMap, second: AffineMap) -> None:
    x = torch.randn(2, 4, 13, 14, dtype=torch.float64)
    try:
        both = plus(first, second)
    except Impossible:
        return
    expected = _run(first, x), _run(second, x)
    assert expected[0].shape == expected[1].shape
    torch.testing.assert_close(_run(both, x), expected[0] + expected[1], rtol=1e-9, atol=1e-9)


def test_groups_become_blocks_among_zeros() -> None:
    found = diagonal(torch.tensor([2.0, 3.0, 5.0]), rank=0)
    assert torch.equal(regrouped(found, 1), torch.diag(torch.tensor([2.0, 3.0, 5.0])))


def test_padding_is_only_allowed_behind_a_map_that_keeps_zero() -> None:
    kernel = torch.randn(4, 4, 1, 1)
    still = ((1, 1), (0, 0), (1, 1))
    border = AffineMap(torch.randn(4, 4, 3, 3), None, (1, 1), (1, 1), (1, 1))
    assert then(AffineMap(kernel, None, *still), border).padding == (1, 1)
    with pytest.raises(Impossible, match="pads with zeros"):
        then(AffineMap(kernel, torch.ones(4), *still), border)


def test_a_forgotten_flip_is_not_a_composition() -> None:
    """The kernel of two convolutions in a row is a convolution in the mathematical sense."""
    torch.manual_seed(0)
    x = torch.randn(1, 2, 9, 9, dtype=torch.float64)
    first, second = (
        AffineMap(torch.randn(2, 2, 3, 3, dtype=torch.float64), None, (1, 1), (0, 0), (1, 1)) for _ in range(2)
    )
    found = then(first, second)
    wrong = AffineMap(found.kernel.flip((2, 3)), None, (1, 1), (0, 0), (1, 1))
    expected = _run(second, _run(first, x))
    assert relative_error(expected, _run(found, x)) < 1e-12
    assert relative_error(expected, _run(wrong, x)) > 0.1
