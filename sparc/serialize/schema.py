"""Reading JSON from strangers: bounded, strict about keys, and every fault a SPARC503."""

import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from sparc import codes
from sparc.diag import ArtifactError

MAX_INT = 2**63 - 1
MAX_DEPTH = 64
MAX_RANK = 32


def malformed(what: str, why: str = "") -> ArtifactError:
    """A SPARC503 to raise."""
    return ArtifactError(codes.ARTIFACT_MALFORMED, what, why=why)


def unwritable(what: str, why: str = "") -> ArtifactError:
    """A SPARC508 to raise."""
    return ArtifactError(codes.UNWRITABLE, what, why=why)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn whatever malformed values provoke into SPARC503."""
    try:
        yield
    except (
        KeyError,
        TypeError,
        ValueError,
        IndexError,
        AttributeError,
        OverflowError,
        RecursionError,
        AssertionError,
    ) as error:
        raise malformed(f"{what} is malformed", f"{type(error).__name__}: {error}"[:300]) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch from logging and warning about what is raised anyway."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def to_json(value: Any) -> bytes:
    """Compact, deterministic JSON; keys in the order of the mapping, no NaN."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def from_json(content: bytes, what: str) -> dict[str, Any]:
    """The object in `content`; duplicate keys, NaN and anything but an object are refused."""
    with reading(what):
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    return mapping(value, what)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def mapping(value: Any, what: str) -> dict[str, Any]:
    """`value`, which must be an object."""
    if not isinstance(value, dict):
        raise malformed(f"{what} is no object")
    return value


def fields(value: Any, what: str, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
    """`value`, which must be an object with these keys and no others."""
    found = mapping(value, what)
    for key in required:
        if key not in found:
            raise malformed(f"{what} has no {key!r}")
    for key in found:
        if key not in required and key not in optional:
            raise malformed(f"{what} has an unknown key {key[:80]!r}")
    return found


def text(value: Any, what: str, limit: int = 4096) -> str:
    """`value`, which must be a string of at most `limit` characters."""
    if not isinstance(value, str) or len(value) > limit:
        raise malformed(f"{what} is no string of at most {limit} characters")
    return value


def texts(value: Any, what: str, limit: int = 4096) -> tuple[str, ...]:
    """`value`, which must be a list of strings."""
    return tuple(text(item, what, limit) for item in items(value, what))


def items(value: Any, what: str) -> list[Any]:
    """`value`, which must be a list."""
    if not isinstance(value, list):
        raise malformed(f"{what} is no list")
    return value


def integer(value: Any, what: str, low: int = -MAX_INT - 1, high: int = MAX_INT) -> int:
    """`value`, which must be an integer within the bounds."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise malformed(f"{what} is no integer from {low} to {high}")
    return value


def sizes(value: Any, what: str) -> tuple[int, ...]:
    """`value`, which must be a concrete shape (or strides)."""
    found = tuple(integer(item, what, 0) for item in items(value, what))
    if len(found) > MAX_RANK:
        raise malformed(f"{what} has rank {len(found)}")
    return found


def entries(value: Any, what: str) -> Mapping[str, Any]:
    """`value`, which must be an object; its keys are names of at most 4096 characters."""
    found = mapping(value, what)
    for key in found:
        text(key, what)
    return found
