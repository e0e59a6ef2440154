"""What a compilation did, gained and cost, for the terminal, as JSON and as one HTML file."""

from collections.abc import Iterable
from typing import Any

from sparc.diag import Diagnostic
from sparc.ledger import Ledger
from sparc.serialize.records import finite


class Report:
    """The ledger and the diagnostics of one compilation."""

    def __init__(self, ledger: Ledger, diagnostics: Iterable[Diagnostic]) -> None:
        """Args: the records."""
        self.ledger = ledger
        self.diagnostics = list(diagnostics)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values, seconds and latencies included."""
        described: dict[str, Any] = finite(self.ledger.to_dict())
        described["diagnostics"] = [each.to_dict() for each in self.diagnostics]
        return described
