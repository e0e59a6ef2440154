"""Cleaning: what has no effect goes, bitwise, and what only looks like it stays."""

import pytest
import torch
from torch import nn

from sparc.capture import capture, capture_entries
from sparc.driver import Driver
from sparc.pass_base import PassContext, Samples
from sparc.passes.clean import MergeCommon, RemoveDead, RemoveNoOps
from sparc.passes.constants import FoldConstants
from sparc.testing import assert_pass


class Model(nn.Module):
    def __init__(self, function, **tensors):
        super().__init__()
        self.function = function
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    def forward(self, x):
        return self.function(self, x)


def names(program):
    return [getattr(node.target, "_opname", node.target) for node in program.graph.nodes if node.op == "call_function"]


def cleaned(step, function, x=None, **tensors):
    x = torch.randn(3, 4) if x is None else x
    program = capture(Model(function, **tensors), (x,))
    driver = Driver(program, Samples({"forward": [[x]]}), verify="full")
    driver.run(step)
    return driver.program


OTHER_NAMES = {
    "multiply": (lambda x: torch.multiply(x, x), ["mul"]),
    "divide": (lambda x: torch.divide(torch.true_divide(x, 3), 0.3, rounding_mode="floor"), ["div", "div"]),
    "subtract": (lambda x: torch.subtract(x, torch.negative(x), alpha=2), ["neg", "sub"]),
    "absolute": (lambda x: torch.absolute(x).clip(max=0.5), ["abs", "clamp"]),
    "concatenate": (lambda x: torch.concatenate([x, torch.hstack([x, x])[:, 1:5]]), ["cat", "slice", "cat"]),
    "vstack": (lambda x: torch.vstack([x, x]), ["cat"]),
    "hstack of vectors": (lambda x: torch.hstack([x[0], x[1]]), ["select", "select", "hstack"]),
    "swapaxes": (lambda x: x.swapaxes(0, 1).relu().swapdims(-1, 0), ["transpose", "relu", "transpose"]),
    "movedim": (lambda x: x[None].movedim(0, -1), ["unsqueeze", "permute"]),
    "moveaxis": (lambda x: torch.moveaxis(x[None], (1, 2), (0, -1)), ["unsqueeze", "transpose"]),
    "no move": (lambda x: torch.moveaxis(x, (1, 0), (1, 0)), []),
    "narrow": (lambda x: x.narrow(1, 1, 2), ["slice"]),
    "narrow from the end": (lambda x: torch.cat([x.narrow(1, -2, 2), x.narrow(1, -3, 2)]), ["slice", "slice", "cat"]),
    "whole narrow": (lambda x: x.narrow(1, 0, 4), []),
}


@pytest.mark.parametrize("case", OTHER_NAMES)
def test_other_names_become_one(case):
    function, expected = OTHER_NAMES[case]
    assert names(cleaned(RemoveNoOps(), lambda m, x: function(x))) == expected


NO_EFFECT = {
    "times one": lambda x: (x * 1.0) / 1,
    "power one": lambda x: x**1,
    "minus zero": lambda x: x - 0.0,
    "slice": lambda x: x[:, 0:],
    "expand": lambda x: x.expand(3, 4),
    "permute": lambda x: x.permute(0, 1),
    "two transposes": lambda x: x.t().t(),
    "cast": lambda x: x.to(torch.float32).float().type_as(x),
    "copy": lambda x: x.clone().contiguous().detach(),
    "dropout": lambda x: nn.functional.dropout(x, 0.5, training=False),
    "reshape": lambda x: x.view(12).reshape(3, 4),
    "cat": lambda x: torch.cat([x]),
    "pad": lambda x: nn.functional.pad(x, (0, 0)),
    "one piece": lambda x: x.split(3)[0],
    "repeat": lambda x: x.repeat(1, 1),
}


@pytest.mark.parametrize("case", NO_EFFECT)
def test_what_has_no_effect_goes(case):
    assert names(cleaned(RemoveNoOps(), lambda m, x: NO_EFFECT[case](x).relu())) == ["relu"]


EFFECT = {
    "plus zero turns -0.0 into 0.0": lambda x: x + 0.0,
    "promotion": lambda x: x * torch.ones((), dtype=torch.float64).expand(3, 4),
    "broadcast": lambda x: x[:1] * torch.ones(3, 4),
    "half slice": lambda x: x[:2],
    "reversed": lambda x: x.flip(0),
    "transpose of equal sizes": lambda x: x[:3, :3].t(),
}


@pytest.mark.parametrize("case", EFFECT)
def test_what_only_looks_like_it_stays(case):
    model = Model(lambda m, x: EFFECT[case](x).relu())
    assert len(names(cleaned(RemoveNoOps(), lambda m, x: EFFECT[case](x).relu()))) > 1
    x = -torch.zeros(3, 4)
    program = cleaned(RemoveNoOps(), lambda m, x: EFFECT[case](x).relu(), x)
    assert torch.equal(model(x), program.run(x))


def test_an_integer_plus_zero_goes():
    assert names(cleaned(RemoveNoOps(), lambda m, x: (x + 0).abs(), torch.arange(4))) == ["abs"]


def test_no_output_shares_memory_with_a_weight_or_an_input():
    program = cleaned(RemoveNoOps(), lambda m, x: (m.w.clone(), x * 1.0, x[0:].contiguous().clone()), w=torch.ones(2))
    x = torch.randn(3, 4)
    for output in program.run(x):
        output.zero_()
    assert bool(program.weights["w"].all())
    assert bool(x.any())


def test_a_trainable_one_is_no_number():
    program = cleaned(RemoveNoOps(), lambda m, x: (x * m.gain).relu(), gain=nn.Parameter(torch.ones(1)))
    assert names(program) == ["mul", "relu"]


def test_a_copy_stays_where_strides_are_read():
    function = lambda m, x: torch.view_as_complex(x.t().contiguous()).abs()  # noqa: E731
    assert "contiguous" in names(cleaned(RemoveNoOps(), function, torch.randn(2, 5)))


# constants -----------------------------------------------------------------------------------------------------------
def test_constants_become_one_weight_with_the_origins_of_all():
    a, b = torch.randn(4), torch.randn(4)
    program = cleaned(FoldConstants(), lambda m, x: x * (m.a * m.b + 1).exp(), a=a, b=b)
    assert names(program) == ["mul"]
    (name,) = program.weights
    assert torch.equal(program.weights[name], (a * b + 1).exp())
    assert set(program.weights.record(name).origins) == {"a", "b"}


def test_a_table_larger_than_what_it_replaces_is_not_stored():
    program = cleaned(
        FoldConstants(limit=64), lambda m, x: x + m.w.expand(64, 4), torch.randn(64, 4), w=torch.randn(1, 4)
    )
    assert names(program) == ["expand", "add"]
    program = cleaned(FoldConstants(limit=0), lambda m, x: x @ m.w.t(), w=torch.randn(5, 4))
    assert names(program) == ["matmul"]  # the transposed weight replaces the weight


def test_a_weight_read_elsewhere_pays_for_nothing():
    function = lambda m, x: (x @ m.w.t()) @ m.w  # noqa: E731
    assert "t" in names(cleaned(FoldConstants(limit=0), function, w=torch.randn(5, 4)))


def test_random_numbers_are_no_constants():
    """Capture refuses them, but a pass may meet a program that was made otherwise."""
    program = capture(Model(lambda m, x: x + 1), (torch.randn(3, 4),))
    entry, (add,) = program.main, [node for node in program.graph.nodes if node.op == "call_function"]
    drawn = entry.call(torch.ops.aten.rand.default, [4], before=add)
    add.replace_input_with(add.args[0], entry.call(torch.ops.aten.add.Tensor, add.args[0], drawn, before=add))
    FoldConstants().run(program, PassContext())
    assert "rand" in names(program)


# equal computations --------------------------------------------------------------------------------------------------
def test_equal_calls_are_computed_once():
    program = cleaned(MergeCommon(), lambda m, x: x.exp() + x.exp() * (x * 1.0) + (x * 1))
    assert names(program).count("exp") == 1
    assert names(program).count("mul") == 3  # 1 and 1.0 may promote differently


def test_two_outputs_stay_two_tensors():
    x = torch.randn(3)
    first, second = cleaned(MergeCommon(), lambda m, x: (x.exp(), x.exp()), x).run(x)
    first.zero_()
    assert bool(second.all())


def test_equal_tables_are_stored_once_under_both_names():
    table = torch.randn(6, 4)
    function = lambda m, x: x @ m.a.t() + x @ m.b.t()  # noqa: E731
    program = cleaned(MergeCommon(), function, a=table, b=table.clone())
    assert list(program.weights) == ["a"]
    assert program.weights.aliases == {"b": "a"}
    assert program.weights.record("a").origins == ("a", "b")


def test_zeros_of_another_sign_and_equal_gains_stay_apart():
    program = cleaned(MergeCommon(), lambda m, x: x / m.a + x / m.b, a=torch.zeros(4), b=-torch.zeros(4))
    assert len(program.weights) == 2
    gains = {name: nn.Parameter(torch.ones(4)) for name in ("a", "b")}
    assert len(cleaned(MergeCommon(), lambda m, x: x * m.a + x.exp() * m.b, **gains).weights) == 2


def test_dead_code_goes():
    program = capture(Model(lambda m, x: x.exp(), w=torch.ones(2)), (torch.randn(3),))
    with program.graph.inserting_before(program.main.output):
        program.main.call(torch.ops.aten.relu.default, program.main.placeholders[0])
    Driver(program, Samples({"forward": [[torch.randn(3)]]})).run(RemoveDead())
    cleaned_program = program.clone()
    cleaned_program.sweep()
    assert names(cleaned_program) == ["exp"]


# all -----------------------------------------------------------------------------------------------------------------
def busy(m, x):
    y = (x.view(x.shape[0], 4) * 1.0)[:, 0:] @ (m.w * 2).t()
    return (y.exp() + y.exp()).contiguous() + torch.arange(5) * 1


@pytest.mark.parametrize("step", [RemoveNoOps(), FoldConstants(), MergeCommon()], ids=lambda step: step.name)
def test_the_contract_kit(step):
    assert_pass(step, Model(busy, w=torch.randn(5, 4)), (torch.randn(3, 4),), dynamic={"x": {0: "batch"}})


@pytest.mark.parametrize("step", [RemoveNoOps(), FoldConstants(), MergeCommon()], ids=lambda step: step.name)
def test_every_entry_is_cleaned_and_weights_stay_shared(step):
    model = Model(busy, w=torch.randn(5, 4))
    inputs = {"one": torch.randn(1, 4), "many": torch.randn(6, 4)}
    program = capture_entries(model, {name: {"example_inputs": (x,)} for name, x in inputs.items()})
    driver = Driver(program, Samples({name: [[x]] for name, x in inputs.items()}), verify="full")
    assert driver.run(step).changed
    counts = {name: len(entry.graph.nodes) for name, entry in driver.program.entries.items()}
    assert counts["one"] == counts["many"]
    assert "w" in driver.program.weights
    assert sum(tensor.ndim == 2 for tensor in driver.program.weights.values()) == 1
    for name, x in inputs.items():
        assert torch.equal(driver.program.run(x, entry=name), model(x))
