"""What a compilation did, gained and cost: on the terminal, as JSON, and as one HTML file that opens offline."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from sparc import files, report_text
from sparc.diag import Diagnostic
from sparc.ledger import Ledger
from sparc.report_html import page
from sparc.serialize.records import finite


class Report:
    """The ledger and the diagnostics of one compilation; `print(report)` shows them."""

    def __init__(self, ledger: Ledger, diagnostics: Iterable[Diagnostic]) -> None:
        """Args: the records."""
        self.ledger = ledger
        self.diagnostics = list(diagnostics)

    def __str__(self) -> str:
        return report_text.to_text(report_text.render(self.ledger, self.diagnostics))

    def render(self, console: Console | None = None, *, everything: bool = False) -> None:
        """Print the report.

        Args:
            console: where to; the terminal by default.
            everything: every site and remark instead of the worst and the counts.
        """
        (console or Console()).print(report_text.render(self.ledger, self.diagnostics, everything=everything))

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values, seconds and latencies included; infinities and NaN as strings."""
        described: dict[str, Any] = finite(self.ledger.to_dict())
        described["diagnostics"] = [each.to_dict() for each in self.diagnostics]
        return described

    def html(self, title: str = "sparc report") -> str:
        """The report as one page without external parts."""
        return page(self.ledger, self.diagnostics, title)

    def to_html(self, path: str | Path, title: str = "sparc report") -> Path:
        """Write the page, whole or not at all.

        Raises:
            ArtifactError: SPARC505 when it cannot be written.
        """
        files.replace_file(path, self.html(title).encode())
        return Path(path)
