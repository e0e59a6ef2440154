"""Diagnostics: what sparc says when something failed, was skipped, or fell back.

Every diagnostic carries a stable code from `sparc.codes` and answers five questions: what happened, where in the user's
model, why, what to do next, and how bad it is. An error is raised as a `SparcError`; everything else is collected in a
`Diagnostics` list that the report shows.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from sparc.codes import Code


class Severity(StrEnum):
    """How bad it is: an error stops the work, a warning changes what the user gets, a remark explains what was not
    done.
    """

    ERROR = "error"
    WARNING = "warning"
    REMARK = "remark"


@dataclass(frozen=True)
class Location:
    """A place in the user's model: the module path (`layers.0.mlp`) and the source line (`model.py:12 in forward`)."""

    module: str = ""
    source: str = ""

    def __str__(self) -> str:
        return " at ".join(part for part in (self.module, self.source) if part)


@dataclass(frozen=True)
class Diagnostic:
    """One statement about the compilation, with a stable code."""

    code: Code
    what: str
    where: Location = field(default_factory=Location)
    why: str = ""
    hint: str = ""
    severity: Severity = Severity.REMARK

    def __str__(self) -> str:
        lines = [f"{self.severity} {self.code.id}: {self.what}"]
        if str(self.where):
            lines.append(f"  where: {self.where}")
        if self.why:
            lines.append(f"  why:   {self.why}")
        hint = self.hint or self.code.hint
        if hint:
            lines.append(f"  next:  {hint}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The diagnostic as JSON-ready values."""
        return {
            "code": self.code.id,
            "severity": str(self.severity),
            "what": self.what,
            "where": asdict(self.where),
            "why": self.why,
            "hint": self.hint or self.code.hint,
        }


class SparcError(Exception):
    """The base of every error sparc raises on purpose; `error.diagnostic` says what, where, why and what to do next."""

    def __init__(self, code: Code, what: str, *, where: Location | None = None, why: str = "", hint: str = "") -> None:
        """Args are those of `Diagnostic`; `str(error)` is its full text."""
        self.diagnostic = Diagnostic(code, what, where or Location(), why, hint, Severity.ERROR)
        super().__init__(str(self.diagnostic))

    @property
    def code(self) -> str:
        """The stable code, such as `SPARC101`."""
        return self.diagnostic.code.id


class SparcWarning(UserWarning):
    """The user gets something other than what was asked for, where no report would be read."""


class CaptureError(SparcError):
    """The model or its inputs could not be captured (SPARC1xx)."""


class PassError(SparcError):
    """A pass, a recipe or a selector is wrong, or a pass could not do its work (SPARC2xx)."""


class VerifyError(SparcError):
    """A check failed: the program no longer computes what its contract promises (SPARC3xx)."""


class LoweringError(SparcError):
    """A program could not be lowered to the target (SPARC4xx)."""


class ArtifactError(SparcError):
    """An artifact could not be written, read or called (SPARC5xx)."""


class Diagnostics:
    """The warnings and remarks of one compilation, in order, each said once."""

    def __init__(self) -> None:
        self._items: dict[Diagnostic, None] = {}

    def add(self, diagnostic: Diagnostic) -> None:
        """Keep `diagnostic`, unless the same one was kept before."""
        self._items.setdefault(diagnostic)

    def remark(self, code: Code, what: str, *, where: Location | None = None, why: str = "", hint: str = "") -> None:
        """Say why something was not done."""
        self.add(Diagnostic(code, what, where or Location(), why, hint, Severity.REMARK))

    def warn(self, code: Code, what: str, *, where: Location | None = None, why: str = "", hint: str = "") -> None:
        """Say that the user gets something other than what was asked for."""
        self.add(Diagnostic(code, what, where or Location(), why, hint, Severity.WARNING))

    def __contains__(self, diagnostic: object) -> bool:
        return diagnostic in self._items

    def __iter__(self) -> Iterator[Diagnostic]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)
