"""Feature axes: what carries features commutes with linear maps of them, and what mixes them with others does not."""

import pytest
import torch
from torch import nn

from sparc.analysis.features import carried_axis, carries_shift, product_readers
from sparc.capture import capture

SHAPE = (2, 4, 6, 5)


class Function(nn.Module):
    """A function of x as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


CARRIES = {
    "transpose": (lambda x: x.transpose(1, 3), -1),
    "permute": (lambda x: x.permute(3, 0, 2, 1), -2),
    "reshape": (lambda x: x.reshape(8, 6, 5), -2),
    "reshape behind": (lambda x: x.reshape(2, 24, 5), -1),
    "flatten": (lambda x: x.flatten(0, 1), -1),
    "unflatten": (lambda x: x.unflatten(1, (2, 2)), -2),
    "unsqueeze": (lambda x: x.unsqueeze(2).unsqueeze(-1), -1),
    "select": (lambda x: x[:, 1], -2),
    "select behind": (lambda x: x[..., 1], -2),
    "slice and roll": (lambda x: x[:, 1:].roll(1, 2), -1),
    "index": (lambda x: x[torch.tensor([1, 0]), torch.tensor([2, 3])], -1),
    "index_select": (lambda x: x.index_select(1, torch.tensor([2, 2])), -1),
    "mean": (lambda x: x.mean((1, 2)), -1),
    "mean kept": (lambda x: x.mean(2, keepdim=True), -3),
    "sum": (lambda x: x.sum(3), -2),
    "pad": (lambda x: nn.functional.pad(x, (0, 0, 1, 2)), -1),
    "scaled": (lambda x: -(3.0 * x) / 7, -1),
    "masked": (lambda x: x * (torch.arange(6.0) > 2)[:, None].float(), -1),
    "filled": (lambda x: x.masked_fill((torch.arange(6) > 2)[:, None], 0.0), -1),
    "expanded": (lambda x: x[None].expand(3, 2, 4, 6, 5), -4),
    "cast": (lambda x: x.double() / 2, -2),
}
MIXES = {
    "relu": (lambda x: x.relu(), -1),
    "its own mean": (lambda x: x.mean(3), -1),
    "rolled": (lambda x: x.roll(1, 3), -1),
    "cut": (lambda x: x[..., 1:], -1),
    "merged": (lambda x: x.reshape(2, 4, 30), -1),
    "padded": (lambda x: nn.functional.pad(x, (1, 0)), -1),
    "padded with ones": (lambda x: nn.functional.pad(x, (0, 0, 1, 0), value=1.0), -1),
    "factors": (lambda x: x * torch.arange(5.0), -1),
    "squared": (lambda x: x * x, -1),
    "inverted": (lambda x: 2 / x, -1),
    "filled with ones": (lambda x: x.masked_fill((torch.arange(6) > 2)[:, None], 1.0), -1),
    "filled here and there": (lambda x: x.masked_fill(torch.arange(5) > 2, 0.0), -1),
    "selected": (lambda x: x[..., torch.tensor([1, 0])], -1),
}


def followed(function, axis):
    """The program, and the axis of the features in its output; None where an operator does not carry them."""
    program = capture(Function(function), (torch.randn(SHAPE),))
    axes = {program.main.placeholders[0]: axis}
    for node in program.graph.nodes:
        for x in [used for used in node.all_input_nodes if used in axes and axes[used] is not None]:
            if node.op == "call_function":
                axes[node] = carried_axis(program, node, x, axes[x])
    return program, axes.get(program.main.output.args[0][0])


@pytest.mark.parametrize("case", CARRIES)
def test_a_linear_map_of_the_features_commutes(case):
    function, axis = CARRIES[case]
    program, after = followed(function, axis)
    assert after is not None
    torch.manual_seed(0)
    x = torch.randn(SHAPE, dtype=torch.float64)
    mixing = torch.randn(x.shape[axis], x.shape[axis], dtype=torch.float64)

    def mixed(tensor, at):
        return (tensor.movedim(at, -1) @ mixing).movedim(-1, at)

    (first,), (second,) = (program.run_flat([each], wide=True) for each in (mixed(x, axis), x))
    assert torch.allclose(first, mixed(second, after), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", MIXES)
def test_what_mixes_features_with_others_is_no_carrier(case):
    assert followed(*MIXES[case])[1] is None


@pytest.mark.parametrize("case", CARRIES)
def test_a_carried_shift_is_the_same_constant_behind_it(case):
    function, axis = CARRIES[case]
    program, _ = followed(function, axis)
    ones = torch.ones(SHAPE)
    (result,) = program.run_flat([ones])
    if all(carries_shift(node) for node in program.graph.nodes if node.op == "call_function"):
        assert bool((result == 1).all())
    else:
        assert case in ("sum", "pad", "scaled", "masked", "filled", "cast")


class Read(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 3)

    def forward(self, x):
        return self.a(x), self.b(x.mean(1)), x.shape[0] * torch.ones(1)


def test_products_that_read_a_value():
    program = capture(Read(), (torch.randn(2, 5, 6),), dynamic={"x": {0: "batch"}})
    readers = product_readers(program, program.main.placeholders[0])
    assert [node.args[1].target for node in readers.products] == ["a.weight", "b.weight"]
    assert [node.target._opname for node in readers.carriers] == ["mean"]
    assert "read by linear" in product_readers(program, program.main.placeholders[0], -2)
