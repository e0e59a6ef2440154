"""PATH_OR_IMPORT: where the command line gets a model and compile's other arguments from."""

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from sparc import codes
from sparc.cli.huggingface import load_folder, load_gguf
from sparc.diag import CaptureError, Location
from sparc.source import raised_at
from sparc.suggest import hint


@dataclass(frozen=True)
class Source:
    """Arguments of `sparc.compile`, by name; None where the model's author left it to the user.

    `attachments` are files to save beside the model: its tokenizer.
    """

    model: Any
    example_inputs: Any = None
    dynamic: Any = None
    data: Any = None
    metric: Any = None
    recipe: Any = None
    target: str | None = None
    verify: str | None = None
    options: Mapping[str, Any] | None = None
    task: str | None = None
    attachments: Mapping[str, bytes] | None = None


def load_source(named: str, *, trust: bool = False) -> Source:
    """The model that PATH_OR_IMPORT names.

    Args:
        named: `pkg.mod:fn`, a Hugging Face folder, a `.gguf` file, or a `.pt2` file.
        trust: whether a `.pt2` file may be read.

    Raises:
        CaptureError: SPARC110; SPARC106 and SPARC116 to SPARC119 for compressed checkpoints.
    """
    path = Path(named)
    if path.suffix == ".pt2":
        return _exported(path, trust)
    if path.is_dir():
        return Source(**load_folder(path))
    if path.suffix == ".gguf" and path.is_file():
        return Source(**load_gguf(path))
    if path.exists():
        raise failed(f"{named} is no folder, no .gguf file, no .pt2 file and no import name")
    if ":" not in named:
        raise failed(f"there is no folder {named!r}", hint="a function is written pkg.mod:fn")
    made = call(named)
    if not isinstance(made, Mapping):
        raise failed(
            f"{named} returned a {type(made).__name__}",
            why="compile's arguments were expected",
            hint='return {"model": model, "example_inputs": {...}}',
        )
    return _from_mapping(named, made)


def call(named: str) -> Any:
    """What the function `pkg.mod:fn` returns; the current folder is on the import path.

    Raises:
        CaptureError: SPARC110 when it cannot be imported or raises.
    """
    function = _import(named)
    if not callable(function):
        return function
    with _explained(f"{named} failed"):
        return function()


def call_lazily(named: str) -> Callable[[], Any]:
    """The function `pkg.mod:fn`, for compile's `data=`; a value that is no function is returned by one."""
    found = _import(named)
    return found if callable(found) else lambda: found


def failed(what: str, *, why: str = "", hint: str = "", where: Location | None = None) -> CaptureError:
    """A SPARC110 to raise."""
    return CaptureError(codes.LOAD_FAILED, what, why=why, hint=hint, where=where)


def _import(named: str) -> Any:
    module_name, _, attribute = named.partition(":")
    if module_name.endswith(".py"):
        importable = module_name.removesuffix(".py").replace("/", ".").strip(".")
        raise failed(f"{named!r} is no import name", why="it names a file", hint=f"write {importable}:{attribute}")
    if not all(part.isidentifier() for part in [*module_name.split("."), *attribute.split(".")]):
        raise failed(f"{named!r} is no import name", hint="write pkg.mod:fn")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    with _explained(f"module {module_name!r} cannot be imported"):
        value: Any = importlib.import_module(module_name)
    for part in attribute.split("."):
        if not hasattr(value, part):
            public = [name for name in dir(value) if not name.startswith("_")]
            raise failed(f"{module_name!r} has no {part!r}", hint=hint(part, public))
        value = getattr(value, part)
    return value


def _from_mapping(named: str, made: Mapping[str, Any]) -> Source:
    known = [field.name for field in fields(Source)]
    for key in made:
        if key not in known:
            raise failed(f"{named} returned {key!r}, which is no argument of compile", hint=hint(str(key), known))
    needed = ("model",) if made.get("task") else ("model", "example_inputs")
    for key in needed:
        if key not in made:
            raise failed(f"{named} returned no {key!r}", hint='return {"model": model, "example_inputs": {...}}')
    return Source(**made)


def _exported(path: Path, trust: bool) -> Source:
    if not path.is_file():
        raise failed(f"there is no file {str(path)!r}")
    if not trust:
        raise failed(
            f"{path.name} is not read without --trust",
            why="torch reads a .pt2 file by unpickling, which can run code that it carries",
            hint="add --trust if you know where the file comes from",
        )
    with _explained(f"{path.name} cannot be read"):
        exported = torch.export.load(path)
    examples = exported.example_inputs
    if examples is None:
        raise failed(f"{path.name} carries no example inputs", hint="export it again with torch.export.export and save")
    positional, named = examples
    return Source(exported, (*positional, *named.values()))


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn whatever somebody else's code raises into a SPARC110 with that code's own line."""
    try:
        yield
    except CaptureError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        raise failed(what, why=why, where=raised_at(error)) from None
