"""What a diagnostic code is; `sparc.codes` is the catalogue."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Code:
    """A stable diagnostic code: its id, a one-line title, what it means, and what to do about it."""

    id: str
    title: str
    meaning: str = ""
    hint: str = ""

    def __str__(self) -> str:
        return self.id
