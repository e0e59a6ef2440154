"""Extensions and the registry: what can be named. Registering is data; nothing is registered by importing."""

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, is_dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from sparc import codes
from sparc.diag import Diagnostics, PassError, SparcError
from sparc.encoding.base import Encoding
from sparc.options import option_fields, unwritable
from sparc.pass_base import Pass, Stage
from sparc.recipe import Recipe
from sparc.suggest import hint
from sparc.target import Lowering, Target

GROUP = "sparc.extensions"
Named = TypeVar("Named")

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.:-]*")
_RESERVED_OPTIONS = {"pass", "where"}


@dataclass(frozen=True)
class Extension:
    """What a distribution adds to sparc. sparc's own passes and targets are Extensions too.

    A third party returns one from an entry point in the group `sparc.extensions`.

    Args:
        name: the extension's name, for messages.
        passes: classes of passes, or passes without options such as `@rewrite` makes.
        encodings: classes of encodings.
        recipes: recipes by name.
        targets: targets; each has its own name.
        lowerings: what a target does with an encoding or an operator: a function, by (target's name, encoding's class
            name or operator's name). What it is called with is the target's to say (`sparc.codegen.onnx.extensions`).
        kernels: kernel templates, for targets that choose among them.
    """

    name: str
    passes: tuple[type[Pass] | Pass, ...] = ()
    encodings: tuple[type[Encoding], ...] = ()
    recipes: Mapping[str, Recipe] = field(default_factory=dict)
    targets: tuple[Target, ...] = ()
    lowerings: Mapping[tuple[str, str], Lowering] = field(default_factory=dict)
    kernels: tuple[Any, ...] = ()


class Registry:
    """Everything that can be named, by name. An object of its own: two registries know nothing of each other.

    Attributes:
        passes: classes of passes.
        encodings: classes of encodings.
        recipes: recipes.
        targets: targets.
        lowerings: lowerings by (target, encoding or operator).
        kernels: kernel templates in order of registration.
        owners: the extension that registered a name, by (kind, name); kinds are `pass`, `encoding`, `recipe`, `target`,
            `lowering`.
    """

    def __init__(self, extensions: Iterable[Extension] = ()) -> None:
        """Register extensions in order.

        Raises:
            PassError: SPARC212 when one is malformed, SPARC210 when two register the same name.
        """
        self.passes: dict[str, type[Pass]] = {}
        self.encodings: dict[str, type[Encoding]] = {}
        self.recipes: dict[str, Recipe] = {}
        self.targets: dict[str, Target] = {}
        self.lowerings: dict[tuple[str, str], Lowering] = {}
        self.kernels: list[Any] = []
        self.owners: dict[tuple[str, str], str] = {}
        for extension in extensions:
            self.add(extension)

    @classmethod
    def load(cls, builtins: Iterable[Extension] = (), diagnostics: Diagnostics | None = None) -> "Registry":
        """A registry of the built-in extensions and of every installed one.

        Args:
            builtins: sparc's own extensions.
            diagnostics: gets a SPARC212 warning for each installed extension that cannot be loaded.

        Raises:
            PassError: SPARC210 when two extensions register the same name.
        """
        registry = cls(builtins)
        for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
            try:
                extension = _load(point)
                check_extension(extension)
            except Exception as error:  # a stranger's code must not stop sparc
                if diagnostics is not None:
                    _warn(diagnostics, point, error)
                continue
            registry.add(extension)
        return registry

    def add(self, extension: Extension) -> None:
        """Register an extension, wholly or not at all.

        Raises:
            PassError: SPARC212 when it is malformed, SPARC210 when a name is taken.
        """
        check_extension(extension)
        contents = _contents(extension)
        owners = dict(self.owners)
        for (kind, name), _ in contents:
            if (kind, _text(name)) in owners:
                raise _duplicate(kind, _text(name), owners[kind, _text(name)], extension.name)
            owners[kind, _text(name)] = extension.name
        tables: dict[str, dict[Any, Any]] = {
            "pass": self.passes,
            "encoding": self.encodings,
            "recipe": self.recipes,
            "target": self.targets,
            "lowering": self.lowerings,
        }
        for (kind, name), value in contents:
            tables[kind][name] = value
        self.owners = owners
        self.kernels.extend(extension.kernels)

    # looking up -----------------------------------------------------------------------------------------------------
    def pass_type(self, name: str) -> type[Pass]:
        """The class of a pass.

        Raises:
            PassError: SPARC201 with the nearest names; so for the other three.
        """
        return _look_up("pass", "passes", self.passes, name)

    def encoding(self, name: str) -> type[Encoding]:
        """The class of an encoding."""
        return _look_up("encoding", "encodings", self.encodings, name)

    def recipe(self, name: str) -> Recipe:
        """A recipe."""
        return _look_up("recipe", "recipes", self.recipes, name)

    def target(self, name: str) -> Target:
        """A target."""
        return _look_up("target", "targets", self.targets, name)


def _look_up(kind: str, kinds: str, table: Mapping[str, Named], name: str) -> Named:
    if name not in table:
        raise PassError(codes.UNKNOWN_NAME, f"unknown {kind} {name!r}", hint=hint(name, table, kind=kinds))
    return table[name]


# extensions ---------------------------------------------------------------------------------------------------------
def check_extension(extension: Extension) -> None:
    """Check that everything in an extension can be registered.

    Raises:
        PassError: SPARC212 naming what is wrong.
    """
    reason = _malformed(extension)
    if reason:
        name = getattr(extension, "name", type(extension).__name__)
        raise PassError(codes.EXTENSION_BROKEN, f"the extension {name!r} is malformed", why=reason)


def _malformed(extension: Extension) -> str | None:
    if not isinstance(extension, Extension):
        return "it is no sparc.registry.Extension"
    reasons = [_malformed_pass(_class_of(each)) for each in extension.passes]
    reasons += [_malformed_encoding(each) for each in extension.encodings]
    reasons += [None if isinstance(each, Target) else f"{each!r} is no Target" for each in extension.targets]
    reasons += [
        f"recipe {key!r} is no Recipe" for key, each in extension.recipes.items() if not isinstance(each, Recipe)
    ]
    reasons += [
        f"the lowering {key!r} is no pair of strings"
        for key in extension.lowerings
        if not (isinstance(key, tuple) and len(key) == 2 and all(isinstance(part, str) for part in key))
    ]
    reasons += [
        f"the lowering {key!r} is no function" for key, each in extension.lowerings.items() if not callable(each)
    ]
    reasons = [reason for reason in reasons if reason]
    if reasons:
        return reasons[0]
    names = [name for (kind, name), _ in _contents(extension) if kind != "lowering"]
    return next(
        (f"{name!r} is no name" for name in names if not isinstance(name, str) or not _NAME.fullmatch(name)), None
    )


def _malformed_pass(owner: Any) -> str | None:
    if not (isinstance(owner, type) and issubclass(owner, Pass)):
        return f"{owner!r} is no Pass"
    if not isinstance(getattr(owner, "name", None), str) or not isinstance(getattr(owner, "stage", None), Stage):
        return f"the pass {owner.__name__} has no name or no stage"
    taken = _RESERVED_OPTIONS & set(option_fields(owner)) if is_dataclass(owner) else set()
    if taken:
        return f"the pass {owner.name!r} has an option called {taken.pop()!r}, which recipes use themselves"
    return _malformed_class(f"the pass {owner.name!r}", owner)


def _malformed_encoding(owner: Any) -> str | None:
    if not (isinstance(owner, type) and issubclass(owner, Encoding)):
        return f"{owner!r} is no Encoding"
    return _malformed_class(f"the encoding {owner.__name__!r}", owner)


def _malformed_class(what: str, owner: type[Any]) -> str | None:
    if inspect.isabstract(owner):
        missing = ", ".join(sorted(getattr(owner, "__abstractmethods__", ())))
        return f"{what} is abstract: it lacks {missing}"
    if "__dataclass_params__" not in vars(owner) or not vars(owner)["__dataclass_params__"].frozen:
        return f"{what} is no frozen dataclass"
    reason = unwritable(owner)
    return f"{what}, {reason}" if reason else None


def _contents(extension: Extension) -> list[tuple[tuple[str, Any], Any]]:
    """Everything in an extension by (kind, name)."""
    passes = [_class_of(each) for each in extension.passes]
    contents: list[tuple[tuple[str, Any], Any]] = [(("pass", each.name), each) for each in passes]
    contents += [(("encoding", each.__name__), each) for each in extension.encodings]
    contents += [(("recipe", name), recipe) for name, recipe in extension.recipes.items()]
    contents += [(("target", target.name), target) for target in extension.targets]
    contents += [(("lowering", key), value) for key, value in extension.lowerings.items()]
    return contents


def _class_of(each: type[Pass] | Pass) -> type[Pass]:
    return type(each) if isinstance(each, Pass) else each


def _text(name: Any) -> str:
    return name if isinstance(name, str) else " for ".join(reversed(name))


def _load(point: EntryPoint) -> Extension:
    loaded = point.load()
    extension = loaded() if callable(loaded) else loaded
    if not isinstance(extension, Extension):
        raise TypeError(f"{point.value} returned a {type(extension).__name__}, not a sparc.registry.Extension")
    return extension


def _warn(diagnostics: Diagnostics, point: EntryPoint, error: Exception) -> None:
    owner = f" of {point.dist.name} {point.dist.version}" if point.dist is not None else ""
    why = error.diagnostic.why if isinstance(error, SparcError) else f"{type(error).__name__}: {error}"
    diagnostics.warn(codes.EXTENSION_BROKEN, f"the extension {point.name!r}{owner} could not be loaded", why=why)


def _duplicate(kind: str, name: str, owner: str, extension: str) -> PassError:
    return PassError(
        codes.DUPLICATE_EXTENSION,
        f"the {kind} {name!r} is registered twice",
        why=f"by {owner!r} and by {extension!r}" if owner != extension else f"both times by {owner!r}",
    )
