"""Sampling draws from the distribution that its options describe."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from sparc.generation.sampling import Sampling

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0]])


def test_greedy_takes_the_likeliest() -> None:
    assert Sampling().choose(LOGITS).tolist() == [0]


def test_temperature_divides_the_logits() -> None:
    found = Sampling(True, temperature=2.0).probabilities(LOGITS)
    torch.testing.assert_close(found, (LOGITS / 2).softmax(-1))


def test_top_k_keeps_the_k_likeliest() -> None:
    found = Sampling(True, top_k=2).probabilities(LOGITS)
    torch.testing.assert_close(found[0, :2], LOGITS[0, :2].softmax(-1))
    assert found[0, 2:].tolist() == [0, 0]


def test_top_p_keeps_the_least_set_that_reaches_p() -> None:
    chances = LOGITS.softmax(-1)[0]
    for p, kept in ((float(chances[0]) - 0.01, 1), (float(chances[0]) + 0.01, 2), (float(chances[:2].sum()) + 0.01, 3)):
        assert int((Sampling(True, top_p=p).probabilities(LOGITS) > 0).sum()) == kept


@given(st.integers(0, 100), st.floats(0.1, 3), st.integers(0, 6), st.floats(0.05, 1))
def test_probabilities_are_transformers(seed: int, temperature: float, top_k: int, top_p: float) -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(2, 6, generator=torch.Generator().manual_seed(seed))
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    found = Sampling(True, temperature, top_k, top_p).probabilities(logits)
    torch.testing.assert_close(found, scores.softmax(-1), rtol=1e-4, atol=1e-6)


def test_a_seed_gives_the_same_tokens_and_the_frequencies_fit() -> None:
    sampling = Sampling(True, top_k=3)
    rows = LOGITS.expand(4000, 4)
    drawn = sampling.choose(rows, torch.Generator().manual_seed(3))
    assert torch.equal(drawn, sampling.choose(rows, torch.Generator().manual_seed(3)))
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(shares, sampling.probabilities(LOGITS)[0], rtol=0, atol=0.03)
