"""Times ONNX files in turns, in a process of its own whose sessions share one pool of threads.

With a pool for each session, as is ONNX Runtime's default, the idle threads of one session go on spinning for a while
after its run and take processor time from the next session's: called in turns, both then take up to twice as long as
alone. A process has either the shared pool or pools per session, so timing is done in another one.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import typer
from numpy.typing import NDArray
from torch import Tensor

from sparc.measure import paired_ratio

PAIRS = 200


def compare(
    ours: Path, contenders: Mapping[str, Path], inputs: Mapping[str, Tensor], threads: int, pairs: int = PAIRS
) -> list[dict[str, Any]]:
    """Paired, interleaved ratios of `ours` to every contender, and to itself as the control.

    Args:
        ours: an ONNX file.
        contenders: ONNX files with inputs of the same names, by what to call them.
        inputs: what to run all of them on.
        threads: threads of all sessions together.
        pairs: how many pairs of runs.
    """
    with tempfile.TemporaryDirectory() as folder:
        arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in inputs.items()}
        np.savez(Path(folder) / "inputs.npz", **arrays)
        named = [f"{name}={path}" for name, path in {"itself (control)": ours, **contenders}.items()]
        command = [sys.executable, "-m", "benchmarks.timing", str(ours), *named, "--threads", str(threads)]
        command += ["--pairs", str(pairs)]
        done = subprocess.run(
            [*command, "--inputs", str(Path(folder) / "inputs.npz")], check=True, stdout=subprocess.PIPE, text=True
        )
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def main(
    ours: Path, contenders: list[str], inputs: Path = Path("inputs.npz"), threads: int = 2, pairs: int = PAIRS
) -> None:
    """Print the ratios as JSON; contenders are NAME=FILE."""
    ort.set_global_thread_pool_sizes(threads, 1)
    feeds = {name: array for name, array in np.load(inputs).items()}
    run = _runner(ours, feeds)
    rows = []
    for contender in contenders:
        name, _, path = contender.partition("=")
        other = run if Path(path) == ours else _runner(Path(path), feeds)
        rows.append(asdict(paired_ratio(run, other, name, pairs=pairs, budget=1e9, warmup=5)))
    typer.echo(json.dumps(rows))


def _runner(path: Path, feeds: Mapping[str, NDArray[Any]]) -> Callable[[], object]:
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, dict(feeds))


if __name__ == "__main__":
    typer.run(main)
