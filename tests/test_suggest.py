import pytest

from sparc.suggest import hint, nearest


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rund", ["round"]),
        ("ROUND", ["round"]),
        ("intgird", ["IntGrid"]),
        ("zzz", []),
        ("", []),
        ("rond" * 10_000, []),
    ],
)
def test_the_nearest_names_come_first(name: str, expected: list[str]) -> None:
    assert nearest(name, ["encode", "round", "IntGrid"]) == expected


def test_only_so_many_names_are_given() -> None:
    assert nearest("w", ["w1", "w2", "w3", "w4"], limit=2) == nearest("w", ["w1", "w2", "w3", "w4"])[:2]


def test_a_hint_names_what_there_is_when_nothing_comes_close() -> None:
    assert hint("zzz", ["round", "encode"], kind="passes") == "the passes are encode, round"
    assert hint("rund", ["round", "encode"], kind="passes") == "did you mean round?"
    assert hint("zzz", [], kind="passes") == "there are no passes"
    assert hint("zzz", [f"n{number}" for number in range(20)]).endswith("and 8 more")
