"""Half-precision models behind every recipe, in ONNX Runtime on the CPU."""

import pytest
import torch
from torch import nn

import sparc
from sparc.diag import LoweringError
from tests.passes.models import Tied


def model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 8, bias=False)).to(dtype).eval()


@pytest.mark.parametrize("target", ["onnx", "onnx:portable"])
@pytest.mark.parametrize("recipe", ["w8", "w4", "w8a8", "w8a8-static", "sparse24-w8"])
def test_float16_compiles_and_runs(recipe: str, target: str) -> None:
    network, x = model(torch.float16), torch.randn(4, 64).half()
    artifact = sparc.compile(network, (x,), recipe=recipe, target=target, data=[(x,)] * 2, measure=False)
    got, own = artifact(x), artifact.program.run(x)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got, own, rtol=0, atol=4e-3 * float(own.detach().abs().max()))


@pytest.mark.parametrize("target", ["onnx", "onnx:portable"])
@pytest.mark.parametrize("recipe", ["w8", "w4", "w8a8"])
def test_a_tied_head_of_float16_shares_its_codes(recipe: str, target: str) -> None:
    torch.manual_seed(0)
    network, ids = Tied().half().eval(), torch.randint(0, 40, (2, 8))
    artifact = sparc.compile(network, (ids,), recipe=recipe, target=target, data=[(ids,)] * 2, measure=False)
    got, own = artifact(ids), artifact.program.run(ids)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got, own, rtol=0, atol=4e-3 * float(own.detach().abs().max()))


@pytest.mark.parametrize("target", ["onnx", "onnx:portable"])
def test_bfloat16_is_refused_with_the_way_out(target: str) -> None:
    with pytest.raises(LoweringError) as caught:
        sparc.compile(model(torch.bfloat16), (torch.randn(4, 64).bfloat16(),), recipe="w8", target=target)
    assert caught.value.code == "SPARC406"
    assert "model.float()" in caught.value.diagnostic.hint
