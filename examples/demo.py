"""Compile three real models and show the report: what `make demo` runs.

python -m examples.demo [--folder out] [--only minilm]
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

import sparc
from examples.models.efficientnet import efficientnet
from examples.models.minilm import minilm
from examples.models.smollm2 import smollm2

CASES: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "minilm": (minilm, "w8a8"),
    "efficientnet": (efficientnet, "w8a8-static"),
    "smollm2": (smollm2, "w4"),
}


def main(folder: Path = Path("out"), only: str = "") -> None:
    """Compile each model, print its report, and save artifact and HTML report under `folder`."""
    console = Console()
    for name, (arguments, recipe) in CASES.items():
        if only and name != only:
            continue
        console.rule(f"[bold]{name}[/bold], recipe {recipe}")
        started = time.perf_counter()
        artifact = sparc.compile(**arguments(), recipe=recipe, target="onnx")
        console.print(str(artifact.report))
        artifact.save(folder / name)
        artifact.report.to_html(folder / f"{name}.html")
        console.print(
            f"{name}: {time.perf_counter() - started:.0f} s; saved {folder / name}, report {folder / name}.html"
        )


if __name__ == "__main__":
    typer.run(main)
