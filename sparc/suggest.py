"""Nearest-name suggestions: what somebody who misspelt a name probably meant."""

from collections.abc import Iterable
from difflib import get_close_matches

_LONGEST = 200
_LISTED = 12


def nearest(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """The known names closest to `name`, best first; letter case is ignored. Empty when none comes close."""
    by_lower: dict[str, str] = {}
    for candidate in known:
        by_lower.setdefault(candidate.lower(), candidate)
    wanted = name[:_LONGEST].lower()
    if wanted in by_lower:
        return [by_lower[wanted]]
    return [by_lower[match] for match in get_close_matches(wanted, by_lower, n=limit)]


def hint(name: str, known: Iterable[str], *, kind: str = "names") -> str:
    """A sentence for a diagnostic: the nearest names, or what there is when none comes close.

    Args:
        name: what was asked for.
        known: what exists.
        kind: what the names are, in the plural ("passes").
    """
    names = sorted(set(known))
    close = nearest(name, names)
    if close:
        return f"did you mean {' or '.join(close)}?"
    if not names:
        return f"there are no {kind}"
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"the {kind} are {', '.join(names[:_LISTED])}{more}"
