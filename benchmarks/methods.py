"""What each pruning and rounding method costs real models, every line rebuilt from the raw weights.

    python -m benchmarks.methods list
    python -m benchmarks.methods run smollm2                       # every line of a model
    python -m benchmarks.methods run smollm2 "int3, GPTQ" ...      # some of them
    python -m benchmarks.methods scale                             # seconds and memory of 128 windows of 512 tokens
    python -m benchmarks.methods page                              # writes the tables of docs/methods.md

Lines are recipes behind the canonical program; what they make is run in eager torch, on text, sentences and images that
calibration never sees. Figures go to `benchmarks/results/methods-MODEL.json`, line by line.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import typer

from benchmarks.method_lines import LINES, SCALE
from benchmarks.results import FOLDER, peak_bytes, place, save
from examples.models import efficientnet, evaluate, minilm, smollm2, smollm2_twin
from sparc.api import registry, run_steps
from sparc.capture import capture
from sparc.driver import Driver
from sparc.encoding.view import WeightView
from sparc.pass_base import Samples
from sparc.passes.recipes import prepare
from sparc.program import Program
from sparc.recipe import resolve_recipe
from sparc.samples import bind

app = typer.Typer(add_completion=False)
PAGE = Path(__file__).parent.parent / "docs" / "methods.md"


@dataclass(frozen=True)
class Case:
    """A model, its data and its measure.

    Args:
        arguments: compile's arguments.
        measure: figures of a callable like the model.
    """

    arguments: Callable[[], dict[str, Any]]
    measure: Callable[[Callable[..., Any], Any], dict[str, float]]


def _language() -> dict[str, Any]:
    given = smollm2_twin.smollm2_twin()
    return {**given, "data": [{"input_ids": batch} for batch in smollm2.calibration_tokens(36).split(4)]}


def _perplexity(model: Callable[..., Any], _: Any) -> dict[str, float]:
    return {"perplexity": evaluate.perplexity(model, batch_size=2)}


def _cosine(model: Callable[..., Any], reference: Any) -> dict[str, float]:
    score = evaluate.compare_sentences(model, reference)
    return {"cosine": score.mean_cosine, "least cosine": score.min_cosine, "same neighbour": score.same_neighbour}


def _top1(model: Callable[..., Any], reference: Any) -> dict[str, float]:
    score = evaluate.compare_images(model, reference)
    return {"top-1 agreement": score.top1_agreement, "cosine": score.mean_cosine}


CASES: Mapping[str, Case] = {
    "smollm2": Case(_language, _perplexity),
    "minilm": Case(minilm.minilm, _cosine),
    "efficientnet": Case(efficientnet.efficientnet, _top1),
}


@app.command("list")
def lines() -> None:
    """Print every line and its recipe."""
    for model, found in LINES.items():
        for name, steps in found.items():
            typer.echo(f"{model}: {name}: {'; '.join(map(str, steps))}")


@app.command()
def run(model: str, names: list[str] | None = typer.Argument(None)) -> None:  # noqa: B008
    """Measure lines of a model; each is written as soon as it is there."""
    case = CASES[model]
    given = case.arguments()
    program = capture(given["model"], given["example_inputs"], dynamic=given["dynamic"])
    batches = [bind(program, item) for item in given["data"]]  # what is measured is not among them
    samples = Samples({"forward": batches[:1]}, {"forward": batches}, synthetic=False)
    for name in names or LINES[model]:
        started = time.perf_counter()
        driver = Driver(program, samples, verify="types")
        run_steps(driver, resolve_recipe((*prepare(), *LINES[model][name]), registry()))
        seconds = time.perf_counter() - started
        figures = case.measure(partial(_call, driver.program), given["model"])
        figures = {**figures, "share": stored_bytes(driver.program) / program.weights.nbytes, "seconds": seconds}
        _keep(model, name, figures)
        typer.echo(f"{model}: {name}: " + ", ".join(f"{key} {value:.5g}" for key, value in figures.items()))


@app.command()
def scale() -> None:
    """Prune SmolLM2's twin to 2:4 and round it to 4 bits in one sweep, on 128 windows of 512 tokens: seconds, memory,
    perplexity.
    """
    ids = smollm2.calibration_tokens(256).reshape(128, 512)
    loaded = peak_bytes()
    given = smollm2_twin.smollm2_twin()
    program = capture(given["model"], given["example_inputs"], dynamic=given["dynamic"])
    samples = Samples({"forward": [[ids[:1, :64]]]}, {"forward": [[each] for each in ids.split(4)]}, synthetic=False)
    started = time.perf_counter()
    driver = Driver(program, samples, verify="types")
    run_steps(driver, resolve_recipe((*prepare(), *SCALE), registry()))
    figures = {"seconds": time.perf_counter() - started, "peak bytes": peak_bytes() - loaded}
    figures |= {"weights": program.weights.nbytes, "block inputs": ids.numel() * 576 * 4}
    figures |= _perplexity(partial(_call, driver.program), None)
    save("methods-scale", figures)
    typer.echo(", ".join(f"{key} {value:.4g}" for key, value in figures.items()))


def _call(program: Program, **inputs: Any) -> Any:
    return program.run(**inputs)


def stored_bytes(program: Program) -> int:
    """Bytes of all weights as their encodings store them."""
    total = 0
    for name in program.weights:
        tensor, grid = program.weights[name], program.grid(name)
        shape = WeightView.parse(grid.view).matrix_shape(tensor.shape) if grid is not None else ()
        total += tensor.nbytes if grid is None else int(grid.spec.bytes_on(grid, shape))
    return total


def _keep(model: str, name: str, figures: Mapping[str, float]) -> None:
    path = FOLDER / f"methods-{model}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    save(path.stem, {"lines": {**known.get("lines", {}), name: figures}})


# tables -------------------------------------------------------------------------------------------------------------
@app.command()
def page() -> None:
    """Write the tables of docs/methods.md."""
    PAGE.write_text(filled(PAGE.read_text()))


def filled(text: str) -> str:
    """The page with a table for each model whose figures are stored."""
    for model in CASES:
        path = FOLDER / f"methods-{model}.json"
        if path.exists():
            text = place(text, model, table(model, json.loads(path.read_text())["lines"]))
    return text


def table(model: str, found: Mapping[str, Mapping[str, float]]) -> str:
    """A model's lines in Markdown, in the order of `LINES`."""
    names = [name for name in LINES[model] if name in found]
    keys = [key for key in found[names[0]] if key not in ("share", "seconds")]
    dense = found.get("float32", {}).get("perplexity")
    header = ["line", *keys, *(["log perplexity lost"] if dense else []), "bytes", "s"]
    rows = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name in names:
        row = found[name]
        cells = [name, *(f"{row[key]:.4f}" if row[key] < 2 else f"{row[key]:.2f}" for key in keys)]
        cells += [f"{math.log(row['perplexity'] / dense):.3f}"] if dense else []
        rows.append("| " + " | ".join([*cells, f"{row['share']:.1%}", f"{row['seconds']:.0f}"]) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    app()
