from itertools import pairwise

import pytest

from examples.models.texts import (
    GENRES,
    calibration_sentences,
    calibration_text,
    held_out_sentences,
    held_out_text,
    more_calibration_text,
)


def test_held_out_sentences_are_many_distinct_and_unseen():
    held_out, calibration = held_out_sentences(), calibration_sentences()
    assert len(set(held_out)) >= 200
    assert len(set(calibration)) >= 64
    assert not set(held_out) & set(calibration)


@pytest.mark.parametrize("genre", GENRES)
def test_no_passage_is_in_both_parts(genre):
    def runs_of_eight(text):
        words = text.split()
        return {tuple(words[start : start + 8]) for start in range(len(words) - 7)}

    for text in (calibration_text(genre), more_calibration_text(genre)):
        assert not runs_of_eight(held_out_text(genre)) & runs_of_eight(text)


def test_sentences_come_in_equal_shares_of_the_genres():
    sentences = held_out_sentences(40)
    for genre, (start, stop) in zip(GENRES, pairwise(range(0, 41, 10)), strict=True):
        assert all(sentence in held_out_text(genre) for sentence in sentences[start:stop])


def test_wrong_requests_are_refused():
    with pytest.raises(ValueError, match="no multiple"):
        held_out_sentences(10)
    with pytest.raises(ValueError, match="sentences, not"):
        held_out_sentences(4000)
    with pytest.raises(ValueError, match="unknown genre"):
        held_out_text("poetry")
