"""Small models at the edges of what a kernel takes in, compiled for `cuda`."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparc
from sparc.artifact import Artifact
from tests.codegen.triton.compiled import agrees, emission, sites

QUICK = {"verify_kernels": False}  # test_cubin and test_code judge machine code


def check_module(module: nn.Module, *inputs: Tensor, recipe: str = "w4", kernels: int | None = None) -> Artifact:
    """Compile a module in half precision, and compare the artifact with its program on these inputs."""
    artifact = sparc.compile(module.half().eval(), inputs, recipe=recipe, target="cuda:sm_90", options=QUICK)
    agrees(artifact, *inputs)
    assert kernels is None or len(emission(artifact).lowered["forward"].operators) == kernels
    return artifact


class Made(nn.Module):
    """A module from a function, with two linear layers and two convolutions."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.a, self.b = nn.Linear(48, 48), nn.Linear(48, 48)
        self.c, self.d = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=2, dilation=2)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


class Sum(Made):
    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.function(self, x, z)


class Of(Made):
    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


X = torch.randn(5, 48, generator=torch.Generator().manual_seed(0)).half()


def test_the_default_epsilon_is_that_of_float32() -> None:
    check_module(nn.Sequential(nn.RMSNorm(64), nn.Linear(64, 48)), torch.randn(5, 64).half() * 0.003)


@pytest.mark.parametrize("width", [72, 104])
def test_layer_norms_without_gain_before_padded_columns(width: int) -> None:
    layers = nn.Sequential(nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, 48))
    check_module(layers, torch.randn(5, width).half() + 3)


def test_a_sum_of_products_is_one_kernels_epilogue() -> None:
    artifact = check_module(Sum(lambda m, x, z: m.a(x) + m.b(z)), X, X + 1, kernels=2)
    results = sorted(site.result.name for site in sites(artifact).values())
    assert results == ["add", "linear_1"]


def test_products_of_each_other_are_no_pair() -> None:
    check_module(Of(lambda m, x: m.a(x) * m.a(torch.relu(m.a(x)))), X, kernels=2)


def test_convolutions_of_different_windows_are_no_pair() -> None:
    image = torch.randn(1, 8, 9, 9).half()
    check_module(Of(lambda m, x: m.c(x) + m.d(x)), image, recipe="w8", kernels=2)


def test_a_bias_that_is_an_input_is_not_stacked() -> None:
    def function(m: Any, x: Tensor, bias: Tensor) -> Tensor:
        linear = torch.nn.functional.linear
        return torch.cat([linear(x, m.a.weight, bias), linear(x, m.b.weight, bias)])

    check_module(Sum(function), X, torch.randn(48).half(), kernels=2)


def test_infinite_bounds_stay_with_torch() -> None:
    check_module(Of(lambda m, x: m.a(x).clamp(0.0, float("inf"))), X)


def test_not_a_number_passes_through() -> None:
    x = X.clone()
    x[2, 3] = torch.nan
    artifact = check_module(Of(lambda m, x: torch.relu(m.a(x))), X)
    found = artifact.run_flat([x])[0]
    assert found[2].isnan().all()
    assert not found[[0, 1, 3, 4]].isnan().any()
