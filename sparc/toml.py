"""TOML: bounded reading, and the writing that the standard library lacks."""

import re
import tomllib
from collections.abc import Mapping
from typing import Any

from sparc import codes
from sparc.diag import PassError

MOST_BYTES = 65_536
MOST_DEPTH = 8
_LONGEST_LINE = 4096  # tomllib takes quadratic time over the dots of one key
_WIDTH = 100
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_ESCAPES = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r"}


def read_toml(text: str) -> dict[str, Any]:
    """Parse TOML of at most 64 kB, 4096 characters a line and 8 levels.

    Raises:
        PassError: SPARC202 when it is no TOML, or exceeds a bound.
    """
    if len(text) > MOST_BYTES or len(text.encode("utf-8", "surrogatepass")) > MOST_BYTES:
        raise PassError(codes.BAD_RECIPE, f"the recipe is longer than {MOST_BYTES} bytes")
    for number, line in enumerate(text.splitlines(), 1):
        if len(line) > _LONGEST_LINE:
            raise PassError(codes.BAD_RECIPE, f"line {number} of the recipe is longer than {_LONGEST_LINE} characters")
    try:
        table = tomllib.loads(text)
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:  # not TOML, or a number of thousands of digits
        raise PassError(codes.BAD_RECIPE, "the recipe is no valid TOML", why=str(error)) from None
    if _deeper_than(table, MOST_DEPTH):
        raise _too_deep()
    return table


def toml_value(value: Any, indent: str = "") -> str:
    """One value as TOML; lists that would be wide get one item a line.

    Args:
        value: a bool, an int, a float, a string, a list or a mapping from strings.
        indent: what the lines of a wide list start with.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return '"' + "".join(map(_escape, value)) + '"'
    if isinstance(value, Mapping):
        items = ", ".join(f"{toml_key(key)} = {toml_value(item)}" for key, item in value.items())
        return f"{{ {items} }}" if items else "{}"
    assert isinstance(value, (list, tuple)), f"{type(value).__name__} has no TOML form"
    line = f"[{', '.join(map(toml_value, value))}]"
    if len(line) <= _WIDTH:
        return line
    inner = indent + "    "
    return "[\n" + "".join(f"{inner}{toml_value(item, inner)},\n" for item in value) + indent + "]"


def toml_key(key: str) -> str:
    """A key, quoted where it must be."""
    return key if _BARE_KEY.fullmatch(key) else toml_value(key)


def _escape(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    return f"\\u{ord(character):04x}" if character < " " or character == "\x7f" else character


def _deeper_than(value: Any, levels: int) -> bool:
    if not isinstance(value, (dict, list)):
        return False
    items = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_deeper_than(item, levels - 1) for item in items)


def _too_deep() -> PassError:
    return PassError(codes.BAD_RECIPE, f"the recipe is nested more than {MOST_DEPTH} levels deep")
