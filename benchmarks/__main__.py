"""`python -m benchmarks [CASE...]`: cases of the main job, each in a process of its own so that memory and caches start
fresh.
"""

import subprocess
import sys
from typing import Annotated

import typer

CASES = ("minilm", "efficientnet", "smollm2", "twin", "compile-time")


def main(
    cases: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(CASES)}; all by default.")] = None,
) -> None:
    """Run benchmark cases one after another and write `benchmarks/results/CASE.json`."""
    chosen = cases or CASES
    for case in chosen:
        if case not in CASES:
            raise typer.BadParameter(f"{case!r} is none of {', '.join(CASES)}")
    failed = [case for case in chosen if not _run(case)]
    if failed:
        typer.echo(f"failed: {', '.join(failed)}", err=True)
        raise typer.Exit(1)


def _run(case: str) -> bool:
    return subprocess.run([sys.executable, "-m", "benchmarks.main_job", case], check=False).returncode == 0


if __name__ == "__main__":
    typer.run(main)
