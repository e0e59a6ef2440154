"""The `sparc` command."""

import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from sparc.cli import about, bench, compare, compile, inspect
from sparc.cli import run as run_command
from sparc.cli.output import err, print_error
from sparc.cli.root import app
from sparc.diag import SparcError

__all__ = ["app", "main", "run"]

_INTERRUPTED = 130

for _module in (compile, run_command, inspect, compare, bench, about):
    _module.register(app)


def main() -> NoReturn:
    """The entry point of the `sparc` command."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run a command.

    Returns:
        The exit status: 0, 1 for an error that sparc explains, 2 for wrong usage, 130 after Ctrl-C.
    """
    try:
        app(args=list(arguments), prog_name="sparc")
    except SystemExit as done:
        if done.code == _INTERRUPTED:
            err().print("stopped; nothing was saved")
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except SparcError as error:
        print_error(error.diagnostic, as_json="--json" in arguments)
        return 1
    return 0


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    """End as Ctrl-C does, so that temporary files are removed."""
    raise SystemExit(128 + number)
