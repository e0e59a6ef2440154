"""Ledger and diagnostics as JSON. Seconds and latencies are kept apart: they differ from run to run."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from sparc import codes
from sparc.codes import Code
from sparc.diag import Diagnostic, Diagnostics, Location, Severity
from sparc.ledger import Ledger, PassRow, Ratio, SiteRow, SkipRow, Summary
from sparc.serialize import schema
from sparc.serialize.schema import malformed

Row = TypeVar("Row", PassRow, SiteRow, SkipRow, Summary, Ratio)
_CODE = re.compile(r"[A-Z][A-Z0-9_]{2,31}")


def records_to_dict(ledger: Ledger, diagnostics: Iterable[Diagnostic]) -> dict[str, Any]:
    """`{"passes", "sites", "summary", "diagnostics"}`, without seconds and latencies."""
    described = ledger.to_dict()
    for row in described["passes"]:
        del row["seconds"]
    del described["summary"]["latencies"]
    described["diagnostics"] = [each.to_dict() for each in diagnostics]
    return finite(described)


def timings_to_dict(ledger: Ledger) -> dict[str, Any]:
    """`{"seconds": one per pass, "latencies": [...]}`."""
    described = ledger.to_dict()
    return finite(
        {"seconds": [row["seconds"] for row in described["passes"]], "latencies": described["summary"]["latencies"]}
    )


def finite(value: Any) -> Any:
    """The value with floats that JSON lacks as the strings `inf`, `-inf`, `nan`."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def records_from_dict(described: Any, timings: Any = None) -> tuple[Ledger, Diagnostics]:
    """The inverse of `records_to_dict`, with the timings if there are any.

    Raises:
        ArtifactError: SPARC503.
    """
    with schema.reading("report.json"):
        found = schema.fields(described, "report.json", ["passes", "sites", "summary", "diagnostics"])
        ledger = Ledger(
            [_pass_row(row) for row in schema.items(found["passes"], "passes")],
            [_row(SiteRow, row) for row in schema.items(found["sites"], "sites")],
            _summary(found["summary"]),
        )
        diagnostics = Diagnostics()
        for each in schema.items(found["diagnostics"], "diagnostics"):
            diagnostics.add(_diagnostic(each))
    if timings is not None:
        with schema.reading("timings.json"):
            _add_timings(ledger, timings)
    return ledger, diagnostics


def _row(kind: type[Row], described: Any) -> Row:
    """A dataclass of plain values whose declared types are checked."""
    known = {field.name: field for field in fields(kind)}
    required = [name for name, field in known.items() if field.default is MISSING and field.default_factory is MISSING]
    found = schema.fields(described, kind.__name__, required, list(known))
    for name, value in found.items():
        if not _fits(known[name].type, value):
            raise malformed(f"{name} of {kind.__name__} is malformed", repr(value)[:80])
    return kind(
        **{name: _number(value) if "float" in str(known[name].type) else value for name, value in found.items()}
    )


def _fits(kind: Any, value: Any) -> bool:
    if kind is str:
        return isinstance(value, str)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is float:
        return _is_number(value)
    return value is None or _is_number(value) or isinstance(value, (list, dict))


def _is_number(value: Any) -> bool:
    return (isinstance(value, (int, float)) and not isinstance(value, bool)) or value in ("inf", "-inf", "nan")


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) else value


def _figures(value: Any) -> dict[str, float]:
    found = schema.entries(value, "figures")
    if not all(_is_number(each) for each in found.values()):
        raise malformed("figures are no numbers")
    return {name: _number(each) for name, each in found.items()}


def _pass_row(described: Any) -> PassRow:
    found = dict(schema.mapping(described, "a pass"))
    found["skips"] = [_row(SkipRow, row) for row in schema.items(found.get("skips", []), "skips")]
    found["measured"] = _figures(found.get("measured", {}))
    return _row(PassRow, found)


def _summary(described: Any) -> Summary:
    found = dict(schema.mapping(described, "the summary"))
    if "latencies" in found:
        raise malformed("the summary has an unknown key 'latencies'")
    errors = schema.entries(found.get("errors", {}), "errors")
    found["errors"] = {name: _figures(figures) for name, figures in errors.items()}
    found["parity"] = _figures(found.get("parity", {}))
    return _row(Summary, found)


def _add_timings(ledger: Ledger, timings: Any) -> None:
    found = schema.fields(timings, "timings.json", ["seconds", "latencies"])
    for row, seconds in zip(ledger.passes, schema.items(found["seconds"], "seconds"), strict=True):
        row.seconds = float(seconds)
    ledger.summary.latencies = [_row(Ratio, row) for row in schema.items(found["latencies"], "latencies")]


def _diagnostic(described: Any) -> Diagnostic:
    found = schema.fields(described, "a diagnostic", ["code", "severity", "what", "where", "why", "hint"])
    where = schema.fields(found["where"], "a place", ["module", "source"])
    what, why, hint = (schema.text(found[key], key, 1 << 16) for key in ("what", "why", "hint"))
    module, source = (schema.text(where[key], key) for key in ("module", "source"))
    identifier = schema.text(found["code"], "a code", 32)
    if not _CODE.fullmatch(identifier):
        raise malformed(f"{identifier!r} is no code")
    code = codes.catalogue().get(identifier, Code(identifier, ""))
    return Diagnostic(
        code, what, Location(module, source), why, "" if hint == code.hint else hint, Severity(found["severity"])
    )
