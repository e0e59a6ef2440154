import logging

import pytest
import torch

from examples.models import evaluate, minilm, smollm2

pytestmark = [pytest.mark.models, pytest.mark.slow, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    from benchmarks.peers import minilm as minilm_peers

    folder = tmp_path_factory.mktemp("peers")
    return {"float32": minilm_peers.float32(folder), "int8": minilm_peers.dynamic_int8(folder)}


def test_minilm_float32_has_fused_attention_and_is_equal(peers):
    from benchmarks.peers.sessions import as_model, open_session, operators

    counts = operators(peers["float32"])
    assert counts["Attention"] == 6
    assert counts["LayerNormalization"] == 13
    assert counts["BiasGelu"] == 6
    model = minilm.load()
    inputs = minilm.tokenize(["A short one.", "This sentence is somewhat longer than the other one."])
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
    actual = as_model(open_session(peers["float32"]))(**inputs)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(actual[real], expected[real], rtol=1e-4, atol=1e-5)


def test_minilm_int8_is_fused_small_and_as_accurate_as_published(peers):
    from benchmarks.peers.sessions import as_model, open_session, operators

    counts = operators(peers["int8"])
    assert counts["QAttention"] == 6
    assert counts["DynamicQuantizeMatMul"] == 18
    assert counts["SkipLayerNormalization"] == 12
    assert counts["MatMul"] == 0
    assert peers["int8"].stat().st_size < 0.26 * peers["float32"].stat().st_size
    score = evaluate.compare_sentences(as_model(open_session(peers["int8"])), minilm.load())
    assert 0.990 < score.mean_cosine < 0.995


def test_smollm2_float32_is_fused_and_equal(tmp_path):
    from benchmarks.peers import smollm2 as smollm2_peers
    from benchmarks.peers.sessions import as_model, open_session, operators

    model = smollm2.load()
    path = smollm2_peers.float32(model, tmp_path)
    assert operators(path)["GroupQueryAttention"] == 30
    ids = torch.arange(100, 124).reshape(2, 12)
    with torch.no_grad():
        expected = model(input_ids=ids)
    actual = as_model(open_session(path))(input_ids=ids)
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_quiet_restores_logging(caplog):
    from benchmarks.peers.quiet import quiet

    with quiet():
        logging.getLogger("noise").warning("held back")
    logging.getLogger("noise").warning("heard")
    assert [record.message for record in caplog.records] == ["heard"]
