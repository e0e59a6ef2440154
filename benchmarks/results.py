"""Benchmark results: a table on the terminal, and JSON beside the benchmark that made it."""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from rich.console import Console
from rich.table import Table

from sparc.ledger import Ratio

FOLDER = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """What a figure depends on: processor, threads and library versions."""
    model = next(
        (line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor()
    )
    return {
        "processor": model,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


def _cpuinfo() -> Sequence[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else ()


def peak_bytes() -> int:
    """The process's own peak; what getrusage says is inherited from the process that started it."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def ratio_text(row: Mapping[str, Any] | Ratio) -> str:
    """`0.62 [0.60, 0.64]`."""
    values = row if isinstance(row, Mapping) else asdict(row)
    return f"{values['median']:.2f} [{values['low']:.2f}, {values['high']:.2f}]"


def save(name: str, figures: Mapping[str, Any]) -> Path:
    """Write figures with the machine they were taken on."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **figures}, indent=1) + "\n")
    return path


def place(text: str, mark: str, content: str) -> str:
    """A page with `content` between its lines `<!-- mark -->` and `<!-- end mark -->`."""
    start, end = f"<!-- {mark} -->", f"<!-- end {mark} -->"
    before, rest = text.split(start)
    return f"{before}{start}\n{content}\n{end}{rest.split(end)[1]}"


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as a table; the columns are the keys of the first."""
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
