import pytest
import torch

from sparc.diag import PassError
from sparc.encoding.base import saturate
from sparc.encoding.dense import Dense
from sparc.encoding.grid import Grid


def test_values_are_a_tensor_of_their_own():
    weight = torch.randn(3, 4)
    parts = Dense().encode(weight, Grid(Dense()))
    decoded = Dense().decode(parts, (3, 4), torch.float32)
    assert torch.equal(decoded, weight)
    assert decoded.data_ptr() != parts["codes"].data_ptr()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_narrow_dtype_rounds_and_saturates(dtype):
    weight = torch.tensor([[1.0001, 3.4e38, -3.4e38, 1e-3]])
    rounded = Dense(dtype).round(weight, Grid(Dense(dtype)))
    expected = weight.clamp(-torch.finfo(getattr(torch, dtype)).max, torch.finfo(getattr(torch, dtype)).max)
    assert torch.equal(rounded, expected.to(getattr(torch, dtype)).float())
    assert bool(torch.isfinite(rounded).all())


@pytest.mark.parametrize("source", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_casts_saturate_between_all_float_types(source, target):
    values = torch.tensor([1.0, -1.0, 0.0], dtype=source) * torch.finfo(source).max
    cast = saturate(values, target)
    assert cast.dtype == target
    assert bool(torch.isfinite(cast).all())
    assert float(cast[0]) == -float(cast[1])


@pytest.mark.parametrize("dtype", ["int8", "float", "torch.float32", "bool", 4])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(PassError) as caught:
        Dense(dtype)
    assert caught.value.code == "SPARC209"
