"""`sparc bench`: how long an artifact takes, alone or interleaved with another."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.text import Text

from sparc import report_data, report_text
from sparc.cache import fit
from sparc.cli.output import out, print_json, say
from sparc.cli.root import AsJson, TaskName, Threads, Trust
from sparc.cli.sizes import Sizes, parse_sizes
from sparc.cli.subject import Subject, load_subject, subject_inputs
from sparc.differences import check_same_inputs
from sparc.ledger import Ratio
from sparc.measure import median_interval, seconds

_WARMUP = 3


@dataclass(frozen=True)
class Timing:
    """Seconds of single calls: median and quartiles."""

    name: str
    runtime: str
    median: float
    lower: float
    upper: float
    calls: int


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("bench")(bench)


def bench(
    subject: Annotated[
        str,
        typer.Argument(metavar="ARTIFACT", help="An artifact's folder, or a model as for compile.", show_default=False),
    ],
    vs: Annotated[
        str | None, typer.Option(help="Another one, timed in turns with the first.", show_default=False)
    ] = None,
    calls: Annotated[int, typer.Option(min=5, help="How many calls of each are timed.")] = 50,
    size: Sizes = None,
    task: TaskName = None,
    threads: Threads = None,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Time an artifact: median and quartiles, and with --vs the ratio to another one from interleaved pairs."""
    sizes = parse_sizes(size or [])
    say(f"loading {subject}")
    named = [subject, *([vs] if vs is not None else [])]
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        spin = vs is None  # idle threads of one session would take time from the other's
        subjects = [load_subject(name, trust=trust, threads=threads, spin=spin, task=task) for name in named]
        for other in subjects[1:]:
            check_same_inputs(subjects[0].program.main.signature, other.program.main.signature)
        inputs = subject_inputs(subjects[0], subjects[-1], sizes)
        times = _interleaved([_thunk(each, inputs) for each in subjects], calls)
    finally:
        torch.set_num_threads(before)
    timings = [_timing(each, measured) for each, measured in zip(subjects, times, strict=True)]
    ratio = _ratio(named[-1], *times) if len(times) == 2 else None
    shapes = {
        name: list(tensor.shape)
        for name, tensor in zip(subjects[0].program.main.signature.input_names, inputs, strict=True)
    }
    if as_json:
        described: dict[str, Any] = {
            "timings": [asdict(each) for each in timings],
            "threads": threads,
            "inputs": shapes,
        }
        print_json({**described, "ratio": asdict(ratio) if ratio is not None else None})
    else:
        _print(timings, ratio, shapes, threads)


def _thunk(subject: Subject, inputs: Sequence[torch.Tensor]) -> Callable[[], object]:
    given = fit(subject.program.main, inputs)
    return lambda: subject.run(given)


def _interleaved(thunks: Sequence[Callable[[], object]], calls: int) -> list[list[float]]:
    """Seconds of `calls` calls of each, in turns whose order alternates."""
    for thunk in thunks:
        for _ in range(_WARMUP):
            thunk()
    times: list[list[float]] = [[] for _ in thunks]
    order = list(range(len(thunks)))
    for _ in track(
        range(calls),
        "timing",
        console=Console(stderr=True),
        transient=True,
        disable=not Console(stderr=True).is_terminal,
    ):
        for index in order:
            times[index].append(seconds(thunks[index]))
        order.reverse()
    return times


def _timing(subject: Subject, times: Sequence[float]) -> Timing:
    lower, middle, upper = statistics.quantiles(times, n=4)
    return Timing(subject.name, subject.runtime, middle, lower, upper, len(times))


def _ratio(against: str, ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    return Ratio(against, *median_interval([a / b for a, b in zip(ours, theirs, strict=True)]), len(ours))


def _print(timings: Sequence[Timing], ratio: Ratio | None, shapes: dict[str, list[int]], threads: int | None) -> None:
    console = out()
    inputs = ", ".join(f"{name} {'×'.join(map(str, shape)) or 'scalar'}" for name, shape in shapes.items())
    counted = f"{threads} threads" if threads is not None else "threads: the runtime's choice"
    console.print(Text(f"{inputs}; {counted}", style="dim"))
    table = report_text.titled("", "what", "runtime", ">median", ">lower quartile", ">upper quartile", ">calls")
    for each in timings:
        figures = (f"{1000 * value:.3f} ms" for value in (each.median, each.lower, each.upper))
        table.add_row(Text(each.name), each.runtime, *figures, str(each.calls))
    console.print(table)
    if ratio is not None:
        against = f"the time of {ratio.against} ({ratio.pairs} pairs, 95% interval)"
        line = f"{timings[0].name} takes {report_data.ratio_text(ratio)} {against}"
        console.print(Text(line, style="green" if ratio.high < 1 else "red" if ratio.low > 1 else "yellow"))
