"""Corners of the exact passes: graphs that look like a match and are none, or are one with something beside it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparc.analysis.features import product_axes
from sparc.analysis.values import scalar_value
from sparc.capture import capture, capture_entries
from sparc.driver import Driver
from sparc.ledger import PassRow
from sparc.pass_base import Pass, Samples
from sparc.passes.canonicalize import Canonicalize
from sparc.passes.canonicalize.product import raise_einsum
from sparc.passes.coalesce import MergeNeurons, coalesce_parallel
from sparc.passes.fold import fold_affine, fold_norm_affine, fold_table
from sparc.passes.rotate import Rotate
from sparc.verify import relative_error

IDS = torch.randint(0, 10, (2, 5))
Function = Callable[..., Tensor | tuple[Tensor, ...]]


class Model(nn.Module):
    """A function of one input and named layers and buffers."""

    def __init__(self, function: Function, **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.function(self, x)


def run(model: nn.Module, x: Tensor, *steps: Pass) -> list[PassRow]:
    """The rows of some passes on a model, whose outputs they keep."""
    program = capture(model.eval(), [x])
    driver = Driver(program, Samples({"forward": [[x]]}), verify="full")
    rows = [driver.run(step) for step in steps]
    for a, b in zip(program.run_flat([x]), driver.program.run_flat([x]), strict=True):
        assert a.dtype == b.dtype
        assert relative_error(a, b) < (1e-5 if a.dtype == torch.float32 else 1e-2)
    return rows


def planted(layer: nn.Module) -> nn.Module:
    """Give a layer two equal units and a constant one."""
    with torch.no_grad():
        layer.weight[1], layer.bias[1] = layer.weight[0], layer.bias[0]
        layer.weight[3] = 0
    return layer


@dataclass
class Case:
    """A model, its input, and how often a pass matches."""

    function: Function
    x: Tensor
    step: Pass
    parts: dict[str, nn.Module | Tensor] = field(default_factory=dict)
    matches: int = 0


def _vectors(m, x):
    return F.linear(torch.relu(F.linear(x, m.w)), m.v) + torch.tanh(F.linear(x, m.u)).sum()


def _stream(inside: Function) -> Function:
    def function(m, x):
        x = m.table(x)
        x = inside(m, x, m.places.expand(2, -1, -1))
        x = x + m.down(torch.relu(m.up(F.rms_norm(x, [16]))))
        return m.head(F.rms_norm(x, [16]))

    return function


def _heads(pieces: Function) -> Function:
    def function(m, x):
        packed = m.packed(x)
        q, k, v = (each.reshape(2, 5, 2, 8).transpose(1, 2) for each in packed.split(16, -1))
        return m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 16)) + pieces(packed)

    return function


def _stream_parts() -> dict[str, nn.Module | Tensor]:
    layers = {"up": nn.Linear(16, 32), "down": nn.Linear(32, 16), "head": nn.Linear(16, 10), "key": nn.Linear(16, 4)}
    return {"table": nn.Embedding(10, 16), "places": torch.randn(1, 5, 16), **layers}


_TABLE = {"e": nn.Embedding(10, 16)}
_PACKED = {"packed": nn.Linear(16, 48), "out": nn.Linear(16, 16)}
_IMAGE = torch.randn(4, 8, 8)

CASES: dict[str, Case] = {
    "parallel convolutions without a batch": Case(
        lambda m, x: torch.relu(m.a(x)) + torch.tanh(m.b(x)),
        _IMAGE,
        coalesce_parallel,
        {"a": nn.Conv2d(4, 4, 3), "b": nn.Conv2d(4, 4, 3)},
        matches=1,
    ),
    "rows are no channels without a batch": Case(
        lambda m, x: m.a(x * m.g),
        torch.randn(8, 8, 8),
        fold_norm_affine,
        {"a": nn.Conv2d(8, 4, 3), "g": torch.randn(8, 1)},
    ),
    "channels without a batch": Case(
        lambda m, x: m.a(x * m.g),
        torch.randn(8, 8, 8),
        fold_norm_affine,
        {"a": nn.Conv2d(8, 4, 3), "g": torch.randn(8, 1, 1)},
        matches=1,
    ),
    **{
        f"weights that are vectors, {step.name}": Case(
            _vectors,
            torch.randn(3, 5, 16),
            step,
            {"w": torch.randn(16), "u": torch.randn(16), "v": torch.randn(4, 5)},
        )
        for step in (Canonicalize(), fold_affine, coalesce_parallel, fold_norm_affine, MergeNeurons())
    },
    "a norm before a weight that is a vector": Case(
        lambda m, x: F.linear(F.layer_norm(x, [16], m.g, m.g), m.w),
        torch.randn(3, 5, 16),
        fold_norm_affine,
        {"g": torch.randn(16), "w": torch.randn(16)},
    ),
    "a table before a weight that is a vector": Case(
        lambda m, x: F.linear(m.e(x), m.w), IDS, fold_table, {**_TABLE, "w": torch.randn(16)}
    ),
    "a row that adds an axis": Case(
        lambda m, x: m.e(x) + m.w, IDS, fold_table, {**_TABLE, "w": torch.randn(1, 1, 1, 16)}
    ),
    "rows that repeat an index": Case(
        lambda m, x: m.e(x) + m.w, IDS[:, :1], fold_table, {**_TABLE, "w": torch.randn(1, 16).repeat(5, 1)}
    ),
    "a row beside one index": Case(
        lambda m, x: m.e(x) + m.w, torch.tensor(3), fold_table, {**_TABLE, "w": torch.randn(1, 16)}
    ),
    "a half table becomes float": Case(
        lambda m, x: m.e(x) * m.w, IDS, fold_table, {"e": nn.Embedding(10, 16).half(), "w": torch.randn(16)}
    ),
    "a factor that is rounded to an integer": Case(
        lambda m, x: m.b(m.a(x) * torch.full([], 2.7).to(torch.int32)),
        torch.randn(3, 16),
        fold_affine,
        {"a": nn.Linear(16, 8), "b": nn.Linear(8, 4)},
        matches=1,
    ),
    "a bias that repeats the only feature": Case(
        lambda m, x: m.a(x) + m.b, torch.randn(3, 16), Canonicalize(), {"a": nn.Linear(16, 1), "b": torch.randn(8)}
    ),
    "a bias that adds an axis": Case(
        lambda m, x: m.a(x) + m.b,
        torch.randn(3, 16),
        Canonicalize(),
        {"a": nn.Linear(16, 8), "b": torch.randn(1, 1, 8)},
    ),
    "an einsum that repeats the reduced axis": Case(
        lambda m, x: torch.einsum("etk,ekn->etn", x, m.w),
        torch.randn(3, 2, 1),
        raise_einsum,
        {"w": torch.randn(3, 4, 5)},
    ),
    "an einsum that repeats a matrix's input": Case(
        lambda m, x: torch.einsum("etk,ekn->etn", x, m.w),
        torch.randn(1, 2, 4),
        raise_einsum,
        {"w": torch.randn(3, 4, 5)},
    ),
    "a viewed result": Case(
        lambda m, x: (torch.relu(m.a(x).view(2, -1)), m.b(x).view(-1)),
        torch.randn(2, 5, 16),
        coalesce_parallel,
        {"a": nn.Linear(16, 16), "b": nn.Linear(16, 16)},
    ),
    "units beside others in one reader": Case(
        lambda m, x: m.b(torch.cat([x, torch.relu(m.a(x)), x], -1)),
        torch.randn(2, 5, 16),
        MergeNeurons(),
        {"a": planted(nn.Linear(16, 8)), "b": nn.Linear(40, 4)},
        matches=1,
    ),
    "two groups in one reader": Case(
        lambda m, x: m.c(torch.cat([torch.sigmoid(m.a(x)), torch.sigmoid(m.b(x))], 1)),
        torch.randn(2, 3, 6, 6),
        MergeNeurons(),
        {"a": planted(nn.Conv2d(3, 8, 3)), "b": planted(nn.Conv2d(3, 6, 3)), "c": nn.Conv2d(14, 4, 1)},
        matches=2,
    ),
    "places that a function read before": Case(
        _stream(lambda m, x, places: x * torch.sigmoid(torch.relu(places).mean()) + places),
        IDS,
        Rotate(),
        _stream_parts(),
    ),
    "places that a product read before": Case(
        _stream(lambda m, x, places: x * torch.sigmoid(m.key(places).mean()) + places), IDS, Rotate(), _stream_parts()
    ),
    "places that are only added": Case(
        _stream(lambda m, x, places: x + places), IDS, Rotate(), _stream_parts(), matches=1
    ),
    "packed values also read by heads": Case(
        _heads(lambda packed: packed.reshape(2, 5, 6, 8)[..., 0:4].sum((-1, -2)).unsqueeze(-1)),
        torch.randn(2, 5, 16),
        Rotate(),
        _PACKED,
    ),
    "packed values whose size is read": Case(
        _heads(lambda packed: torch.zeros_like(packed).sum()), torch.randn(2, 5, 16), Rotate(), _PACKED, matches=1
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_corner(name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    (row,) = run(Model(case.function, **case.parts), case.x, case.step)
    assert case.matches == row.matches or isinstance(case.step, Canonicalize)


def test_a_factor_that_varies_is_none() -> None:
    model = Model(lambda m, x: m.a(x).add(m.b(x), alpha=x.shape[0]), a=nn.Linear(16, 8), b=nn.Linear(16, 8)).eval()
    x, other = torch.randn(3, 16), torch.randn(5, 16)
    program = capture(model, [x], dynamic={"x": {0: "batch"}})
    driver = Driver(program, Samples({"forward": [[x]]}), verify="full")
    assert not driver.run(fold_affine).changed
    torch.testing.assert_close(driver.program.run_flat([other])[0], model(other))


@pytest.mark.parametrize(
    ("fill", "kind", "number"), [(2.7, torch.int64, 2), (0.5, torch.bool, True), (0.5, torch.float32, 0.5)]
)
def test_a_filled_tensor_has_the_number_of_its_dtype(fill: float, kind: torch.dtype, number: float) -> None:
    program = capture(Model(lambda m, x: x * torch.full([1], fill).to(kind)), [torch.randn(3)])
    factor = next(node for node in program.graph.nodes if getattr(node.target, "_opname", "") == "mul").args[1]
    assert scalar_value(program, factor) == number


def test_a_product_has_its_channels_in_one_place_with_and_without_a_batch() -> None:
    for shape in ((4, 8, 8), (2, 4, 8, 8)):
        program = capture(Model(lambda m, x: m.a(x), a=nn.Conv2d(4, 4, 3)), [torch.randn(shape)])
        product = next(node for node in program.graph.nodes if node.op == "call_function")
        assert product_axes(product) == (-3, -3)


def _border(m, x, weight: Tensor | None) -> Tensor:
    x = F.pad(F.batch_norm(x, m.mean, m.variance, weight), [1, 1, 1, 1])
    for axis in (2, 3):
        for start in (0, 9):
            zeros = torch.zeros([1 if axis == each else size for each, size in enumerate(x.shape)])
            x = x.slice_scatter(zeros, axis, start, start + 1)
    return m.conv(x)


def test_padding_behind_a_computed_batch_norm_stays() -> None:
    parts = {"mean": torch.randn(4), "variance": torch.rand(4), "conv": nn.Conv2d(4, 4, 3)}
    run(Model(lambda m, x: _border(m, x, x.mean((0, 2, 3))), **parts), torch.randn(2, 4, 8, 8), Canonicalize())


class Two(nn.Module):
    """Two functions of one model, chosen by the number of the input's axes."""

    def __init__(self, first: Function, second: Function) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.a, self.b, self.table = nn.Linear(16, 16), nn.Linear(16, 16), nn.Embedding(10, 16)

    def forward(self, x: Tensor) -> Tensor:
        return (self.first if x.ndim == 3 else self.second)(self, x)


def _chain(m, x):
    return m.b(m.a(x))


def _parallel(m, x):
    return torch.relu(m.a(x)) * m.b(x)


def _rows(m, x):
    return m.table(x[..., 0].abs().long()) * 2


ENTRIES = {
    "affine": (fold_affine, _chain, lambda m, x: m.b(torch.relu(m.a(x)))),
    "parallel": (coalesce_parallel, _parallel, lambda m, x: m.a(x)),
    "table": (fold_table, _rows, lambda m, x: m.table(x[..., 0].abs().long())),
}


@pytest.mark.parametrize("kind", ENTRIES)
@pytest.mark.parametrize("alike", [True, False])
def test_weights_that_another_entry_reads_are_stored_once(kind: str, alike: bool) -> None:
    torch.manual_seed(0)
    step, first, second = ENTRIES[kind]
    model = Two(first, first if alike else second).eval()
    inputs = {"wide": [torch.randn(2, 5, 16)], "narrow": [torch.randn(3, 16)]}
    program = capture_entries(model, {name: {"example_inputs": each} for name, each in inputs.items()})
    driver = Driver(program, Samples({name: [each] for name, each in inputs.items()}), verify="full")
    row = driver.run(step)
    assert row.matches == (2 if alike else 0)
    assert row.bytes_after <= row.bytes_before
    assert alike or any("another entry reads" in skip.why for skip in row.skips)
