"""In-place operators of a captured model become functional ones, through every kind of view."""

import pytest
import torch
from torch import nn

from sparc.capture import capture
from sparc.diag import CaptureError
from sparc.functional import is_mutable


class Write(nn.Module):
    """Runs a function that writes to a fresh value."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x * 2)


def fresh_and_read(y):
    z = y + 1
    y.add_(3)
    return y, z


def read_before_and_after(y):
    before = y.sum()
    y.mul_(2).relu_()
    return before, y.sum()


def through_slices(y):
    y[1:, :2] = 5.0
    y[:, 0].add_(1)
    return y


def view_read_later(y):
    row, flat = y[0], y.view(-1)
    y.add_(1)
    row.mul_(3)
    return y, row, flat


def through_transpose(y):
    y.t()[1:].zero_()
    y.permute(1, 0).unsqueeze(0)[0, 0].fill_(7)
    return y


def through_split(y):
    a, b = y.split(2, dim=1)
    b.neg_()
    first = y.unbind(0)[0]
    first.exp_()
    return y, a, b


def through_reshape(y):
    y.reshape(2, -1)[1].copy_(torch.arange(y.numel() // 2))
    return y


def copied_by_reshape(y):
    other = y.t().reshape(-1)
    other.add_(1)
    return y, other


def indexed(y):
    y[torch.tensor([0, 2])] = y[torch.tensor([1, 3])] + 1
    y.masked_fill_(y > 1, 0.5)
    return y


def logic(y):
    mask = y > 0
    mask |= y < -1
    mask &= ~torch.eye(4, dtype=torch.bool)
    return mask


def diagonal(y):
    y.diagonal().fill_(0)
    return y


def two_writes_through_one_view(y):
    part = y[:2]
    part.add_(1)
    part.mul_(y[2:])
    return y.sum(0), part


def through_one_view_in_turn(y):
    same = y.type_as(y)
    same[1:] += 1
    same[:, 0] *= 2
    y[0] += 3
    same[2:].view_as(same[2:]).sub_(y[:2])
    return same, y


CASES = [
    fresh_and_read, read_before_and_after, through_slices, view_read_later, through_transpose, through_split,
    through_reshape, copied_by_reshape, indexed, logic, diagonal, two_writes_through_one_view,
    through_one_view_in_turn,
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_equal_to_the_model(case):
    model, x = Write(case), torch.randn(4, 4)
    program = capture(model, (x,))
    assert not any(is_mutable(node) for node in program.graph.nodes)
    expected, got = model(x), program.run(x)
    for a, b in zip(
        expected if isinstance(expected, tuple) else (expected,), got if isinstance(got, tuple) else (got,), strict=True
    ):
        assert torch.equal(a, b)


def test_dynamic_sizes():
    model = Write(lambda y: y[:, 1:].mul_(2).sum() + y.view(-1)[0])
    program = capture(model, (torch.randn(4, 5),), dynamic={"x": {0: "rows", 1: "columns"}})
    x = torch.randn(7, 3)
    assert torch.equal(model(x), program.run(x))


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(3))

    def forward(self, x):
        self.count.add_(1)
        return x + self.count


class WritesInput(nn.Module):
    def forward(self, x):
        x[0] = 1.0
        return x * 2


@pytest.mark.parametrize("model", [Counter(), WritesInput()], ids=["buffer", "input"])
def test_a_model_that_writes_to_its_state_is_refused_with_its_line(model):
    with pytest.raises(CaptureError) as caught:
        capture(model, (torch.randn(3, 3),))
    assert caught.value.code == "SPARC105"
    assert "test_functional.py" in str(caught.value)
