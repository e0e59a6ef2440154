"""Capture: what is taken over exactly, and every refusal with the user's own line."""

import pytest
import torch
from torch import nn

from sparc.capture import capture
from sparc.diag import ArtifactError, CaptureError, Diagnostics
from tests.architectures import ARCHITECTURES


class Model(nn.Module):
    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x, y=None, flag=True):
        return self.function(self, x, y) if flag else x


def refused(model, inputs, **options):
    with pytest.raises(CaptureError) as caught:
        capture(model, inputs, **options)
    return caught.value.code, str(caught.value)


X = torch.randn(3, 4)


def test_control_flow_on_values_names_the_line():
    def function(m, x, y):
        if x.sum() > 0:
            return x
        return -x

    code, text = refused(Model(function), (X,))
    assert code == "SPARC101"
    assert "test_capture.py" in text
    assert "if x.sum() > 0" in text


def test_a_model_that_fails_by_itself():
    code, text = refused(Model(lambda m, x, y: x @ x), (X,))
    assert code == "SPARC103"
    assert "test_capture.py" in text


@pytest.mark.parametrize("inputs", [(), {}, {"z": X}, (X, X, True, 5), "text", (object(),)])
def test_wrong_example_inputs(inputs):
    assert refused(Model(lambda m, x, y: x.relu()), inputs)[0] == "SPARC102"


def test_no_module():
    assert refused(lambda x: x, (X,))[0] == "SPARC102"


@pytest.mark.parametrize(
    ("dynamic", "text"),
    [({"z": {0: "batch"}}, "'z'"), ({"x": {5: "batch"}}, "no dimension 5"), ({"x": {0: "a b"}}, "no identifier")],
)
def test_dynamic_dimensions_that_do_not_exist(dynamic, text):
    code, message = refused(Model(lambda m, x, y: x.relu()), (X,), dynamic=dynamic)
    assert code == "SPARC104"
    assert text in message


def test_a_dimension_that_the_model_fixes():
    model = Model(lambda m, x, y: x + torch.ones(3, 4))
    assert refused(model, (X,), dynamic={"x": {0: "batch"}})[0] == "SPARC104"


def test_a_narrower_range_is_a_remark():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(16, 4))

        def forward(self, x):
            return x + self.table[: x.shape[0]]

    diagnostics = Diagnostics()
    model = Positions()
    program = capture(model, (X,), dynamic={"x": {0: "seq"}}, diagnostics=diagnostics)
    assert torch.equal(program.run(torch.ones(16, 4)), model(torch.ones(16, 4)))
    assert any(each.code.id == "SPARC107" and "at most 16" in each.what for each in diagnostics)


def test_guards_without_a_suggestion_narrow_the_range():
    diagnostics = Diagnostics()
    built = ARCHITECTURES["gpt_neo"].build()
    capture(built.model, dict(built.inputs), dynamic=built.dynamic, diagnostics=diagnostics)
    assert any(each.code.id == "SPARC107" and "'seq'" in each.what for each in diagnostics)


def test_weights_that_are_not_finite():
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
    code, text = refused(Model(lambda m, x, y: m.layer(x), layer=layer), (X,))
    assert code == "SPARC106"
    assert "layer.weight" in text


def test_an_example_of_size_one_still_varies():
    """Sharp edge: size-1 examples specialise a dynamic dimension."""
    diagnostics = Diagnostics()
    model = Model(lambda m, x, y: x.relu())
    program = capture(model, (X[:1],), dynamic={"x": {0: "batch"}}, diagnostics=diagnostics)
    assert program.run(torch.randn(7, 4)).shape == (7, 4)
    assert any(each.code.id == "SPARC108" for each in diagnostics)


def test_tied_weights_are_one_weight_under_both_names():
    """Sharp edge: tied weights may be two placeholders over one storage, or one placeholder."""
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    program = capture(Model(lambda m, x, y: m.b(m.a(x)), a=first, b=second), (X,))
    assert len(program.weights) == 1
    (name,) = program.weights
    assert {name, *program.weights.aliases} == {"a.weight", "b.weight"}


def test_nested_inputs_and_outputs():
    model = Model(lambda m, x, y: {"sum": x + y["a"][0], "pair": (y["b"], [x, 3])})
    inputs = {"x": X, "y": {"a": [X], "b": X * 2}}
    program = capture(model, inputs)
    got = program.run(**inputs)
    assert torch.equal(got["sum"], X * 2)
    assert got["pair"][1][1] == 3
    assert program.main.signature.input_names == ["x", "y.a.0", "y.b"]


def test_output_classes_come_back():
    built = ARCHITECTURES["bert"].build()
    program = capture(built.model, dict(built.inputs), dynamic=built.dynamic)
    got, expected = program.run(**built.inputs), built.model(**built.inputs)
    assert type(got) is type(expected)
    torch.testing.assert_close(got.last_hidden_state, expected.last_hidden_state)


def test_values_that_are_no_tensors_are_frozen():
    program = capture(Model(lambda m, x, y: x.relu()), {"x": X, "flag": False})
    assert torch.equal(program.run(X, flag=False), X)
    with pytest.raises(ArtifactError, match="frozen"):
        program.run(X, flag=True)


def test_training_flags_are_restored_and_dropout_is_off():
    model = Model(lambda m, x, y: m.drop(x), drop=nn.Dropout(0.5)).train()
    program = capture(model, (X,))
    assert model.training
    assert model.drop.training
    assert torch.equal(program.run(X), X)


def test_random_numbers_are_refused_with_their_line():
    code, text = refused(Model(lambda m, x, y: x + torch.randn_like(x)), (X,))
    assert code == "SPARC111"
    assert "randn" in text
    assert "test_capture.py" in text
    capture(Model(lambda m, x, y: (x, torch.rand(3))[0]), (X,))
    attention = torch.nn.functional.scaled_dot_product_attention
    capture(Model(lambda m, x, y: attention(x[None], x[None], x[None])), (X,))


def test_an_output_of_unknown_structure_is_refused():
    code, text = refused(Model(lambda m, x, y: {"x": x, "cache": Model(None)}), (X,))
    assert code == "SPARC109"
    assert "returns a Model" in text


def test_a_range_that_torch_keeps_refusing_is_refused_at_once():
    def function(m, x, y):  # false only where the size is 1, which torch cannot prove to be excluded
        n = x.shape[0]
        return x * 2 if (2 * n - 1) % n != 0 else x

    code, text = refused(Model(function), {"x": X}, dynamic={"x": {0: "rows"}})
    assert code == "SPARC104"
    assert "cannot prove" in text


def test_torch_prints_nothing_when_it_refuses(capfd):
    refused(Model(lambda m, x, y: x.view(int(x.sum().item()), -1)), (X,))
    printed = capfd.readouterr()
    assert not printed.out
    assert not printed.err


def test_keyword_inputs_that_kwargs_takes():
    class Keywords(nn.Module):
        def forward(self, x, **kwargs):
            return x * kwargs["scale"] if kwargs["on"] else x

    model = Keywords()
    program = capture(model, {"x": X, "scale": X, "on": True}, dynamic={name: {0: "batch"} for name in ("x", "scale")})
    assert torch.equal(program.run(x=X[:2], scale=X[:2], on=True), X[:2] * X[:2])
    assert "forward" not in model.__dict__


def test_a_place_says_module_type_and_line_without_a_machine_path():
    program = capture(Model(lambda m, x, y: m.layer(x), layer=nn.Linear(4, 4)), (X,))
    node = next(node for node in program.graph.nodes if node.op == "call_function")
    assert (node.meta["module"], node.meta["type"]) == ("layer", "Linear")
    assert not any(str(value).startswith("/") for value in node.meta.values())
