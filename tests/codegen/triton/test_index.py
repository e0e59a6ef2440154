"""Divisions that are done, or made simpler, before a kernel runs."""

import pytest

from sparc.codegen.triton.index import Indices, text


@pytest.mark.parametrize("start", [0, 16, 48])
@pytest.mark.parametrize("divisor", [16, 32, 48, 64, 100, 128, 256])
def test_quotients_stay_what_they_are(divisor: int, start: int) -> None:
    indices = Indices()
    number = indices.symbol("first", multiple=64) + indices.symbol("position", 0, 15) + start
    quotient = text(indices.divide(number, divisor))
    for first in range(0, 640, 64):
        for position in range(16):
            found = eval(quotient, {"first": first, "position": position})
            assert found == (first + position + start) // divisor


def test_a_group_wider_than_a_step_is_the_same_for_all_of_it() -> None:
    indices = Indices()
    number = indices.symbol("first", multiple=64) + indices.symbol("position", 0, 15) + 48
    assert text(indices.divide(number, 128)) == "first // 128"
