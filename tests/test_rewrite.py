"""Rewriting: edits, names, reasons, and every way in which a wrong replacement is refused."""

import pytest
import torch
from torch import nn

from sparc.capture import capture, capture_entries
from sparc.contract import Bounded, Exact
from sparc.diag import PassError, VerifyError
from sparc.driver import Driver
from sparc.pass_base import PassContext, Samples
from sparc.rewrite import rewrite


class Model(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.function(self, x)


def run(step, function, verify="full"):
    x = torch.randn(3, 4)
    program = capture(Model(function), (x,))
    driver = Driver(program, Samples({"forward": [[x]]}), verify=verify)
    return driver.run(step), driver.program


@rewrite(lambda op, x, a, b: op.linear(op.linear(x, op.weight(a)), op.weight(b)), contract=Bounded(1e-4))
def fold_products(m):
    """linear(linear(x, A), B) => linear(x, B @ A)."""
    return m.op.linear(m.x, m.constant(m.weight("b") @ m.weight("a"), like="b"))


def names(program):
    return [node.target._opname for node in program.graph.nodes if node.op == "call_function"]


def test_chains_are_rewritten_to_the_end_and_keep_the_users_name():
    row, program = run(fold_products, lambda m, x: m.b(m.a(m.a(x))))
    assert names(program) == ["linear"]
    assert row.measured["region, float64"] < 1e-12
    assert list(program.weights) == ["b.weight"]


def test_an_inner_value_that_is_read_elsewhere_is_a_reason():
    row, _ = run(fold_products, lambda m, x: (lambda y: m.b(y) + y)(m.a(x)))
    assert not row.changed
    assert "also read by" in row.skips[0].why


def test_entries_that_share_a_weight_share_its_replacement():
    model = Model(lambda m, x: m.b(m.a(x)))
    program = capture_entries(
        model, {"one": {"example_inputs": (torch.randn(1, 4),)}, "two": {"example_inputs": (torch.randn(2, 4),)}}
    )
    driver = Driver(program, Samples({"one": [[torch.randn(1, 4)]], "two": [[torch.randn(2, 4)]]}), verify="full")
    driver.run(fold_products)
    assert list(driver.program.weights) == ["b.weight"]


def test_none_is_silent_and_skip_says_why():
    @rewrite(lambda op, x: op.relu(x), contract=Exact())
    def silent(m):
        """relu(x) => relu(x)."""
        return None

    @rewrite(lambda op, x: op.relu(x), contract=Exact())
    def telling(m):
        """relu(x) => relu(x)."""
        m.op.exp(m.x)
        return m.skip("because")

    row, program = run(silent, lambda m, x: x.relu())
    assert (row.changed, row.skips) == (0, [])
    row, program = run(telling, lambda m, x: x.relu())
    assert (row.changed, [skip.why for skip in row.skips]) == (0, ["because"])
    assert names(program) == ["relu"]


def test_a_replacement_of_another_type_is_the_passs_fault():
    @rewrite(lambda op, x: op.relu(x), contract=Exact())
    def retyped(m):
        """relu(x) => sum(x)."""
        return m.op.sum(m.x)

    with pytest.raises(PassError, match="has type"):
        run(retyped, lambda m, x: x.relu())


def test_reserved_names_and_missing_patterns_are_refused_when_written():
    with pytest.raises(TypeError, match="weight"):
        rewrite(lambda op, weight: op.relu(weight), contract=Exact())
    with pytest.raises(TypeError, match="pattern or find"):
        rewrite(contract=Exact())


def test_a_shared_replacement_goes_before_the_first_use():
    @rewrite(lambda op, x: (op.exp(x), op.relu(x)), contract=Exact())
    def both(m):
        """(exp(x), relu(x)) => (exp(x), relu(x))."""
        if m.x.op != "placeholder":
            return None
        doubled = m.op.mul(m.x, 1.0)
        return m.op.exp(doubled), m.op.relu(doubled)

    _, program = run(both, lambda m, x: x.relu().sum() + x.exp().sum())
    program.graph.lint()


def test_results_that_cannot_move_are_left_alone():
    @rewrite(lambda op, x, y: (op.exp(x), op.mul(x, y)), contract=Exact(), single_use=False)
    def entangled(m):
        """(exp(x), x * y) => the same."""
        return m.op.exp(m.x), m.op.mul(m.x, m.y)

    def function(m, x):
        early = x.exp()
        return x * early.relu()

    program = capture(Model(function), (torch.randn(3, 4),))
    context = PassContext()
    entangled.run(program, context)
    assert any("before all inputs" in skip.why for skip in context.skips)


@pytest.mark.parametrize("contract", [Exact(), Bounded(1e-4)])
def test_a_wrong_factor_is_caught_with_the_text_of_the_match(contract):
    @rewrite(lambda op, x: op.relu(x), contract=contract)
    def scaled(m):
        """relu(x) => 1.000001 relu(x)."""
        return m.op.mul(m.op.abs(m.x), 1.000001)

    with pytest.raises(VerifyError, match="before: relu") as caught:
        run(scaled, lambda m, x: x.abs().relu() * 2)
    assert caught.value.code == "SPARC301"
    assert "test_rewrite.py" in str(caught.value)
