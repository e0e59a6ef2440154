"""Reading an encoding's spec text, the inverse of `str(encoding)`: known names and literals, nothing is evaluated."""

import ast
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from sparc import codes
from sparc.diag import PassError
from sparc.encoding.base import Encoding
from sparc.encoding.binary_code import BinaryCode
from sparc.encoding.blocks import Blocks
from sparc.encoding.codebook import Codebook
from sparc.encoding.dense import Dense
from sparc.encoding.float8 import Float8
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.microscaling import MXFP4, NVFP4
from sparc.encoding.nm import NM
from sparc.encoding.unstructured import Unstructured
from sparc.suggest import hint as suggestion

_ELEMENTS: tuple[type[Encoding], ...] = (Dense, IntGrid, Float8, MXFP4, NVFP4, Codebook, BinaryCode)
_MASKS: tuple[type[Encoding], ...] = (NM, Blocks, Unstructured)
BUILTIN: Mapping[str, type[Encoding]] = MappingProxyType({cls.__name__: cls for cls in _ELEMENTS + _MASKS})
MAX_LENGTH = 1000
MAX_DEPTH = 8


def parse_spec(text: str, known: Mapping[str, type[Encoding]] = BUILTIN) -> Encoding:
    """The encoding that a text such as `NM(n=2, m=4, of=IntGrid(bits=4, group=128))` names.

    Args:
        text: at most 1000 characters, brackets nested at most 8 deep.
        known: the encodings a text may name.

    Raises:
        PassError: SPARC201 for a name that is not known, SPARC209 for anything else that is wrong.
    """
    if not isinstance(text, str) or len(text) > MAX_LENGTH or _depth(text) > MAX_DEPTH:
        raise _bad(text, f"a spec has at most {MAX_LENGTH} characters, nested at most {MAX_DEPTH} deep")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise _bad(text, "it is not written like a call") from None
    encoding = _value(tree.body, text, known)
    if not isinstance(encoding, Encoding):
        raise _bad(text, "it names no encoding")
    return encoding


def _value(node: ast.expr, text: str, known: Mapping[str, type[Encoding]]) -> Any:
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)) if not isinstance(
            number, bool
        ):
            return -number
        case ast.Tuple(elts=items) | ast.List(elts=items):
            return tuple(_value(item, text, known) for item in items)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            positional = [_value(arg, text, known) for arg in args]
            named = {str(keyword.arg): _value(keyword.value, text, known) for keyword in keywords}
            if any(keyword.arg is None for keyword in keywords) or len(named) < len(keywords):
                raise _bad(text, "it gives an option twice, or unpacks a mapping")
            return _build(name, positional, named, text, known)
        case ast.Name(id=name):
            raise _bad(
                text,
                f"{name} is neither a literal nor a call",
                hint=f"write {name}(...)" if name in known else f'write "{name}"',
            )
    raise _bad(text, f"it holds a {type(node).__name__}, which is neither a literal nor a call of a known name")


def _build(
    name: str, args: list[Any], options: dict[str, Any], text: str, known: Mapping[str, type[Encoding]]
) -> Encoding:
    if name not in known:
        why = f"known are {', '.join(sorted(known))}"
        raise PassError(
            codes.UNKNOWN_NAME, f"unknown encoding {name!r}", why=why, hint=suggestion(name, known, kind="encodings")
        )
    fields = known[name].__dataclass_fields__
    for option in options:
        if option not in fields:
            raise _bad(text, f"{name} has no option {option!r}", hint=suggestion(option, fields, kind="options"))
    try:
        return known[name](*args, **options)
    except (TypeError, ValueError) as error:
        raise _bad(text, str(error)) from None


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _bad(text: object, why: str, hint: str = "") -> PassError:
    shown = text if isinstance(text, str) and len(text) <= 100 else f"{str(text)[:100]}..."
    return PassError(codes.BAD_OPTION, f"the encoding {shown!r} cannot be read", why=why, hint=hint)
