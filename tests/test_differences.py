"""Differences: the smallest tolerance that passes, percentiles, and layers matched by name."""

import math
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from sparc.capture import capture
from sparc.diag import ArtifactError
from sparc.differences import check_same_inputs, difference, layer_differences, output_differences, worst_first
from sparc.program import Program


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu().reshape(-1, 4))


@cache
def program() -> Program:
    torch.manual_seed(0)
    return capture(Two(), (torch.ones(2, 4),))


def test_the_smallest_tolerance_is_what_allclose_accepts() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(1000, generator=generator)
    b = a + 0.01 * torch.randn(1000, generator=generator)
    found = difference("y", a, b)
    assert torch.allclose(b.double(), a.double(), rtol=found.tolerance * 1.0001, atol=found.tolerance * 1.0001)
    assert not torch.allclose(b.double(), a.double(), rtol=found.tolerance * 0.9999, atol=found.tolerance * 0.9999)
    error = (b.double() - a.double()).abs() / (1 + a.double().abs())
    assert int((error <= found.p90).sum()) == 900
    assert int((error <= found.p99).sum()) == 990


def test_equal_tensors_need_no_tolerance_even_where_they_are_infinite() -> None:
    a = torch.tensor([1.0, math.inf, -math.inf, math.nan])
    found = difference("y", a, a.clone())
    assert (found.tolerance, found.p99, found.p90) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("other", [torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.inf]), torch.tensor([1.0])])
def test_no_tolerance_accepts_nan_infinity_or_another_shape(other: Tensor) -> None:
    assert difference("y", torch.tensor([1.0, 2.0]), other).tolerance == math.inf


def test_empty_and_integer_tensors() -> None:
    assert difference("y", torch.zeros(0), torch.zeros(0)).tolerance == 0
    assert difference("y", torch.tensor([1, 3]), torch.tensor([1, 5])).tolerance == 0.5


def test_layers_are_matched_and_the_changed_one_is_the_worst() -> None:
    changed = program().clone()
    changed.set_weight("second.weight", changed.weights["second.weight"] + 1)
    found = layer_differences(program(), changed, [torch.ones(2, 4)])
    assert {each.module for each in found} == {"first", "second", ""}
    worst = worst_first(found)[0]
    assert (worst.module, worst.operator) == ("second", "linear")
    assert "test_differences.py" in worst.source
    assert [each.tolerance for each in found if each.module == "first"] == [0.0]


def test_moving_data_is_no_layer() -> None:
    found = layer_differences(program(), program(), [torch.ones(2, 4)])
    assert sorted(each.operator for each in found) == ["linear", "linear", "relu"]


def test_outputs_have_names() -> None:
    inputs = [torch.ones(2, 4)]
    found = output_differences(["y"], program().run_flat(inputs), program().run_flat(inputs))
    assert [(each.name, each.tolerance) for each in found] == [("y", 0.0)]


def test_models_of_other_inputs_are_refused() -> None:
    other = capture(nn.Linear(4, 4), (torch.ones(2, 4),))
    with pytest.raises(ArtifactError) as caught:
        check_same_inputs(program().main.signature, other.main.signature)
    assert caught.value.code == "SPARC506"
