"""SmolLM2's Q4_1 file, read and compiled without rounding again."""

import pytest
import torch

import sparc
from examples.models import smollm2
from sparc.encoding.int_grid import IntGrid

pytestmark = [pytest.mark.models, pytest.mark.xdist_group("smollm2_checkpoint")]

Q4_1 = IntGrid(4, 32, symmetric=False, zero="minimum", scale_dtype="float16")
Q8_0 = IntGrid(8, 32, scale_dtype="float16")


@pytest.fixture(scope="module")
def checkpoint():
    return sparc.read_checkpoint(smollm2.gguf_file())


@pytest.fixture(scope="module")
def model():
    return smollm2.load()


def test_weights_are_those_that_the_gguf_package_decodes(checkpoint, model):
    expected = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    assert all(torch.equal(checkpoint.model.get_parameter(name), value) for name, value in expected.items())
    assert {name for name, grid in checkpoint.grids.items() if grid.spec == Q8_0} == {"model.embed_tokens.weight"}
    assert sum(grid.spec == Q4_1 for grid in checkpoint.grids.values()) == 30 * 7


def test_the_tokenizer_comes_along(checkpoint):
    text = "The capital of France is"
    assert checkpoint.tokenizer.encode(text).ids == smollm2.load_tokenizer().encode(text).ids


@pytest.mark.slow
def test_keep_in_onnx(checkpoint, model):
    ids = smollm2.calibration_tokens(4)[:1, :64]
    artifact = sparc.compile(
        checkpoint.with_model(smollm2.FullSequence(checkpoint.model).eval()), {"input_ids": ids}, recipe="keep",
        dynamic={"input_ids": {0: "batch", 1: "seq"}}, measure=False, verify="types",
    )  # fmt: skip
    with torch.no_grad():
        expected = model(input_ids=ids)
    found = artifact(input_ids=ids)
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert artifact.report.to_json()["summary"]["file_bytes"] < 110e6
