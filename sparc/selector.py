"""Selectors: which sites a step of a recipe is for.

`where` is one pattern or several. A pattern names weights, an operator type, or both:

- `encoder.layer.0` — a module or a weight: everything inside it. Patterns match from the beginning of the full name of
  a weight to the end of one of its parts, so this covers `encoder.layer.0.query.weight` but not
  `encoder.layer.01.query.weight`.
- `*` stands for any text, dots included; `?` for one character and `[0-5]` for one of a set, dots excluded. A leading
  `*.` may also stand for nothing: `*.mlp` is every module called `mlp`, at any depth.
- `{query,key}` are alternatives, `{0..11}` are numbers; both may be nested.
- `@linear` — an operator type. `encoder.*@linear` is both: inside `encoder`, and a linear operator's.
- `!pattern` takes away. Several patterns select what any of them selects, less what any `!pattern` takes away; only
  `!patterns` select everything else. The order of patterns means nothing.
- `*` is everything.

Among the steps of one recipe with the same pass, a site goes to the most specific: a name beats an operator type, which
beats `*`; between equals the later step wins.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from sparc import codes
from sparc.diag import PassError
from sparc.suggest import hint

OPERATOR_TYPES = ("linear", "conv", "conv_transposed", "embedding", "matmul", "grouped")

_LONGEST_PATTERN = 1000
_LONGEST_EXPANSION = 65_536
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,6})\.\.(\d{1,6})")
_STARS = re.compile(r"\*+")
_PIECE = re.compile(r"\?|\[[^]]*\]?|[^?[]+")


class Selectable(Protocol):
    """What a selector looks at: a site."""

    @property
    def weight(self) -> str:
        """The weight's name in the program."""
        ...

    @property
    def origins(self) -> tuple[str, ...]:
        """The names it has, or had, in the user's model."""
        ...

    @property
    def operator(self) -> str:
        """The operator type."""
        ...


class Unselectable(Protocol):
    """A weight that is no site; a pattern may name it all the same, and the pass will say why it was left alone."""

    @property
    def weight(self) -> str:
        """The weight's name in the program."""
        ...


class Level(IntEnum):
    """How specific a pattern is."""

    GLOBAL = 0
    OPERATOR = 1
    NAME = 2


@dataclass(frozen=True)
class Pattern:
    """One parsed pattern.

    Args:
        text: as it was written.
        names: matches the names it covers; None when it covers every name.
        operators: matches the operator types it covers; None when it covers all.
        excludes: whether it takes away.
    """

    text: str
    names: re.Pattern[str] | None
    operators: re.Pattern[str] | None
    excludes: bool

    @property
    def level(self) -> Level:
        """How specific it is."""
        if self.names is not None:
            return Level.NAME
        return Level.GLOBAL if self.operators is None else Level.OPERATOR

    def covers(self, names: Iterable[str], operator: str) -> bool:
        """Whether one of these names of a weight, used by this type of operator, is covered."""
        if self.operators is not None and not self.operators.fullmatch(operator):
            return False
        return self.names is None or any(self.names.match(name) for name in names)


@dataclass(frozen=True)
class Selector:
    """A parsed `where`."""

    patterns: tuple[Pattern, ...]

    @staticmethod
    def parse(where: str | Sequence[str]) -> "Selector":
        """Parse one pattern or several.

        Raises:
            PassError: SPARC213 when a pattern is malformed.
        """
        texts = (where,) if isinstance(where, str) else tuple(where)
        if not texts:
            raise PassError(
                codes.BAD_SELECTOR, "where= is empty", hint='leave it out, or write "*", to select everything'
            )
        for text in texts:
            if not isinstance(text, str):
                raise PassError(codes.BAD_SELECTOR, f"where= holds {text!r}", why="patterns are strings")
        return Selector(tuple(map(_parse_pattern, texts)))

    def level(self, names: Iterable[str], operator: str) -> Level | None:
        """How specifically a weight with these names is selected; None when it is not."""
        names = tuple(names)
        wanted = [pattern for pattern in self.patterns if not pattern.excludes]
        if any(pattern.covers(names, operator) for pattern in self.patterns if pattern.excludes):
            return None
        if not wanted:
            return Level.GLOBAL
        return max((pattern.level for pattern in wanted if pattern.covers(names, operator)), default=None)


class Selecting(Protocol):
    """What `assign` needs of a step: its pass's name and its selector."""

    @property
    def pass_name(self) -> str:
        """The name of the step's pass."""
        ...

    @property
    def where(self) -> str | tuple[str, ...]:
        """The selector."""
        ...


def assign(
    steps: Sequence[Selecting], sites: Sequence[Selectable], others: Sequence[Unselectable] = ()
) -> list[set[str]]:
    """The weights each step is for: among steps with the same pass, the most specific one claims a site, the later one
    of equals.

    Args:
        steps: a recipe's steps, in order.
        sites: what can be selected.
        others: weights that are no sites; naming one is no mistake.

    Returns:
        For each step the names (`site.weight`) of its sites; empty when other steps claim them all, or when the model
        has no operator of the type asked for.

    Raises:
        PassError: SPARC204 when a pattern names nothing in this model, with the nearest names.
    """
    for step in steps:
        for pattern in Selector.parse(step.where).patterns:
            _check_matches(step, pattern, sites, others)
    claimed: list[set[str]] = [set() for _ in steps]
    for site in sites:
        for index in claimants(steps, site):
            claimed[index].add(site.weight)
    return claimed


def claimants(steps: Sequence[Selecting], site: Selectable) -> set[int]:
    """The numbers of the steps that claim a site, one for each pass at most (see `assign`)."""
    best: dict[str, tuple[Level, int]] = {}
    for index, step in enumerate(steps):
        level = Selector.parse(step.where).level(_names(site), site.operator)
        if level is not None:
            best[step.pass_name] = max(best.get(step.pass_name, (level, index)), (level, index))
    return {index for _, index in best.values()}


def _names(site: Selectable) -> tuple[str, ...]:
    return (site.weight, *site.origins)


# matching nothing ---------------------------------------------------------------------------------------------------
def _check_matches(
    step: Selecting, pattern: Pattern, sites: Sequence[Selectable], others: Sequence[Unselectable]
) -> None:
    present = [*OPERATOR_TYPES, *(site.operator for site in sites)]
    if pattern.operators is not None and not any(map(pattern.operators.fullmatch, present)):
        raise _matches_nothing(step, pattern, hint(pattern.text, [f"@{operator}" for operator in present]))
    if pattern.names is None:
        return
    if any(pattern.covers(_names(site), site.operator) for site in sites):
        return
    if pattern.operators is None and any(pattern.names.match(other.weight) for other in others):
        return
    raise _matches_nothing(step, pattern, _suggestion(pattern, sites))


def _suggestion(pattern: Pattern, sites: Sequence[Selectable]) -> str:
    name = pattern.text.removeprefix("!").partition("@")[0]
    if pattern.operators is not None:
        found = sorted(
            {site.operator for site in sites if pattern.names and any(map(pattern.names.match, _names(site)))}
        )
        if found:
            return f"the operators there are {', '.join('@' + operator for operator in found)}"
    inner = _parse_pattern(f"*.{name}")
    if any(inner.covers(_names(site), site.operator) for site in sites):
        return f"did you mean *.{name}? patterns match from the beginning of a name"
    return hint(name, _known_names(sites), kind="modules")


def _known_names(sites: Sequence[Selectable]) -> set[str]:
    """Every module path with a weight below it, as it is and with `*` for numbers."""
    known = set()
    for site in sites:
        for name in _names(site):
            parts = name.split(".")
            for length in range(1, len(parts)):
                known.add(".".join(parts[:length]))
                known.add(".".join("*" if part.isdigit() else part for part in parts[:length]))
    return known - {"*"}


def _matches_nothing(step: Selecting, pattern: Pattern, suggestion: str) -> PassError:
    return PassError(
        codes.SELECTOR_MATCHES_NOTHING,
        f"the selector {pattern.text!r} of {step.pass_name!r} matches nothing",
        why="no weight of this model that can be compressed has such a name"
        if pattern.names is not None
        else "there is no such operator type",
        hint=suggestion,
    )


# parsing ------------------------------------------------------------------------------------------------------------
def _parse_pattern(text: str) -> Pattern:
    body = text.removeprefix("!")
    name, at, operator = body.partition("@")
    if not body or (at and not operator):
        raise _malformed(text, "a name or an @type is missing")
    if len(text) > _LONGEST_PATTERN:
        raise _malformed(text[:40] + "…", f"it is longer than {_LONGEST_PATTERN} characters")
    if body[0] == "!" or "@" in operator or any(character.isspace() for character in body):
        raise _malformed(text, "`!` stands at the beginning, `@` occurs once, and there are no blanks")
    names = None if not name or _STARS.fullmatch(name) else _compile(text, name, r"(?:\.|\Z)")
    operators = _compile(text, operator, r"\Z") if at and not _STARS.fullmatch(operator) else None
    return Pattern(text, names, operators, text.startswith("!"))


def _compile(text: str, glob: str, end: str) -> re.Pattern[str]:
    return re.compile(
        f"(?:{'|'.join(_expression(text, plain) for plain in _alternatives(text, glob))}){end}", re.DOTALL
    )


def _expression(text: str, plain: str) -> str:
    """A glob without braces as a regular expression that backtracks over no more than its first and its last star.

    What stands between two stars has a fixed length, so its leftmost match is as good as any later one and can be
    atomic.
    """
    anywhere = plain.startswith("*.")
    parts = _STARS.split(plain[2:] if anywhere else plain)
    first, *rest = ["".join(_piece(text, piece) for piece in _PIECE.findall(part)) for part in parts]
    middle = "".join(f"(?>.*?{part})" for part in rest[:-1] if part)
    return (r"(?:.*\.)?" if anywhere else "") + first + middle + (f".*{rest[-1]}" if rest else "")


def _piece(text: str, piece: str) -> str:
    if piece == "?":
        return r"[^.]"
    if piece[0] != "[":
        return re.escape(piece)
    negated, members = piece[1:2] in ("!", "^"), piece[1:-1].lstrip("!^")
    if not piece.endswith("]") or not re.fullmatch(r"(?:\w-\w|\w)+", members):
        raise _malformed(text, f"{piece!r} is no set of characters such as [0-5]")
    if any(low > high for low, high in re.findall(r"(\w)-(\w)", members)):
        raise _malformed(text, f"{piece!r} holds an empty range")
    return f"[^.{members}]" if negated else f"[{members}]"


def _alternatives(text: str, glob: str) -> list[str]:
    """The globs without braces that one with braces stands for."""
    done: dict[str, None] = {}
    todo, size = [glob], 0
    while todo:
        current = todo.pop()
        braces = _BRACES.search(current)
        if braces is None:
            if "{" in current or "}" in current:
                raise _malformed(text, "its braces are not balanced")
            done.setdefault(current)
            continue
        before, after = current[: braces.start()], current[braces.end() :]
        choices = [before + choice + after for choice in _choices(text, braces[1])]
        todo += choices
        size += sum(len(choice) + 1 for choice in choices)
        if size > _LONGEST_EXPANSION:
            raise _malformed(text, "its braces stand for too many names")
    return list(done)


def _choices(text: str, inside: str) -> list[str]:
    numbers = _RANGE.fullmatch(inside)
    if numbers is None:
        return inside.split(",")
    low, high = int(numbers[1]), int(numbers[2])
    if not low <= high < low + _LONGEST_EXPANSION // max(1, len(text)):
        raise _malformed(text, f"the range {inside} is empty or too long")
    return [str(number) for number in range(low, high + 1)]


def _malformed(text: str, why: str) -> PassError:
    return PassError(
        codes.BAD_SELECTOR, f"the selector {text!r} is malformed", why=why, hint="see the selectors in docs/recipes.md"
    )
