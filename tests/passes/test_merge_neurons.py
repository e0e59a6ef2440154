"""Merging neurons: Net2Wider is undone, dead units go into the next bias, and everything else stays with a reason."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparc.capture import capture
from sparc.diag import PassError, VerifyError
from sparc.driver import Driver
from sparc.ledger import PassRow
from sparc.pass_base import Samples
from sparc.passes.canonicalize import Canonicalize
from sparc.passes.coalesce import MergeNeurons, neurons
from sparc.program import Program
from sparc.testing import assert_pass
from tests.architectures import ARCHITECTURES


def wider(first: nn.Module, last: nn.Module, width: int, read: int = 1) -> None:
    """Net2WiderNet: `first` gets copies of its rows, the columns of `last` are shared among the copies, in place.

    The weights are multiples of 1/64 and shared by powers of two, so that nothing is rounded.
    """
    with torch.no_grad():
        for layer in (first, last):
            for parameter in layer.parameters():
                parameter.copy_((parameter * 64).round() / 64)
        old = len(first.weight)
        source = torch.cat([torch.arange(old), torch.arange(width - old) % old])
        share = 1 / torch.bincount(source).double()[source]
        first.weight = nn.Parameter(first.weight[source])
        if first.bias is not None:
            first.bias = nn.Parameter(first.bias[source])
        columns = last.weight.index_select(read, source)
        last.weight = nn.Parameter(columns * share.to(columns.dtype).reshape(-1, *[1] * (columns.ndim - 1 - read)))


def run(model: nn.Module, x: Tensor, **options: Any) -> tuple[Program, PassRow]:
    driver = Driver(capture(model.eval(), (x,), **options), Samples({"forward": [[x]]}), verify="full")
    row = driver.run(MergeNeurons())
    return driver.program, row


def shapes(program: Program) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in program.weights.items()}


def reasons(row: PassRow) -> str:
    return "; ".join(skip.why for skip in row.skips)


def filled(layer: nn.Module, rows: list[int], value: float = 0.0) -> nn.Module:
    with torch.no_grad():
        layer.weight[rows] = value
    return layer


def mlp(function: nn.Module | None = None, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), function or nn.GELU(), nn.Linear(8, 5, bias=bias))


# duplicates ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("function", [nn.GELU(), nn.ReLU(), nn.Sigmoid(), nn.Identity(), nn.SiLU()])
def test_a_wider_network_gets_its_size_back(function: nn.Module) -> None:
    model = mlp(function)
    before = shapes(capture(model, (torch.randn(3, 6),)))
    wider(model[0], model[2], 16)
    program, row = assert_pass(MergeNeurons(), model, (torch.randn(3, 6),), dynamic={"input": {0: "batch"}})
    assert shapes(program) == before
    assert row.measured["region, float64"] < 1e-12
    assert row.bytes_after < row.bytes_before


@given(st.lists(st.integers(2, 6), min_size=3, max_size=5), st.integers(0, 1000), st.booleans())
@settings(max_examples=15, deadline=None)
def test_every_layer_of_a_wider_network_gets_its_size_back(widths: list[int], seed: int, image: bool) -> None:
    torch.manual_seed(seed)
    kind: Callable[..., nn.Module] = (lambda i, o: nn.Conv2d(i, o, 3, padding=1)) if image else nn.Linear
    products = [kind(i, o) for i, o in pairwise(widths)]
    old = [tuple(product.weight.shape) for product in products]
    for first, last in pairwise(products):
        wider(first, last, 2 * len(first.weight))
    layers = [layer for product in products for layer in (product, nn.Tanh())]
    x = torch.randn(2, widths[0], 5, 5) if image else torch.randn(3, widths[0])
    program, row = run(nn.Sequential(*layers), x)
    assert [shape for name, shape in shapes(program).items() if "weight" in name] == old
    assert row.matches == len(products) - 1


def test_a_wider_network_with_depthwise_convolutions() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3)
            self.deep = nn.Conv2d(4, 4, 3, groups=4, padding=1)
            wider(self.first, self.last, 8)
            self.deep.weight = nn.Parameter(self.deep.weight.repeat(2, 1, 1, 1))
            self.deep.bias = nn.Parameter(self.deep.bias.repeat(2))
            self.deep.groups = 8

        def forward(self, x: Tensor) -> Tensor:
            return self.last(nn.functional.hardswish(self.deep(self.first(x))))

    torch.manual_seed(0)
    program, _ = assert_pass(MergeNeurons(), Deep().eval(), (torch.randn(2, 3, 7, 7),))
    assert shapes(program)["deep.weight"] == (4, 1, 3, 3)
    (node,) = (
        node for node in program.graph.nodes if "deep" in str(node.meta.get("module")) and node.op == "call_function"
    )
    assert node.args[6] == 4


@pytest.mark.parametrize(
    ("function", "count"), [(nn.ReLU(), 1), (nn.LeakyReLU(), 1), (nn.Identity(), 1), (nn.GELU(), 0)]
)
def test_scaled_duplicates_go_where_the_function_is_homogeneous(function: nn.Module, count: int) -> None:
    model = mlp(function)
    with torch.no_grad():
        model[0].weight[3], model[0].bias[3] = 4 * model[0].weight[5], 4 * model[0].bias[5]
        model[0].weight[6], model[0].bias[6] = -1 * model[0].weight[5], -1 * model[0].bias[5]
    program, row = run(model, torch.randn(3, 6))
    assert shapes(program)["0.weight"] == (8 - count, 6)
    assert row.matches == count


def test_a_row_that_only_looks_the_same_stays() -> None:
    """The first elements are equal, which are compared first, and the bias is not."""
    model = mlp()
    with torch.no_grad():
        model[0].weight[3], model[0].weight[4, :5] = model[0].weight[5], model[0].weight[5, :5]
    assert run(model, torch.randn(3, 6))[1].matches == 0


class Attention(nn.Module):
    """Two layers of queries, keys and values in one matrix; head 2 is head 0."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 3 * 4 * 4), nn.Linear(16, 8)
        with torch.no_grad():
            for parameter in (self.qkv.weight, self.qkv.bias):
                heads = parameter.view(3, 4, 4, -1)
                heads[:, 2] = heads[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).flatten(2))


def test_a_head_that_equals_another_one() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    driver = Driver(capture(Attention(), (x,)), Samples({"forward": [[x]]}), verify="full")
    driver.run(Canonicalize())
    row = driver.run(MergeNeurons())
    assert row.matches == 1
    assert shapes(driver.program) == {
        "qkv.weight": (36, 8),
        "qkv.bias": (36,),
        "out.weight": (8, 12),
        "out.bias": (8,),
    }


def test_a_decoder() -> None:
    """Duplicates of a gated layer, and a head of keys and values with its queries that equals the other one."""
    built = ARCHITECTURES["llama"].build().enlivened()
    layer = built.model.model.layers[0]
    with torch.no_grad():
        for product in (layer.mlp.gate_proj, layer.mlp.up_proj):
            product.weight[7] = product.weight[20]
        for product in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            first, second = product.weight.chunk(2)
            second.copy_(first)
    program = capture(built.model, built.inputs, dynamic=built.dynamic)
    flat = program.main.signature.bind((), dict(built.inputs))
    driver = Driver(program, Samples({"forward": [flat]}), verify="full")
    driver.run(Canonicalize())
    row = driver.run(MergeNeurons())
    path = "model.layers.0."
    assert row.matches == 2
    assert row.measured["region, float64"] < 1e-12
    assert shapes(driver.program)[f"{path}mlp.down_proj.weight"] == (32, 63)
    assert shapes(driver.program)[f"{path}self_attn.q_proj.weight"] == (16, 32)
    assert shapes(driver.program)[f"{path}self_attn.v_proj.weight"] == (8, 32)
    assert shapes(driver.program)[f"{path}self_attn.o_proj.weight"] == (32, 16)


# constants -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bias", [True, False])
def test_a_constant_goes_into_the_next_bias(bias: bool) -> None:
    model = mlp(nn.Sigmoid(), bias)
    filled(model[0], [2, 4])
    program, row = assert_pass(MergeNeurons(), model, (torch.randn(3, 6),), dynamic={"input": {0: "batch"}})
    assert shapes(program)["0.weight"] == (6, 6)
    assert row.measured["region, float64"] < 1e-12
    value = torch.sigmoid(model[0].bias[[2, 4]].double())
    expected = model[2].weight[:, [2, 4]].double() @ value + (model[2].bias.double() if bias else 0)
    assert torch.allclose(program.weights["2.bias"].double(), expected, rtol=1e-6)


class Gated(nn.Module):
    """silu(gate) * up, as one matrix or two; units that are zero on either side."""

    def __init__(self, joined: bool) -> None:
        super().__init__()
        self.joined = joined
        self.both, self.down = nn.Linear(6, 16, bias=False), nn.Linear(8, 4, bias=False)
        filled(self.both, [3, 8 + 5])
        self.gate, self.up = nn.Linear(6, 8, bias=False), nn.Linear(6, 8, bias=False)
        with torch.no_grad():
            self.gate.weight.copy_(self.both.weight[:8])
            self.up.weight.copy_(self.both.weight[8:])

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, -1) if self.joined else (self.gate(x), self.up(x))
        return self.down(nn.functional.silu(gate) * up)


@pytest.mark.parametrize("joined", [True, False])
def test_what_is_multiplied_by_zero(joined: bool) -> None:
    torch.manual_seed(0)
    program, _ = assert_pass(MergeNeurons(), Gated(joined), (torch.randn(3, 6),))
    assert shapes(program)["down.weight"] == (4, 6)
    assert "down.bias" not in program.weights


@pytest.mark.parametrize("padding", [0, 1, "valid", "same"])
@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_constants_before_padding(padding: int | str, constant: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=padding, bias=constant == 0))
    filled(model[0], [4])
    with torch.no_grad():
        model[0].bias[4] = constant
    program, row = run(model, torch.randn(2, 3, 6, 6))
    if constant == 0 or padding in (0, "valid"):
        assert shapes(program)["0.weight"][0] == 5
    else:
        assert row.changed == 0
        assert "1 constant units of its input stay: it pads its input" in reasons(row)


def test_a_grouped_convolution_takes_constants() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Sigmoid(), nn.Conv2d(6, 4, 3, groups=2))
    filled(model[0], [1, 4])  # the second channel of both groups
    program, row = run(model, torch.randn(2, 3, 6, 6))
    assert shapes(program)["2.weight"] == (4, 2, 3, 3)
    assert row.measured["region, float64"] < 1e-12


def test_what_goes_reveals_what_is_dead_before_and_behind() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        model[4].weight[:, 2] = 0  # nobody reads unit 2 of the second layer,
        model[2].weight[[0, 1, 3, 4, 5], 3] = 0  # which alone reads unit 3 of the first
        model[0].weight[5] = 0  # a constant of the first layer
        model[2].weight[4] = 0  # which alone feeds unit 4 of the second
        model[2].weight[4, 5] = 1
    program, row = assert_pass(MergeNeurons(), model, (torch.randn(3, 4),))
    assert [shape for name, shape in shapes(program).items() if "weight" in name] == [(4, 4), (4, 4), (3, 4)]
    assert row.measured["region, float64"] < 1e-12


def test_one_unit_stays() -> None:
    model = mlp(nn.ReLU())
    filled(model[0], list(range(8)))
    program, _ = assert_pass(MergeNeurons(), model, (torch.randn(3, 6),))
    assert shapes(program)["2.weight"] == (5, 1)


# what stays ----------------------------------------------------------------------------------------------------------
def twin(model: nn.Sequential) -> nn.Sequential:
    with torch.no_grad():
        model[0].weight[3], model[0].bias[3] = model[0].weight[5], model[0].bias[5]
    return model


class Between(nn.Module):
    """Duplicates in a layer, with a function between it and its reader."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.layers, self.function = twin(mlp()), function
        with torch.no_grad():
            self.layers[2].weight[:, 3] = self.layers[2].weight[:, 5]

    def forward(self, x: Tensor) -> Any:
        return self.function(self.layers[0](x), self.layers[2])


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, read: (x, read(x)), "1 duplicates of 8 units stay: it is an output of the program"),
        (lambda x, read: read(nn.functional.layer_norm(x, (8,))), "layer_norm takes a statistic of it"),
        (lambda x, read: read(x) * (x @ x.mT).sum(), "whose operands are all computed"),
        (lambda x, read: read(x) + read.weight.sum(), "the columns of layers.2.weight are also used otherwise"),
    ],
)
def test_duplicates_that_stay(function: Callable[..., Any], reason: str) -> None:
    _, row = run(Between(function), torch.randn(3, 6))
    assert row.changed == 0
    assert reason in reasons(row)


def test_a_bias_that_is_read_twice() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = mlp(nn.Sigmoid())
            filled(self.layers[0], [2])

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x) * self.layers[2].bias

    _, row = run(Shared(), torch.randn(3, 6))
    assert row.changed == 0
    assert "1 constant units of its input stay: its bias is read elsewhere too" in reasons(row)


def test_nothing_is_said_where_nothing_is_superfluous() -> None:
    _, row = run(mlp(), torch.randn(3, 6))
    assert (row.changed, row.skips) == (0, [])


# wrong twins ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fault", ["columns", "biases", "choice", "scale"])
def test_wrong_twins_are_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = twin(mlp(nn.ReLU()))
    with torch.no_grad():
        model[0].bias[1] = 1.0
        model[0].weight[6], model[0].bias[6] = 2 * model[0].weight[7], 2 * model[0].bias[7]
    filled(model[0], [1])
    if fault == "columns":
        monkeypatch.setattr(neurons, "new_columns", lambda *_: {})
    elif fault == "biases":
        monkeypatch.setattr(neurons, "add_biases", lambda *_: ({}, False))
    elif fault == "choice":
        right = neurons.cut
        monkeypatch.setattr(
            neurons, "cut", lambda program, group, keep: right(program, group, (keep + 1) % group.units)
        )
    else:
        found = neurons.find_superfluous

        def unscaled(*given: Any) -> Any:
            result = found(*given)
            return type(result)(result.duplicates, torch.ones_like(result.factors), result.unread)

        monkeypatch.setattr(neurons, "find_superfluous", unscaled)
    with pytest.raises(VerifyError, match="SPARC301"):
        run(model, torch.randn(3, 6))


def test_what_is_left_is_a_multiple() -> None:
    model = filled(mlp(nn.ReLU())[0], [0, 1, 2]), nn.ReLU(), nn.Linear(8, 4)
    x = torch.randn(3, 6)
    for multiple, left in ((1, 5), (2, 6), (3, 6), (8, 8)):
        driver = Driver(capture(nn.Sequential(*model), (x,)), Samples({"forward": [[x]]}), verify="full")
        row = driver.run(MergeNeurons(multiple))
        assert shapes(driver.program)["0.weight"] == (left, 6)
        assert not driver.run(MergeNeurons(multiple)).changed
        assert ("no smaller multiple of 8 is left" in reasons(row)) == (multiple == 8)
    with pytest.raises(PassError, match="SPARC209"):
        MergeNeurons(0)


def test_half_precision() -> None:
    model = mlp().to(torch.bfloat16)
    wider(model[0], model[2], 16)
    program, _ = run(model, torch.randn(3, 6, dtype=torch.bfloat16))
    assert shapes(program)["0.weight"] == (8, 6)
    assert program.weights["2.weight"].dtype == torch.bfloat16


def test_golden(golden: Callable[[str, str], None]) -> None:
    torch.manual_seed(0)
    model = Gated(True)
    with torch.no_grad():
        model.both.weight[[1, 9]] = model.both.weight[[0, 8]]
    x = torch.randn(3, 6)
    program, row = run(model, x)
    before = capture(model, (x,)).text()
    golden("merge_neurons.txt", f"{before}\n=> {row.matches} group\n\n{program.text()}")
