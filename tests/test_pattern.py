"""Patterns: what they match, in which order, and what they leave alone."""

import torch
from torch import nn

from sparc.capture import capture
from sparc.pattern import match, trace


class Model(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return self.function(x, self.w)


def found(pattern, function):
    """What the pattern binds at the last node where it matches."""
    program = capture(Model(function), (torch.randn(2, 4),))
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    matches = [match(trace(pattern), node) for node in calls]
    return next((each for each in reversed(matches) if each is not None), None)


def test_variables_bind_nodes_and_numbers():
    bound = found(lambda op, x, n: op.mul(op.relu(x), n), lambda x, w: x.relu() * 3.0)
    assert bound.values["n"] == 3.0
    assert bound.values["x"].op == "placeholder"
    assert bound.roots == (bound.nodes[-1],)


def test_add_and_mul_match_in_either_order():
    pattern = lambda op, x: op.add(op.relu(x), op.exp(x))  # noqa: E731
    assert found(pattern, lambda x, w: x.exp() + x.relu()) is not None
    assert found(lambda op, x: op.sub(op.relu(x), op.exp(x)), lambda x, w: x.exp() - x.relu()) is None


def test_a_value_used_twice_must_be_the_same():
    pattern = lambda op, x: op.mul(x, op.sigmoid(x))  # noqa: E731
    assert found(pattern, lambda x, w: x * x.sigmoid()) is not None
    assert found(pattern, lambda x, w: x * (x + 1).sigmoid()) is None


def test_arguments_left_out_must_have_their_defaults():
    pattern = lambda op, x: op.gelu(x)  # noqa: E731
    assert found(pattern, lambda x, w: nn.functional.gelu(x)) is not None
    assert found(pattern, lambda x, w: nn.functional.gelu(x, approximate="tanh")) is None
    assert found(lambda op, x, y: op.add(x, y), lambda x, w: torch.add(x, x.exp(), alpha=2)) is None


def test_optional_variables_match_absent_arguments():
    with_bias = lambda op, x, w, b=None: op.linear(x, w, b)  # noqa: E731
    needs_bias = lambda op, x, w, b: op.linear(x, w, b)  # noqa: E731
    assert found(with_bias, lambda x, w: nn.functional.linear(x, w)).values["b"] is None
    assert found(needs_bias, lambda x, w: nn.functional.linear(x, w)) is None
    assert found(needs_bias, lambda x, w: nn.functional.linear(x, w, w[0])) is not None


def test_either_weight_such_and_any():
    pattern = lambda op, x, w: op.either(op.mm(x, op.weight(w)), op.matmul(x, op.weight(w)))  # noqa: E731
    assert found(pattern, lambda x, w: x @ w) is not None
    assert found(pattern, lambda x, w: x @ (w + 1)) is None
    assert (
        found(lambda op, x: op.sum(op.such(x, lambda node: node.op == "placeholder")), lambda x, w: x.sum()) is not None
    )
    assert found(lambda op, x: op.transpose(x, op.any(), op.any()), lambda x, w: x.transpose(0, 1)) is not None


def test_numbers_are_compared_as_numbers_but_not_with_flags():
    assert found(lambda op, x: op.pow(x, 2), lambda x, w: x**2.0) is not None
    assert found(lambda op, x: op.pow(x, 2), lambda x, w: x**2.0001) is None
    assert found(lambda op, x: op.mean(x, [-1], True), lambda x, w: x.mean(-1, keepdim=True)) is not None
    assert found(lambda op, x: op.mean(x, [-1], True), lambda x, w: x.mean(-1)) is None


def test_several_results_are_searched_among_users():
    pattern = lambda op, x, a, b: (op.mm(x, op.weight(a)), op.exp(x))  # noqa: E731
    assert (
        found(lambda op, x: (op.relu(x), op.exp(x)), lambda x, w: x.relu() + x.exp()).roots[1].target._opname == "exp"
    )
    assert found(lambda op, x: (op.relu(x), op.exp(x)), lambda x, w: x.relu() + (x + 1).exp()) is None
    assert found(pattern, lambda x, w: x.relu()) is None
