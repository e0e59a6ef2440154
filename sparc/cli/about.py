"""`sparc explain`, `sparc passes`, `sparc env`: what sparc knows, and what it runs on."""

import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from importlib import metadata
from inspect import getdoc
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from rich.text import Text

from sparc import codes, report_text
from sparc.artifact import sparc_version
from sparc.cli.output import out, print_json
from sparc.cli.root import AsJson
from sparc.diag import PassError
from sparc.suggest import hint, nearest

_PACKAGES = (
    "torch",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "safetensors",
    "numpy",
    "transformers",
)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("explain")(explain)
    app.command("passes")(passes)
    app.command("env")(environment)


# explain --------------------------------------------------------------------------------------------------------------
def explain(
    code: Annotated[
        str | None, typer.Argument(metavar="CODE", help="Such as SPARC203; all codes by default.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Explain a diagnostic's code: what it means and what to do."""
    catalogue = codes.catalogue()
    if code is None:
        _list_codes(catalogue, as_json)
        return
    wanted = code.upper() if code.upper().startswith("SPARC") else f"SPARC{code}"
    if wanted not in catalogue:
        close = nearest(wanted, catalogue)
        titles = ", ".join(f"{each} ({catalogue[each].title})" for each in close)
        raise PassError(
            codes.UNKNOWN_NAME,
            f"there is no code {code!r}",
            hint=f"near: {titles}" if close else "sparc explain lists all codes",
        )
    found = catalogue[wanted]
    if as_json:
        print_json({"code": found.id, "title": found.title, "meaning": found.meaning, "hint": found.hint})
        return
    console = out()
    console.print(Text(f"{found.id}: {found.title}", style="bold"))
    for text in (found.meaning, f"Next: {found.hint}." if found.hint else ""):
        if text:
            console.print(Text("\n" + text))


def _list_codes(catalogue: Mapping[str, codes.Code], as_json: bool) -> None:
    if as_json:
        print_json({code.id: code.title for code in catalogue.values()})
        return
    for code in catalogue.values():
        out().print(Text(f"{code.id}  {code.title}"))


# passes ---------------------------------------------------------------------------------------------------------------
def passes(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="One pass, encoding, recipe or target in full.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List what is registered, by sparc and by extensions: passes with options, encodings, recipes, targets."""
    from sparc import api

    known = api.registry()
    described = {
        "passes": [_described_class(key, each, stage=each.stage.name.lower()) for key, each in known.passes.items()],
        "encodings": [_described_class(key, each) for key, each in known.encodings.items()],
        "recipes": [
            {"name": key, "steps": [str(step) for step in each.steps], "goal": each.goal}
            for key, each in known.recipes.items()
        ],
        "targets": [{"name": key, "doc": _first_line(type(each))} for key, each in known.targets.items()],
    }
    if name is not None:
        _show_one(name, described, {**known.passes, **known.encodings, **known.recipes, **known.targets}, as_json)
    elif as_json:
        print_json(described)
    else:
        for kind, rows in described.items():
            out().print(_listing(kind, rows))
            out().print()


def _described_class(name: str, owner: type[Any], **more: Any) -> dict[str, Any]:
    return {"name": name, **more, "doc": _first_line(owner), "options": _options(owner)}


def _options(owner: type[Any]) -> dict[str, str]:
    """The options of a pass or an encoding, with their defaults as text."""
    if not is_dataclass(owner):
        return {}
    return {each.name: "" if each.default is MISSING else _short(each.default) for each in fields(owner)}


def _short(value: Any) -> str:
    text = str(value) if is_dataclass(value) else repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


def _first_line(owner: Any) -> str:
    return (getdoc(owner) or "").strip().partition("\n")[0]


def _listing(kind: str, rows: Iterable[Mapping[str, Any]]) -> Table:
    table = report_text.titled(
        kind.capitalize(),
        "name",
        *(["stage"] if kind == "passes" else []),
        "what",
        "options" if kind != "targets" else "",
    )
    for row in rows:
        what = row.get("doc") or ", ".join(row.get("steps", ()))
        options = ", ".join(f"{key}={value}" if value else key for key, value in row.get("options", {}).items())
        cells = [row["name"], *([row["stage"]] if kind == "passes" else []), what, options]
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _show_one(
    name: str, described: Mapping[str, list[dict[str, Any]]], objects: Mapping[str, Any], as_json: bool
) -> None:
    rows = {
        row["name"]: {"kind": kind.removesuffix("s"), **row} for kind, members in described.items() for row in members
    }
    if name not in rows:
        raise PassError(codes.UNKNOWN_NAME, f"nothing is registered as {name!r}", hint=hint(name, rows))
    if as_json:
        print_json(rows[name])
        return
    found = objects[name]
    out().print(Text(f"{rows[name]['kind']} {name}", style="bold"))
    text = str(found) if "steps" in rows[name] else getdoc(found if isinstance(found, type) else type(found)) or ""
    out().print(Text("\n" + text))
    for key, value in rows[name].get("options", {}).items():
        out().print(Text(f"  {key} = {value}" if value else f"  {key}"))


# env ------------------------------------------------------------------------------------------------------------------
def environment(as_json: AsJson = False) -> None:
    """Show versions, runtimes, processor and threads: what to send with a report of a fault."""
    facts = {
        "sparc": sparc_version(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "onnxruntime providers": _providers(),
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "processors": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "cuda device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    if as_json:
        print_json(facts)
        return
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    for key, value in facts.items():
        if isinstance(value, Mapping):
            for name, version in value.items():
                grid.add_row(name, Text(version))
        else:
            grid.add_row(
                key, Text(", ".join(value) if isinstance(value, list) else "none" if value is None else str(value))
            )
    out().print(grid)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _providers() -> list[str]:
    try:
        import onnxruntime
    except ImportError:
        return []
    return list(onnxruntime.get_available_providers())


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.processor() or "unknown",
    )
