"""Options: the fields of passes, checked against their annotations and written as TOML values, both ways exactly.

An option's type is `bool`, `int`, `float`, `str`, a `Literal`, an `Enum` with string values, an encoding (as its spec
text), a tuple or a `Mapping` from strings of those, or a union of them. None is allowed as a default only: TOML has no
null, so it is written by leaving the option out.
"""

import enum
import math
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from sparc import codes
from sparc.diag import PassError, SparcError
from sparc.encoding.base import Encoding
from sparc.suggest import hint as suggestion

ParseSpec = Callable[[str], Encoding]

_PLAIN = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
_LONGEST_SHOWN = 60


class _Mismatch(Exception):
    """A value does not have the type it must have."""


def option_fields(owner: type[Any]) -> dict[str, Field[Any]]:
    """The options of a pass or an encoding, in order."""
    return {field.name: field for field in fields(owner) if field.init}


def unwritable(owner: type[Any]) -> str | None:
    """Why recipes could not write an option of this class; None when they can write them all."""
    try:
        annotations = get_type_hints(owner)
    except Exception as error:  # an annotation may be any expression
        return f"the annotation of an option cannot be resolved: {error}"
    for name, field in option_fields(owner).items():
        reason = _unsupported(annotations[name])
        if reason:
            return f"option {name!r}: {reason}"
        if _allows_none(annotations[name]) and default_of(field) is not None:
            return f"option {name!r} may be None, but None is not its default"
    return None


def check_options(instance: Any, what: str) -> None:
    """Check the types of every option of a pass.

    Raises:
        PassError: SPARC209 naming the option and what was expected.
    """
    annotations = get_type_hints(type(instance))
    for name in option_fields(type(instance)):
        _convert_option(name, annotations[name], getattr(instance, name), None, what)


def read_options(owner: type[Any], values: Mapping[str, Any], parse: ParseSpec, what: str) -> Any:
    """An instance of `owner` from TOML values.

    Args:
        owner: the class of a pass.
        values: its options.
        parse: reads an encoding's spec text.
        what: names the instance in messages: "step 2 ('round')".

    Raises:
        PassError: SPARC209 when an option is unknown, missing, of the wrong type or out of range; what `parse` raises.
    """
    known = option_fields(owner)
    annotations = get_type_hints(owner)
    for name in values:
        if name not in known:
            raise unknown_option(name, known, what)
    for name, field in known.items():
        if name not in values and default_of(field) is MISSING:
            why = f"it has no default; expected {_expected(annotations[name], in_toml=True)}"
            raise PassError(codes.BAD_OPTION, f"{what} needs the option {name!r}", why=why)
    converted = {name: _convert_option(name, annotations[name], value, parse, what) for name, value in values.items()}
    try:
        return owner(**converted)
    except SparcError:
        raise
    except Exception as error:  # a third party's __post_init__ may raise anything
        raise PassError(
            codes.BAD_OPTION, f"the options of {what} were refused", why=f"{type(error).__name__}: {error}"
        ) from None


def unknown_option(name: str, known: Iterable[str], what: str) -> PassError:
    """The error for an option that `what` does not have."""
    names = list(known)
    near = suggestion(name, names, kind="options") if names else "it has no options"
    return PassError(codes.BAD_OPTION, f"{what} has no option {name!r}", hint=near)


def write_options(instance: Any) -> dict[str, Any]:
    """The options that differ from their defaults, as TOML values (encodings as spec text)."""
    written = {}
    for name, field in option_fields(type(instance)).items():
        value, default = getattr(instance, name), default_of(field)
        if type(value) is not type(default) or value != default:
            written[name] = _write(value)
    return written


def default_of(field: Field[Any]) -> Any:
    """A field's default; `MISSING` when it must be given."""
    return field.default_factory() if field.default_factory is not MISSING else field.default


# annotations --------------------------------------------------------------------------------------------------------
def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _is_a(annotation: Any, base: type[Any]) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, base)


def _is_mapping(annotation: Any) -> bool:
    return get_origin(annotation) in (Mapping, dict)


def _allows_none(annotation: Any) -> bool:
    return annotation is type(None) or (_is_union(annotation) and type(None) in get_args(annotation))


def _unsupported(annotation: Any, top: bool = True) -> str | None:
    """Why values of this type cannot be written in a recipe."""
    if annotation in _PLAIN or _is_a(annotation, Encoding) or get_origin(annotation) is Literal:
        return None
    if annotation is type(None):
        return None if top else "None cannot be written inside another value"
    if _is_a(annotation, enum.Enum):
        return (
            None
            if all(isinstance(member.value, str) for member in annotation)
            else "the values of the Enum are no strings"
        )
    if _is_union(annotation):
        parts = get_args(annotation)
        if str in parts and any(_is_a(part, Encoding) or _is_a(part, enum.Enum) for part in parts):
            return "a union of str with an encoding or an Enum is ambiguous as text"
        return next(filter(None, (_unsupported(part, top) for part in parts)), None)
    if get_origin(annotation) is tuple and get_args(annotation):
        return next(filter(None, (_unsupported(part, False) for part in get_args(annotation) if part is not ...)), None)
    if _is_mapping(annotation) and get_args(annotation)[0] is str:
        return _unsupported(get_args(annotation)[1], False)
    return f"values of type {annotation} cannot be written in a recipe"


def _expected(annotation: Any, in_toml: bool) -> str:
    """What a value of this type looks like in a recipe, or in Python."""
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    if get_origin(annotation) is Literal:
        return " or ".join(_show(value) for value in get_args(annotation))
    if _is_a(annotation, enum.Enum):
        return " or ".join(_show(member.value) for member in annotation) if in_toml else f"a {annotation.__name__}"
    if _is_a(annotation, Encoding):
        example = "IntGrid(bits=4)"
        kind = "an encoding" if annotation is Encoding else f"an encoding {annotation.__name__}"
        return f"{kind} such as {_show(example) if in_toml else example}" if annotation is Encoding else kind
    if _is_union(annotation):
        return " or ".join(_expected(part, in_toml) for part in get_args(annotation) if part is not type(None))
    if get_origin(annotation) is tuple:
        parts, kind = get_args(annotation), "list" if in_toml else "tuple"
        inside = ", ".join(_expected(part, in_toml) for part in parts if part is not ...)
        return f"a {kind} of {inside}" if parts[-1] is ... else f"a {kind} ({inside})"
    return f"a {'table' if in_toml else 'mapping'} of {_expected(get_args(annotation)[1], in_toml)}"


# values -------------------------------------------------------------------------------------------------------------
def _convert_option(name: str, annotation: Any, value: Any, parse: ParseSpec | None, what: str) -> Any:
    try:
        return _convert(annotation, value, parse)
    except _Mismatch:
        choices = _choices(annotation)
        raise PassError(
            codes.BAD_OPTION,
            f"option {name!r} of {what} is {_show(value)}",
            why=f"expected {_expected(annotation, in_toml=parse is not None)}",
            hint=suggestion(value, choices, kind="values") if choices and isinstance(value, str) else "",
        ) from None


def _choices(annotation: Any) -> list[str]:
    if _is_union(annotation):
        return [choice for part in get_args(annotation) for choice in _choices(part)]
    if _is_a(annotation, enum.Enum):
        return [member.value for member in annotation]
    return (
        [value for value in get_args(annotation) if isinstance(value, str)] if get_origin(annotation) is Literal else []
    )


def _convert(annotation: Any, value: Any, parse: ParseSpec | None) -> Any:
    """The value as the annotation has it; `parse` is given when the value comes from TOML. Raises `_Mismatch`."""
    if _is_union(annotation):
        return _convert_union(get_args(annotation), value, parse)
    if annotation in _PLAIN:
        return _convert_plain(annotation, value)
    if get_origin(annotation) is Literal:
        if any(type(value) is type(choice) and value == choice for choice in get_args(annotation)):
            return value
        raise _Mismatch
    if get_origin(annotation) is tuple:
        return _convert_tuple(get_args(annotation), value, parse)
    if _is_mapping(annotation):
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise _Mismatch
        return {key: _convert(get_args(annotation)[1], item, parse) for key, item in value.items()}
    if isinstance(value, annotation):
        return value
    if parse is not None and isinstance(value, str):
        return _parse_text(annotation, value, parse)
    raise _Mismatch


def _convert_plain(annotation: type[Any], value: Any) -> Any:
    if (
        annotation is float
        and isinstance(value, (int, float))
        and not isinstance(value, bool)
        and not math.isnan(value)
    ):
        return value if isinstance(value, float) else float(value)
    if (
        annotation is not float
        and isinstance(value, annotation)
        and (annotation is bool or not isinstance(value, bool))
    ):
        return value
    raise _Mismatch


def _convert_tuple(parts: tuple[Any, ...], value: Any, parse: ParseSpec | None) -> tuple[Any, ...]:
    if not isinstance(value, (tuple, list) if parse is not None else tuple):
        raise _Mismatch
    expected: Sequence[Any] = [parts[0]] * len(value) if parts[-1] is ... else parts
    if len(value) != len(expected):
        raise _Mismatch
    return tuple(_convert(part, item, parse) for part, item in zip(expected, value, strict=True))


def _convert_union(parts: tuple[Any, ...], value: Any, parse: ParseSpec | None) -> Any:
    """The first alternative that fits; an encoding's text is tried last, and its own error is shown when it looks like
    a spec.
    """
    for part in sorted(parts, key=lambda part: _is_a(part, Encoding)):
        text = parse is not None and isinstance(value, str) and _is_a(part, Encoding)
        try:
            return _convert(part, value, parse)
        except _Mismatch:
            continue
        except PassError:
            if text and "(" in value:
                raise
    raise _Mismatch


def _parse_text(annotation: Any, value: str, parse: ParseSpec) -> Any:
    if _is_a(annotation, enum.Enum):
        try:
            return annotation(value)
        except ValueError:
            raise _Mismatch from None
    encoding = parse(value)
    if not isinstance(encoding, annotation):
        raise _Mismatch
    return encoding


def _write(value: Any) -> Any:
    if isinstance(value, Encoding):
        return str(value)
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, tuple):
        return [_write(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _write(item) for key, item in value.items()}
    return value


def _show(value: Any) -> str:
    text = repr(value) if not isinstance(value, bool) else str(value).lower()
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "…"
