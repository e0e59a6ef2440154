"""`sparc inspect`: what is in an artifact, or which weights of a model can be compressed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from sparc import codes, report_data, report_text
from sparc.analysis.sites import find_sites
from sparc.artifact import Artifact
from sparc.cli.output import out, print_json
from sparc.cli.root import MODEL_HELP, AsJson, Trust
from sparc.cli.source import load_source
from sparc.cli.subject import capture_source, is_artifact
from sparc.diag import LoweringError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("inspect")(inspect)


def inspect(
    subject: Annotated[
        str,
        typer.Argument(metavar="ARTIFACT", help=f"An artifact's folder. Or a model: {MODEL_HELP}", show_default=False),
    ],
    everything: Annotated[bool, typer.Option("--all", help="Every weight and every remark.")] = False,
    program: Annotated[bool, typer.Option("--program", help="Print the program instead.")] = False,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Compile an artifact's kernels for its chip and show what each takes.")
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Write the report as one HTML file.", show_default=False)] = None,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Show an artifact's report, files and recipe after checking its hashes; or the weights of a model."""
    if not is_artifact(subject) and not _was_artifact(Path(subject)):
        if kernels:
            raise _without_kernels("a model")
        _inspect_model(subject, trust, program, as_json)
        return
    from sparc import api

    artifact = api.load(subject)
    if html is not None:
        artifact.report.to_html(html, f"{subject}: {artifact.target}")
    if kernels:
        _show_kernels(artifact, as_json)
    elif as_json:
        print_json(_as_json(artifact, Path(subject)))
    elif program:
        out().print(Text(artifact.program.text()))
    else:
        _print(artifact, Path(subject), everything)


def _was_artifact(path: Path) -> bool:
    """An artifact that lost its manifest is still to be refused as an artifact."""
    return (path / "program.json").exists()


# artifacts ------------------------------------------------------------------------------------------------------------
def _as_json(artifact: Artifact, folder: Path) -> dict[str, Any]:
    signature = artifact.program.main.signature
    return {
        "target": artifact.target,
        "entries": list(artifact.program.entries),
        "inputs": signature.input_names,
        "outputs": signature.output_names,
        "files": _files(folder),
        "recipe": artifact.recipe_text,
        "coverage": _coverage(artifact),
        **artifact.report.to_json(),
    }


def _print(artifact: Artifact, folder: Path, everything: bool) -> None:
    console = out()
    console.print(Text(f"{folder}: target {artifact.target}, files unaltered", style="bold"))
    for name, size in _files(folder).items():
        console.print(Text(f"  {name}  {report_data.bytes_text(size)}"))
    if artifact.recipe_text:
        console.print(Text("\n" + artifact.recipe_text.strip(), style="dim"))
    console.print()
    artifact.report.render(console, everything=everything)
    missing = _coverage(artifact)
    if missing:
        table = report_text.titled("Without a kernel on the device", "node", "operator", "why")
        for row in missing:
            table.add_row(*(Text(str(row.get(key, ""))) for key in ("node", "operator", "why")))
        console.print(table)


def _files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}


def _coverage(artifact: Artifact) -> list[dict[str, str]]:
    """Nodes that the target's device has no kernel for, where the target can tell."""
    find = getattr(artifact.emission, "without_kernel", None)
    return [dict(row) for row in find()] if find is not None else []


# kernels --------------------------------------------------------------------------------------------------------------
def _without_kernels(what: str) -> LoweringError:
    return LoweringError(
        codes.BAD_OPTION,
        f"{what} has no kernels to show",
        why="only artifacts of the target `cuda` have kernels of their own",
        hint="leave out --kernels, or compile with --target cuda:sm_90",
    )


def _show_kernels(artifact: Artifact, as_json: bool) -> None:
    """What every kernel takes, and below it the promises that kernels break."""
    find = getattr(artifact.emission, "kernel_rows", None)
    if find is None:
        raise _without_kernels(f"an artifact of the target {artifact.target!r}")
    rows: list[dict[str, Any]] = find()
    if as_json:
        print_json({"target": artifact.target, "kernels": rows})
        return
    columns = (">registers", ">spills", ">shared", ">load", "tensor core", ">slots", ">TB/s", ">programs", ">measured")
    table = report_text.titled(f"{len(rows)} kernels for {artifact.target}", "kernel, and what it serves", *columns)
    for row in rows:
        table.add_row(_kernel_name(row), *(Text(cell) for cell in _kernel_cells(row)))
    out().print(table)
    out().print("slots: instructions for one weight; TB/s: the most that they allow; programs: on a multiprocessor.")
    for row in rows:
        for sentence in row["violations"]:
            out().print(Text(f"{row['kernel']}: {sentence}.", style="red"))


def _kernel_name(row: Mapping[str, Any]) -> Text:
    """The name, and below it the first site, and how many more there are."""
    first, *others = row["serves"]
    serves = f"{first}; {len(others)} more" if others else first
    return Text(row["kernel"] + "\n").append(serves.replace(".weight", ""), style="dim")


def _kernel_cells(row: Mapping[str, Any]) -> list[str]:
    narrowest, widest = row["load_bytes"]
    seconds = row["seconds"]
    return [
        str(row["registers"]),
        str(row["spill_bytes"]),
        str(row["shared_bytes"]),
        str(widest) if narrowest == widest else f"{narrowest} to {widest}",
        ", ".join(f"{count} {kind}" for kind, count in row["tensor_core"].items()) or "–",
        "–" if row["issue_slots"] is None else f"{row['issue_slots']:.2f}",
        "–" if row["ceiling_tb_per_s"] is None else f"{row['ceiling_tb_per_s']:.1f}",
        str(row["programs_per_sm"]),
        "unmeasured" if seconds is None else f"{seconds * 1e6:.1f} µs",
    ]


# models ---------------------------------------------------------------------------------------------------------------
def _inspect_model(named: str, trust: bool, text: bool, as_json: bool) -> None:
    program = capture_source(load_source(named, trust=trust))
    if text:
        out().print(Text(program.text()))
        return
    sites, others = find_sites(program)
    rows: list[dict[str, Any]] = [
        {
            "weight": site.weight,
            "operator": site.operator,
            "shape": list(program.weights[site.weight].shape),
            "bytes": program.weights[site.weight].nbytes,
            "uses": len(site.uses),
            "source": site.location.source,
        }
        for site in sites
    ]
    if as_json:
        print_json({"sites": rows, "bytes": program.weights.nbytes, "inputs": program.main.signature.input_names})
        return
    table = report_text.titled(
        f"{len(rows)} weights that can be compressed", "weight", "operator", "shape", ">bytes", ">uses", "source"
    )
    for row in rows:
        shape = "×".join(map(str, row["shape"]))
        size = report_data.bytes_text(row["bytes"])
        table.add_row(
            Text(row["weight"]),
            row["operator"],
            shape,
            size,
            str(row["uses"]),
            Text(report_data.source_text(row["source"]), style="dim"),
        )
    out().print(table)
    total = report_data.bytes_text(program.weights.nbytes)
    out().print(f"{total} in all; {len(others)} other weights stay as they are. Selectors (where=) match these names.")
