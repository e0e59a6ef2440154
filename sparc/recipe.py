"""Recipes: which passes run, with which options, on which sites, in Python or in TOML.

    name = "mine"
    goal = "size"

    [[steps]]
    pass = "round"
    where = "*.mlp.*"
    encoding = "IntGrid(bits=4, group=32)"

A recipe names registered passes and encodings only. Both forms round-trip exactly; options at their defaults are not
written.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from sparc import codes
from sparc.diag import PassError
from sparc.encoding.base import Encoding
from sparc.encoding.parse import parse_spec
from sparc.options import check_options, read_options, write_options
from sparc.pass_base import Pass, Stage
from sparc.selector import Selector
from sparc.suggest import hint, nearest
from sparc.toml import MOST_BYTES, read_toml, toml_key, toml_value

Goal = Literal["latency", "size"]
Where = str | tuple[str, ...]

_GOALS: tuple[str, ...] = get_args(Goal)
_KEYS = ("name", "goal", "steps")
_RESERVED = ("pass", "where")


class Names(Protocol):
    """What reading a recipe needs of a registry."""

    @property
    def encodings(self) -> Mapping[str, type[Encoding]]:
        """Registered encodings by name."""
        ...

    def pass_type(self, name: str) -> type[Pass]:
        """A registered pass; SPARC201 when there is none."""
        ...

    def recipe(self, name: str) -> "Recipe":
        """A registered recipe; SPARC201 when there is none."""
        ...


@dataclass(frozen=True)
class Step:
    """One pass, with its options, and the sites it is for.

    Args:
        pass_: the pass.
        where: one selector or several (`sparc.selector`); everything by default.

    Raises:
        PassError: SPARC202 when `pass_` is no pass, SPARC209 when an option has the wrong type, SPARC213 when `where`
            is malformed.
    """

    pass_: Pass
    where: Where = "*"

    def __post_init__(self) -> None:
        if not isinstance(self.pass_, Pass):
            raise _no_pass(self.pass_)
        if isinstance(self.where, list):
            object.__setattr__(self, "where", tuple(self.where))
        if not isinstance(self.where, (str, tuple)):
            raise PassError(
                codes.BAD_SELECTOR, f"where={self.where!r} of {self.pass_name!r} is no string and no list of strings"
            )
        check_options(self.pass_, repr(self.pass_name))
        Selector.parse(self.where)

    @property
    def pass_name(self) -> str:
        """The pass's name."""
        return self.pass_.name

    def __str__(self) -> str:
        where = self.where if isinstance(self.where, str) else ", ".join(self.where)
        return str(self.pass_) if where == "*" else f"{self.pass_} where {where}"


@dataclass(frozen=True)
class Recipe:
    """Steps in a legal order.

    Args:
        steps: passes or `Step`s; a bare pass is for every site.
        goal: what compressing is for: `latency` keeps a compressed operator only where it is faster, `size` where it is
            smaller.
        name: what reports call it.

    Raises:
        PassError: SPARC202 when something is no step, SPARC203 when the order of stages is illegal.
    """

    steps: tuple[Step, ...] = field(default=())
    goal: Goal = "latency"
    name: str = ""

    def __post_init__(self) -> None:
        steps = tuple(step if isinstance(step, Step) else Step(step) for step in self.steps)
        object.__setattr__(self, "steps", steps)
        if not isinstance(self.name, str):
            raise PassError(codes.BAD_RECIPE, f"the recipe's name is {self.name!r}", why="expected a string")
        if self.goal not in _GOALS:
            raise PassError(
                codes.BAD_RECIPE, f"the recipe's goal is {self.goal!r}", hint=hint(str(self.goal), _GOALS, kind="goals")
            )
        _check_order(steps)

    def __str__(self) -> str:
        return "\n".join([f"{self.name or 'recipe'} (goal: {self.goal})", *(f"  {step}" for step in self.steps)])

    def to_toml(self) -> str:
        """The recipe as TOML, which `from_toml` reads back as an equal recipe.

        Raises:
            PassError: SPARC202 when it is too long to be read back.
        """
        head = [f"name = {toml_value(self.name)}"] * bool(self.name) + [f"goal = {toml_value(self.goal)}"] * (
            self.goal != "latency"
        )
        blocks = ["\n".join(head)] if head else []
        blocks += [_step_toml(step) for step in self.steps] or ["steps = []"]
        text = "\n\n".join(blocks) + "\n"
        read_toml(text)
        return text

    @staticmethod
    def from_toml(text: str, registry: Names) -> "Recipe":
        """Read a recipe.

        Args:
            text: TOML of at most 64 kB.
            registry: the passes and encodings that may be named.

        Raises:
            PassError: SPARC201 for an unknown pass or encoding, SPARC202 when the text is no recipe, SPARC203 for an
                illegal order, SPARC209 for a wrong option, SPARC213 for a malformed selector.
        """
        table = read_toml(text)
        for key in table:
            if key not in _KEYS:
                raise PassError(codes.BAD_RECIPE, f"a recipe has no key {key!r}", hint=hint(key, _KEYS, kind="keys"))
        tables = table.get("steps")
        if not isinstance(tables, list) or not all(isinstance(step, dict) for step in tables):
            why = "steps is missing" if tables is None else "steps is no list of tables"
            raise PassError(
                codes.BAD_RECIPE, "the recipe has no steps", why=why, hint="begin every step with [[steps]]"
            )
        steps = tuple(_read_step(number, step, registry) for number, step in enumerate(tables, 1))
        return Recipe(steps, table.get("goal", "latency"), table.get("name", ""))


def resolve_recipe(value: Any, registry: Names) -> Recipe:
    """A recipe from whatever names one.

    Args:
        value: a Recipe; the name of a registered one; the path of a `.toml` file (a `Path`, or a string that ends in
            `.toml` or holds a slash); a pass or a `Step`; or an iterable of those.
        registry: what may be named.

    Raises:
        PassError: SPARC201, SPARC202, SPARC203, SPARC209 or SPARC213.
    """
    if isinstance(value, Recipe):
        return value
    if isinstance(value, PathLike) or (isinstance(value, str) and (value.endswith(".toml") or "/" in value)):
        return _read_file(Path(value), registry)
    if isinstance(value, str):
        return registry.recipe(value)
    if isinstance(value, (Pass, Step)):
        return Recipe((value,))  # type: ignore[arg-type]
    if isinstance(value, Iterable) and not isinstance(value, (bytes, Mapping)):
        return Recipe(tuple(value))
    raise PassError(
        codes.BAD_RECIPE,
        f"{value!r} is no recipe",
        hint="give a Recipe, a registered name, the path of a .toml file, or a list of passes",
    )


def _read_file(path: Path, registry: Names) -> Recipe:
    try:
        if not path.is_file():
            near = nearest(path.name, (each.name for each in path.parent.glob("*.toml")))
            found = f"did you mean {path.with_name(near[0])}?" if near else ""
            raise PassError(codes.BAD_RECIPE, f"there is no file {str(path)!r}", hint=found)
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PassError(codes.BAD_RECIPE, f"{str(path)!r} is no UTF-8 text", why=str(error)) from None
    except (OSError, ValueError) as error:
        raise PassError(codes.BAD_RECIPE, f"{str(path)!r} cannot be read", why=str(error)) from None
    return Recipe.from_toml(text, registry)


# steps --------------------------------------------------------------------------------------------------------------
def _read_step(number: int, table: Mapping[str, Any], registry: Names) -> Step:
    name = table.get("pass")
    if not isinstance(name, str):
        near = nearest("pass", table)
        why = "pass is missing" if name is None else f"pass is {name!r}"
        raise PassError(
            codes.BAD_RECIPE,
            f"step {number} names no pass",
            why=why,
            hint=f'write pass = "round", not {near[0]}' if near else "",
        )
    owner = registry.pass_type(name)
    options = {key: value for key, value in table.items() if key not in _RESERVED}
    parse = partial(parse_spec, known=registry.encodings)
    return Step(read_options(owner, options, parse, f"step {number} ({name!r})"), table.get("where", "*"))


def _step_toml(step: Step) -> str:
    values: dict[str, Any] = {"pass": step.pass_name}
    if step.where != "*":
        values["where"] = step.where
    values.update(write_options(step.pass_))
    return "\n".join(["[[steps]]", *(f"{toml_key(key)} = {toml_value(value)}" for key, value in values.items())])


def _check_order(steps: tuple[Step, ...]) -> None:
    for number, step in enumerate(steps, 1):
        later = next((n for n, other in enumerate(steps[:number], 1) if other.pass_.stage > step.pass_.stage), None)
        if later is None:
            continue
        other = steps[later - 1]
        raise PassError(
            codes.ILLEGAL_ORDER,
            f"step {number} ({step.pass_name!r}) comes after step {later} ({other.pass_name!r})",
            why=f"{_stage(step)} comes before {_stage(other)}",
            hint=f"move step {number} ({step.pass_name!r}) before step {later} ({other.pass_name!r})",
        )


def _stage(step: Step) -> str:
    return Stage(step.pass_.stage).name.lower().replace("_", " ")


def _no_pass(value: Any) -> PassError:
    if isinstance(value, type) and issubclass(value, Pass):
        return PassError(codes.BAD_RECIPE, f"{value.__name__} is a class, not a pass", hint=f"write {value.__name__}()")
    return PassError(codes.BAD_RECIPE, f"{value!r} is no pass", hint="a step is a pass, or Step(pass, where=...)")
