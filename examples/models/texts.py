"""English text shipped with the repository, four genres, split into calibration and held-out parts. See data/texts/."""

import re
from pathlib import Path

GENRES = ("essay", "fiction", "reference", "speech")

_FOLDER = Path(__file__).parent / "data" / "texts"
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\b[A-Z]\.)\s+(?=[A-Z])")
_WORDS = range(6, 46)


def calibration_text(genre: str) -> str:
    """Return the calibration part of one of `GENRES`: about 13 kB."""
    return _read("calibration", genre)


def more_calibration_text(genre: str) -> str:
    """Return 61 to 64 kB more of one of `GENRES`, for methods that fit whole matrices to their inputs."""
    return _read("calibration_more", genre)


def held_out_text(genre: str) -> str:
    """Return the held-out part of one of `GENRES`: about 29 kB, from other chapters, countries or speeches."""
    return _read("held_out", genre)


def calibration_sentences(count: int = 128) -> list[str]:
    """Return `count` sentences of the calibration texts, the same number of every genre, in a fixed order.

    Raises:
        ValueError: the texts have fewer sentences, or `count` is no multiple of the number of genres.
    """
    return _sentences("calibration", count)


def held_out_sentences(count: int = 240) -> list[str]:
    """Return `count` sentences of the held-out texts, the same number of every genre, in a fixed order.

    Raises:
        ValueError: the texts have fewer sentences, or `count` is no multiple of the number of genres.
    """
    return _sentences("held_out", count)


def _read(part: str, genre: str) -> str:
    if genre not in GENRES:
        raise ValueError(f"unknown genre {genre!r}: one of {', '.join(GENRES)}")
    return (_FOLDER / part / f"{genre}.txt").read_text(encoding="utf-8")


def _sentences(part: str, count: int) -> list[str]:
    share, rest = divmod(count, len(GENRES))
    if rest:
        raise ValueError(f"{count} is no multiple of {len(GENRES)}, the number of genres")
    chosen: list[str] = []
    for genre in GENRES:
        found = [s for p in _read(part, genre).split("\n") for s in _SENTENCE_END.split(p) if len(s.split()) in _WORDS]
        found = list(dict.fromkeys(found))
        if len(found) < share:
            raise ValueError(f"the {part} {genre} text has {len(found)} sentences, not {share}")
        chosen += [found[index * len(found) // share] for index in range(share)]
    return chosen
