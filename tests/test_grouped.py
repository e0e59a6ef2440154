"""`sparc::grouped_linear`: what it means, its derivative, and what it refuses."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sparc import grouped

ENDS = {
    "every run has rows": [2, 5, 9],
    "a run without rows": [4, 4, 9],
    "one run has all rows": [0, 9, 9],
    "rows behind the last run": [1, 3, 6],
}


def operands(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator, dtype=dtype) for shape in ((9, 5), (3, 4, 5)))  # type: ignore[return-value]


@pytest.mark.parametrize("case", ENDS)
def test_each_row_meets_the_matrix_of_its_run(case: str) -> None:
    x, weight = operands()
    result = torch.ops.sparc.grouped_linear(x, weight, torch.tensor(ENDS[case], dtype=torch.int32))
    for row in range(9):
        run = next((index for index, end in enumerate(ENDS[case]) if row < end), None)
        expected = torch.zeros(4).double() if run is None else (weight[run] * x[row]).sum(-1)
        assert torch.allclose(result[row], expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("case", ENDS)
def test_the_kernel_of_torch_means_the_same(case: str) -> None:
    x, weight = torch.randn(9, 16), torch.randn(3, 8, 16)
    ends = torch.tensor(ENDS[case])
    assert torch.allclose(grouped.at_once(x, weight, ends), torch.ops.sparc.grouped_linear(x, weight, ends), atol=1e-5)


@pytest.mark.parametrize("case", ENDS)
def test_its_derivative(case: str) -> None:
    ends = torch.tensor(ENDS[case])
    given = [each.requires_grad_() for each in operands()]
    assert torch.autograd.gradcheck(lambda x, weight: torch.ops.sparc.grouped_linear(x, weight, ends), given)


def test_its_type_is_known_without_values() -> None:
    with FakeTensorMode():
        result = torch.ops.sparc.grouped_linear(
            torch.empty(9, 5, dtype=torch.bfloat16), torch.empty(3, 4, 5, dtype=torch.bfloat16), torch.empty(3).int()
        )
    assert result.shape == (9, 4)
    assert result.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("x", "weight", "ends", "why"),
    [
        ((9, 5, 1), (3, 4, 5), 3, "ranks"),
        ((9, 4), (3, 4, 5), 3, "last axis"),
        ((9, 5), (3, 4, 5), 2, "one end"),
    ],
)
def test_shapes_that_do_not_fit(x: tuple[int, ...], weight: tuple[int, ...], ends: int, why: str) -> None:
    with FakeTensorMode(), pytest.raises(RuntimeError, match=why):
        torch.ops.sparc.grouped_linear(torch.empty(x), torch.empty(weight), torch.empty(ends).int())
