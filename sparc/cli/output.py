"""What commands print: text through rich, or one JSON document; diagnostics on stderr."""

import json
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from sparc.diag import Diagnostic
from sparc.serialize.records import finite

_WIDTH = 120


def out() -> Console:
    """The console of results; where it is no terminal, lines are 120 wide."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)


def err() -> Console:
    """The console of messages."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print one JSON document; infinities and NaN become strings."""
    sys.stdout.write(json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


def print_error(diagnostic: Diagnostic, *, as_json: bool) -> None:
    """Say what went wrong, on stderr, and as JSON on stdout when that was asked for."""
    if as_json:
        print_json({"error": diagnostic.to_dict()})
    first, _, rest = str(diagnostic).partition("\n")
    text = Text(first, style="bold red")
    err().print(text.append("\n" + rest, style="default") if rest else text)


def say(message: str) -> None:
    """Tell somebody who is watching what is being done; silent when stderr is no terminal."""
    if sys.stderr.isatty():
        err().print(Text(message, style="dim"))
