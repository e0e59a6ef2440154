"""Calibration: one block's boundary in memory, statistics behind compressed blocks, several entries, odd data."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import sparc.calibration
from sparc.calibration import Calibration
from sparc.capture import capture, merge
from sparc.observers import KINDS, Histogram, Range, Rows, observer
from sparc.program import Program

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x)) + 1


class Stack(nn.Module):
    def __init__(self, depth: int = 4, width: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(width, width, bias=False)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.last = nn.Linear(width, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


def stack(depth: int = 4) -> tuple[Program, list[list[Tensor]]]:
    torch.manual_seed(0)
    program = capture(Stack(depth), (torch.randn(2, 3),))
    return program, [[torch.randn(2, 3)] for _ in range(3)]


def products(program: Program) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.target is torch.ops.aten.linear.default]


def inputs_of(program: Program) -> list[fx.Node]:
    return [node.args[0] for node in products(program)]  # type: ignore[misc]


def seen_in_a_whole_run(program: Program, batches: list[list[Tensor]], names: list[str]) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(node: fx.Node, value: Tensor, _: object) -> None:
        if node.name in found:
            found[node.name].append(value)

    for tensors in batches:
        program.run_flat(tensors, watch=keep)
    return {name: torch.cat(values) for name, values in found.items()}


def test_blocks_are_what_is_before_each_layer_and_after() -> None:
    program, batches = stack()
    assert list(Calibration(program, {"forward": batches}).blocks) == [0, 1, 2, 3, 4, 5]
    assert [node.meta["block"] for node in products(program)] == [0, 1, 2, 3, 4, 5]


def test_statistics_are_those_of_a_whole_run() -> None:
    program, batches = stack()
    nodes = inputs_of(program)
    expected = seen_in_a_whole_run(program, batches, [node.name for node in nodes])
    statistics = Calibration(program, {"forward": batches}).gather_all((node, "range") for node in nodes)
    for node in nodes:
        low, high = statistics(node, "range")
        assert (low, high) == (float(expected[node.name].min()), float(expected[node.name].max()))


def test_later_blocks_see_what_earlier_ones_became() -> None:
    program, batches = stack()
    calibration = Calibration(program, {"forward": batches})
    weights = [str(node.args[1].target) for node in products(program)]  # type: ignore[union-attr]
    found = []
    for block, node in enumerate(inputs_of(program)):
        found.append(calibration.gather(block, [(node, "batches")])(node, "batches"))
        program.set_weight(weights[block], program.weights[weights[block]] * 2)
        calibration.advance(block)
    names = [node.name for node in inputs_of(program)]
    expected = seen_in_a_whole_run(program, batches, names)
    for name, values in zip(names, found, strict=True):
        assert torch.equal(torch.cat(values), expected[name])


def test_only_the_boundary_and_the_inputs_are_kept() -> None:
    program, batches = stack(8)
    calibration = Calibration(program, {"forward": batches})
    for block in list(calibration.blocks)[:-1]:
        calibration.gather(block, [])
        calibration.advance(block)
        assert all(len(live) == 2 for live in calibration._live["forward"])


def test_values_are_freed_after_their_last_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model without numbered blocks is one block: even there no more than a few values are alive at once."""

    class Chain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(20):
                x = torch.relu(x) + 1
            return x

    program = capture(Chain(), (torch.randn(2, 3),))
    most = 0
    original = sparc.calibration.run_node

    def counting(node: fx.Node, env: dict[fx.Node, object], weights: object) -> object:
        nonlocal most
        most = max(most, len(env))
        return original(node, env, weights)  # type: ignore[arg-type]

    monkeypatch.setattr(sparc.calibration, "run_node", counting)
    calibration = Calibration(program, {"forward": [[torch.randn(2, 3)]]})
    assert list(calibration.blocks) == [0]
    calibration.gather(0, [(program.main.output.args[0][0], "range")])  # type: ignore[index, list-item]
    assert 1 <= most <= 2


def test_nodes_that_a_pass_inserts_into_an_earlier_block_are_found() -> None:
    program, batches = stack()
    calibration = Calibration(program, {"forward": batches})
    calibration.advance(0)
    second, third = products(program)[1:3]
    x = second.args[0]
    assert isinstance(x, fx.Node)
    doubled = program.main.call(torch.ops.aten.mul.Tensor, x, 2.0, before=third, like=x)
    third.args = (program.main.call(torch.ops.aten.add.Tensor, third.args[0], doubled, before=third), third.args[1])
    calibration.advance(1)
    found = calibration.gather(2, [(third, "batches")])(third, "batches")
    assert torch.equal(torch.cat(found), seen_in_a_whole_run(program, batches, [third.name])[third.name])


def test_only_entries_with_data_are_run() -> None:
    torch.manual_seed(0)
    model = Stack()
    programs = [capture(model, (torch.randn(size, 3),), entry=name) for size, name in ((2, "one"), (5, "two"))]
    program = merge(programs)
    calibration = Calibration(program, {"two": [[torch.randn(5, 3)]]})
    one, two = (
        next(node for node in program.entries[name].graph.nodes if "linear" in node.name) for name in ("one", "two")
    )
    one.name, two.name = "only_in_one", "only_in_two"
    statistics = calibration.gather(0, [(one, "range"), (two, "range")])
    assert statistics(one, "range") is None
    assert statistics(two, "range") is not None


@pytest.mark.parametrize("everything", [False, True])
def test_nodes_of_equal_names_in_two_entries_have_statistics_of_their_own(everything: bool) -> None:
    model = Stack()
    program = merge([capture(model, (torch.randn(2, 3),), entry=name) for name in ("one", "two")])
    first, second = (program.entries[name].placeholders[0] for name in ("one", "two"))
    assert first.name == second.name
    calibration = Calibration(program, {"one": [[torch.full((2, 3), 1.0)]], "two": [[torch.full((2, 3), 2.0)]]})
    watches = [(first, "range"), (second, "range")]
    statistics = calibration.gather_all(watches) if everything else calibration.gather(0, watches)
    assert (statistics(first, "range"), statistics(second, "range")) == ((1.0, 1.0), (2.0, 2.0))


def test_no_data_gives_no_statistics() -> None:
    program, _ = stack()
    calibration = Calibration(program, {"forward": []})
    node = products(program)[0]
    assert calibration.gather(0, [(node, "histogram")])(node, "histogram") is None
    calibration.advance(0)


def test_nothing_is_printed_when_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    program, batches = stack()
    calibration = Calibration(program, {"forward": batches})
    for block in calibration.blocks:
        calibration.advance(block)
    assert capsys.readouterr() == ("", "")


# observers ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_empty_tensors_are_not_seen(kind: str) -> None:
    chosen = observer(kind)
    chosen.update(torch.empty(0, 4), 0)
    assert not chosen.seen
    chosen.update(torch.ones(2, 4), 0)
    assert chosen.seen


def test_infinities_and_nan_count_as_zeros() -> None:
    value = torch.tensor([[1.0, -math.inf], [math.nan, 3.0]])
    for kind, expected in (("range", (0.0, 3.0)), ("absmax", [1.0, 3.0])):
        chosen = observer(kind)
        chosen.update(value, 0)
        result = chosen.result()
        assert (result.tolist() if isinstance(result, Tensor) else result) == expected
    histogram = Histogram()
    histogram.update(value, 0)
    assert histogram.result().counts.sum() == 4


def test_range_by_hand() -> None:
    chosen = Range()
    for values in ([1.0, 2.0], [-3.0, 0.5]):
        chosen.update(torch.tensor(values), 0)
    assert chosen.result() == (-3.0, 2.0)


def test_channel_axis() -> None:
    chosen = observer("absmax:1")
    chosen.update(torch.tensor([[[1.0, -5.0], [2.0, 0.0]]]), 0)
    assert chosen.result().tolist() == [5.0, 2.0]


def test_moments_by_hand() -> None:
    chosen = observer("moments")
    chosen.update(torch.tensor([[1.0, 0.0]]), 0)
    chosen.update(torch.tensor([[3.0, 2.0]]), 0)
    assert chosen.result().tolist() == [[2.0, 1.0], [5.0, 2.0]]


def test_histogram_widens_and_loses_nothing() -> None:
    chosen = Histogram()
    chosen.update(torch.tensor([0.0, 1.0, 0.5]), 0)
    chosen.update(torch.tensor([-3.0, 6.5]), 1)
    counts, low, high, least, greatest = chosen.result()
    width = 2.0**-8  # 9.5 in 4096 bins: 2^-9 is too narrow
    assert (low, high, least, greatest) == (-3.0, 6.5 + width, -3.0, 6.5)
    assert counts.nonzero().flatten().tolist() == [int((value + 3) / width) for value in (-3.0, 0.0, 0.5, 1.0, 6.5)]
    assert counts.sum() == 5


@given(
    st.lists(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1), min_size=2), st.data()
)
@settings(max_examples=30, deadline=None)
def test_a_histogram_is_the_same_in_any_order(batches: list[list[float]], data: st.DataObject) -> None:
    def counted(order: list[int]) -> Histogram:
        found = Histogram()
        for index in order:
            found.update(torch.tensor(batches[index]), index)
        return found

    numbers = list(range(len(batches)))
    whole = counted(numbers)
    other = counted(data.draw(st.permutations(numbers)))
    cut = data.draw(st.integers(1, len(batches) - 1))
    joined = counted(numbers[cut:])
    joined.absorb(counted(numbers[:cut]).state())
    for found in (other, joined):
        assert torch.equal(found.result().counts, whole.result().counts)
        assert found.result()[1:] == whole.result()[1:]


def test_histogram_of_a_constant_then_of_something_else() -> None:
    chosen = Histogram()
    chosen.update(torch.full((10,), 100.0), 0)
    chosen.update(torch.tensor([-50.0, 200.0]), 1)
    assert chosen.result().counts.sum() == 12


def test_extremes_of_a_large_batch_are_exact() -> None:
    value = torch.zeros(2**19 + 7)
    value[12345], value[-3] = -2.0, 5.0
    chosen = Histogram()
    chosen.update(value, 0)
    assert chosen.result()[3:] == (-2.0, 5.0)


def test_rows_stay_few() -> None:
    chosen = Rows()
    for index in range(100):
        chosen.update(torch.full((200, 2), float(index)), index)
    assert sum(len(part) for part in chosen.kept.values()) <= 2048
    rows = chosen.result()
    assert rows.shape[0] <= 512
    assert rows[0, 0] == 0
    assert rows[-1, 0] > 90


def test_outputs_are_not_kept() -> None:
    program, batches = stack()
    calibration = Calibration(program, {"forward": batches})
    for block in calibration.blocks:
        calibration.advance(block)
    inputs = {node.name for node in program.main.placeholders}
    assert [set(kept) - inputs for kept in calibration._live["forward"]] == [set()] * len(batches)
