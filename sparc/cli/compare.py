"""`sparc compare`: how far apart two artifacts are, or an artifact and its model."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.text import Text

from sparc import codes, report_data, report_text
from sparc.cache import fit
from sparc.cli.output import out, print_json, say
from sparc.cli.root import AsJson, TaskName, Threads, Trust
from sparc.cli.sizes import Sizes, parse_sizes
from sparc.cli.subject import Subject, load_subject, subject_inputs
from sparc.diag import VerifyError
from sparc.differences import Difference, check_same_inputs, layer_differences, output_differences, worst_first

_SHOWN = 20


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("compare")(compare)


def compare(
    first: Annotated[
        str, typer.Argument(metavar="A", help="An artifact's folder, or a model as for compile.", show_default=False)
    ],
    second: Annotated[
        str, typer.Argument(metavar="B", help="What to compare it with: the reference.", show_default=False)
    ],
    layers: Annotated[bool, typer.Option("--layers", help="Also compare every layer, in eager torch.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Show every layer, not only the worst.")] = False,
    tolerance: Annotated[
        float | None, typer.Option(help="Fail when an output needs a larger one, as rtol and atol.", show_default=False)
    ] = None,
    size: Sizes = None,
    task: TaskName = None,
    seed: Annotated[int, typer.Option(help="Seed of random inputs, where neither has example inputs.")] = 0,
    threads: Threads = None,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Compare two artifacts, or an artifact and a model: outputs, and with --layers where the difference comes from."""
    sizes = parse_sizes(size or [])
    say(f"loading {first} and {second}")
    ours, reference = (load_subject(named, trust=trust, threads=threads, task=task) for named in (first, second))
    check_same_inputs(reference.program.main.signature, ours.program.main.signature)
    inputs = subject_inputs(reference, ours, sizes, seed)
    names = reference.program.main.signature.output_names
    caches = [each.program.main.cache for each in (reference, ours)]
    cut = {slot.output for cache in caches if cache is not None for slot in cache.slots if slot.kept}
    given = [fit(each.program.main, inputs) for each in (reference, ours)]
    outputs = output_differences(names, reference.run(given[0]), ours.run(given[1]), cut)
    found = layer_differences(reference.program, ours.program, inputs) if layers else []
    if as_json:
        print_json(_as_json(ours, reference, outputs, found))
    else:
        _print(ours, reference, outputs, found, everything)
    _judge(outputs, tolerance)


def _as_json(
    ours: Subject, reference: Subject, outputs: Sequence[Difference], layers: Sequence[Difference]
) -> dict[str, Any]:
    return {
        "compared": {"name": ours.name, "runtime": ours.runtime},
        "reference": {"name": reference.name, "runtime": reference.runtime},
        "outputs": [asdict(each) for each in worst_first(outputs)],
        "layers": [asdict(each) for each in worst_first(layers)],
    }


def _print(
    ours: Subject, reference: Subject, outputs: Sequence[Difference], layers: Sequence[Difference], everything: bool
) -> None:
    console = out()
    console.print(Text(f"{ours.name} ({ours.runtime}) against {reference.name} ({reference.runtime})", style="bold"))
    console.print(
        "[dim]tolerance: the smallest that passes, as rtol and atol; p99, p90: the same for 99% and 90% of the elements"
    )
    console.print()
    table = report_text.titled("Outputs", "output", ">tolerance", ">p99", ">p90", ">S/N", ">cosine")
    for each in worst_first(outputs):
        table.add_row(Text(each.name), *_figures(each), f"{each.cosine:.6f}")
    console.print(table)
    if layers:
        shown = worst_first(layers) if everything else worst_first(layers)[:_SHOWN]
        title = (
            f"Layers: the worst {len(shown)} of {len(layers)} in both programs"
            if len(shown) < len(layers)
            else "Layers"
        )
        table = report_text.titled(title, "layer", "operator", ">tolerance", ">p99", ">p90", ">S/N", "source")
        for each in shown:
            table.add_row(
                Text(each.module or each.name),
                Text(each.operator),
                *_figures(each),
                Text(report_data.source_text(each.source), style="dim"),
            )
        console.print()
        console.print(table)


def _figures(each: Difference) -> tuple[str, ...]:
    return f"{each.tolerance:.1e}", f"{each.p99:.1e}", f"{each.p90:.1e}", report_data.decibel_text(each.snr_db)


def _judge(outputs: Sequence[Difference], tolerance: float | None) -> None:
    if tolerance is None or not outputs:
        return
    worst = worst_first(outputs)[0]
    if not worst.tolerance <= tolerance:
        raise VerifyError(
            codes.OUTPUTS_DIFFER,
            f"output {worst.name!r} needs a tolerance of {worst.tolerance:.2g}",
            why=f"--tolerance is {tolerance:g}",
        )
