"""`sparc compile`: a model in, an artifact out."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from sparc import codes, files, report_data, report_text
from sparc.artifact import Artifact, check_destination
from sparc.cli.output import out, print_json, say
from sparc.cli.root import MODEL_HELP, AsJson, TaskName, Trust
from sparc.cli.source import Source, call_lazily, load_source
from sparc.diag import CaptureError, Severity
from sparc.generation.genai import attach_genai

Folder = Annotated[Path | None, typer.Option("--out", "-o", help="The artifact's folder.", show_default=False)]
RecipeName = Annotated[
    str | None, typer.Option("--recipe", "-r", help="A registered recipe or a TOML file.", show_default="w8")
]
TargetName = Annotated[str | None, typer.Option("--target", "-t", help="Where it will run.", show_default="onnx")]
Opset = Annotated[int | None, typer.Option(help="The opset of an onnx target.", show_default="the target's")]
Dynamic = Annotated[
    list[str] | None,
    typer.Option(help="Dimensions that vary: [bold]input=0:batch,1:seq[/]; may be repeated.", show_default=False),
]
DataName = Annotated[
    str | None, typer.Option(help="A function pkg.mod:fn that returns inputs for calibration and checks.")
]
Verify = Annotated[str | None, typer.Option(help="types, sample or full.", show_default="sample")]
SaveRecipe = Annotated[Path | None, typer.Option(help="Also write the recipe as TOML.", show_default=False)]
Html = Annotated[Path | None, typer.Option(help="Also write the report as one HTML file.", show_default=False)]
CheckpointFolder = Annotated[
    Path | None, typer.Option(help="Also write a folder that vLLM reads (compressed-tensors).", show_default=False)
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("compile")(compile_model)


def compile_model(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)],
    folder: Folder = None,
    recipe: RecipeName = None,
    target: TargetName = None,
    task: TaskName = None,
    opset: Opset = None,
    dynamic: Dynamic = None,
    data: DataName = None,
    trust: Trust = False,
    verify: Verify = None,
    measure: Annotated[bool, typer.Option(help="Time the artifact against the uncompressed model.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say which weights each step is for.")] = False,
    save_recipe: SaveRecipe = None,
    html: Html = None,
    genai: Annotated[bool, typer.Option(help="Let onnxruntime-genai load the folder as it is.")] = False,
    checkpoint: CheckpointFolder = None,
    as_json: AsJson = False,
) -> None:
    """Compile a model: compress it by a recipe, check every change, and save an artifact."""
    from sparc import api

    _check_folder(folder, dry_run)
    axes = parse_dynamic(dynamic or [])
    say(f"loading {model}")
    source = load_source(model, trust=trust)
    arguments = _arguments(source, recipe, axes)
    wanted = task or source.task or ("text-generation" if genai else None)
    if dry_run:
        _show_plan(api.plan(**arguments, task=wanted), as_json)
        return
    more = _more(source, target, data, verify, opset)
    say(f"compiling with {arguments['recipe']} for {more['target']}")
    artifact = api.compile(**arguments, **more, task=wanted, measure=measure)
    assert folder is not None
    _attach(artifact, source, genai)
    saved = artifact.save(folder)
    if checkpoint is not None:
        artifact.export_checkpoint(checkpoint)
    _write_beside(artifact, save_recipe, html, f"{model}: {more['target']}")
    if as_json:
        print_json({"folder": str(folder), **artifact.report.to_json()})
    else:
        out().print(_result(artifact, saved, model + (f" --task {wanted}" if wanted else ""), html))


def _attach(artifact: Artifact, source: Source, genai: bool) -> None:
    artifact.attachments.update(source.attachments or {})
    if genai:
        attach_genai(artifact)


def _check_folder(folder: Path | None, dry_run: bool) -> None:
    if folder is not None:
        check_destination(folder)
    elif not dry_run:
        raise typer.BadParameter("say where to save with -o FOLDER, or add --dry-run", param_hint="--out")


def _write_beside(artifact: Artifact, save_recipe: Path | None, html: Path | None, title: str) -> None:
    if save_recipe is not None:
        files.replace_file(save_recipe, artifact.recipe_text.encode())
    if html is not None:
        artifact.report.to_html(html, title)


def _arguments(source: Source, recipe: str | None, axes: dict[str, dict[int, str]]) -> dict[str, Any]:
    return {
        "model": source.model,
        "example_inputs": source.example_inputs,
        "recipe": recipe or source.recipe or "w8",
        "dynamic": axes or source.dynamic,
    }


def _more(
    source: Source, target: str | None, data: str | None, verify: str | None, opset: int | None
) -> dict[str, Any]:
    options = {**(source.options or {}), **({"opset": opset} if opset is not None else {})}
    return {
        "target": target or source.target or "onnx",
        "data": call_lazily(data) if data else source.data,
        "metric": source.metric,
        "verify": verify or source.verify or "sample",
        "options": options,
    }


def parse_dynamic(texts: list[str]) -> dict[str, dict[int, str]]:
    """`["ids=0:batch,1:seq"]` as `{"ids": {0: "batch", 1: "seq"}}`.

    Raises:
        CaptureError: SPARC104 when a text is not written like that.
    """
    axes: dict[str, dict[int, str]] = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        for part in rest.split(","):
            axis, colon, dimension = part.strip().partition(":")
            if not (name and equals and colon and dimension.isidentifier() and axis.removeprefix("-").isdecimal()):
                raise CaptureError(
                    codes.DYNAMIC_DIMENSION, f"--dynamic {text!r} is not understood", hint="write input=0:batch,1:seq"
                )
            axes.setdefault(name.strip(), {})[int(axis)] = dimension
    return axes


# what is printed ------------------------------------------------------------------------------------------------------
def _result(artifact: Artifact, saved: Path, model: str, html: Path | None) -> Group:
    ledger = artifact.ledger
    parts: list[Any] = [report_text.summary_lines(ledger.summary, ledger.sites), Text()]
    if ledger.sites:
        parts += [report_text.encoding_table(ledger.sites), Text()]
    for warning in report_data.by_severity(artifact.diagnostics, Severity.WARNING):
        parts += [Text(str(warning), style="yellow"), Text()]
    size = sum(path.stat().st_size for path in saved.iterdir())
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="bold green")
    lines.add_row("saved", Text(f"{saved} ({report_data.bytes_text(size)})"))
    lines.add_row("verify", Text(f"sparc compare {saved} {model} --layers"))
    lines.add_row("look", Text(str(html) if html is not None else f"sparc inspect {saved}"))
    return Group(*parts, lines)


def _show_plan(plan: Any, as_json: bool) -> None:
    rows = [(str(step), sorted(claimed)) for step, claimed in zip(plan.recipe.steps, plan.claims, strict=True)]
    if as_json:
        print_json(
            {"recipe": plan.recipe.to_toml(), "steps": [{"step": step, "weights": weights} for step, weights in rows]}
        )
        return
    table = report_text.titled("What would be done", "step", ">weights", "for example")
    for step, weights in rows:
        table.add_row(Text(step), str(len(weights) or "–"), Text(", ".join(weights[:3]), style="dim"))
    out().print(table)
