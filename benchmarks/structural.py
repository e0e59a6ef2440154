"""Structural pruning, measured: time against what is kept, and what importances and refitting are worth.

    python -m benchmarks.structural latency [MODEL...]     # smollm2, minilm, efficientnet; all by default
    python -m benchmarks.structural quality [MODEL...]     # minilm, efficientnet
    python -m benchmarks.structural page                   # writes the tables of docs/structural.md

Times are ratios to the whole model from interleaved pairs in one process, ONNX Runtime's in a process of its own;
nothing is trained after pruning. Figures go to `benchmarks/results/structural-MODEL.json`, line by line.
"""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import sparc
from benchmarks.results import FOLDER, place, ratio_text, save
from benchmarks.timing import compare
from examples.models import efficientnet, evaluate, images, minilm, smollm2, texts
from sparc.calibration import Calibration
from sparc.capture import capture
from sparc.driver import Driver
from sparc.encoding.int_grid import IntGrid
from sparc.measure import paired_ratio
from sparc.pass_base import Pass, PassContext, Samples
from sparc.passes.activation.correct import CorrectBias
from sparc.passes.activation.static import CalibrateActivations
from sparc.passes.cut.prune_units import IMPORTANCES, PruneUnits
from sparc.passes.recipes import prepare
from sparc.passes.round import Round
from sparc.program import Program
from sparc.samples import bind

PAGE = Path(__file__).parent.parent / "docs" / "structural.md"
THREADS = 2
KEPT = (0.75, 0.5, 0.25)
PAIRS = {"ONNX Runtime": 15, "eager torch": 8}
SENTENCES, CROPS, BATCHES, GRADIENTS = 64, 60, 8, 3
MODELS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "smollm2": smollm2.smollm2,
    "minilm": minilm.minilm,
    "efficientnet": efficientnet.efficientnet,
}
QUALITY = {"minilm": 0.75, "efficientnet": 0.9}
app = typer.Typer(add_completion=False)
Names = Annotated[list[str] | None, typer.Argument()]


def compiled(arguments: Mapping[str, Any], *steps: Pass, target: str = "onnx") -> sparc.Artifact:
    """A model behind the canonical program and some passes; sites are not measured."""
    return sparc.compile(**arguments, recipe=[*prepare(), *steps], target=target, measure=False, verify="types")  # type: ignore[no-any-return, unused-ignore]


def timed_inputs(model: str) -> dict[str, Tensor]:
    """What latency is measured on: one sequence of 128 tokens, or one image."""
    generator = torch.Generator().manual_seed(0)
    if model == "efficientnet":
        return {"pixel_values": torch.randn(1, 3, 224, 224, generator=generator)}
    ids = torch.randint(1000, 20000, (1, 128), generator=generator)
    return {"input_ids": ids} if model == "smollm2" else {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def time_model(model: str) -> dict[str, Any]:
    """For each kept part of the units, the share of the bytes, and the whole model's time as a multiple."""
    arguments = {**MODELS[model](), "data": None}
    inputs = timed_inputs(model)
    whole = compiled(arguments)
    flat = whole.program.main.signature.bind((), inputs)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        files = {1.0: Path(folder) / "whole.onnx"}
        whole.export_onnx(files[1.0])
        for kept in KEPT:
            small = compiled(arguments, PruneUnits(keep=kept))
            files[kept] = Path(folder) / f"kept-{kept}.onnx"
            small.export_onnx(files[kept])
            share = small.program.weights.nbytes / whole.program.weights.nbytes
            eager = paired_ratio(
                lambda: whole.program.run_flat(flat),
                lambda small=small: small.program.run_flat(flat),  # type: ignore[misc]
                f"{kept:g}",
                pairs=PAIRS["eager torch"],
                budget=30,
            )
            figures[f"{kept:g}"] = {"bytes": share, "eager torch": asdict(eager)}
        contenders = {f"{kept:g}": files[kept] for kept in KEPT}
        for row in compare(files[1.0], contenders, inputs, THREADS, PAIRS["ONNX Runtime"]):
            figures.setdefault(row["against"], {})["ONNX Runtime"] = row
    return figures


@dataclass(frozen=True)
class Prepared:
    """A canonical program, its calibration data, and statistics that all lines share.

    Args:
        program: is not changed.
        batches: flat inputs.
        found: statistics, by a node's name and a kind.
    """

    program: Program
    batches: list[list[Tensor]]
    found: Mapping[tuple[str, str], Any]


def prepared(model: str) -> Prepared:
    """The model behind the canonical program, with what `activation` and refitting look at."""
    given = MODELS[model]()
    program = capture(given["model"], given["example_inputs"], dynamic=given["dynamic"])
    data = given["data"]
    batches = [bind(program, item) for item in list(data() if callable(data) else data)[:BATCHES]]
    driver = Driver(program, Samples({"forward": batches[:1]}, {"forward": batches}), verify="types")
    for step in prepare():
        driver.run(step)
    watched = driver.program.clone()
    watches = list(PruneUnits(importance="activation", compensate=True).watches(watched, PassContext()))
    statistics = Calibration(watched, {"forward": batches}).gather_all(watches)
    return Prepared(driver.program, batches, {(node.name, kind): statistics(node, kind) for node, kind in watches})


def pruned(ready: Prepared, step: PruneUnits, *others: Pass) -> Program:
    """The program after pruning and maybe other passes."""
    program = ready.program.clone()
    few = {"forward": ready.batches[:GRADIENTS]}
    context = PassContext(statistics=lambda node, kind: ready.found[node.name, kind], calibration=few)
    step.run(program, context)
    program.sweep()
    driver = Driver(program, Samples({"forward": ready.batches[:1]}, few), verify="types")
    for other in others:
        driver.run(other)
    return driver.program


def measured(model: str, program: Program) -> dict[str, float]:
    """How close outputs are to the whole model's, on data that calibration never sees."""
    if model == "minilm":
        chosen = texts.held_out_sentences()[:SENTENCES]
        sentences = evaluate.compare_sentences(program.run, minilm.load(), chosen)
        return {"cosine mean": sentences.mean_cosine, "same neighbour": sentences.same_neighbour}
    crops = images.held_out_crops()[:: 430 // CROPS][:CROPS]
    score = evaluate.compare_images(program.run, efficientnet.load(), crops)
    return {"top-1 agreement": score.top1_agreement, "logit cosine": score.mean_cosine}


def lines(model: str) -> dict[str, tuple[PruneUnits, tuple[Pass, ...]]]:
    """The recipes that are compared, by name: what prunes, and what follows."""
    keep = QUALITY[model]
    found: dict[str, tuple[PruneUnits, tuple[Pass, ...]]] = {}
    for importance in IMPORTANCES:
        for compensate in (False, True):
            step = PruneUnits(keep=keep, importance=importance, compensate=compensate)
            found[importance + (", refitted" if compensate else "")] = step, ()
    best = PruneUnits(keep=keep, importance="activation", compensate=True)
    found["activation, global, refitted"] = replace(best, ranking="global"), ()
    rounded = (Round(IntGrid(8)), *((CalibrateActivations(), CorrectBias()) if model == "efficientnet" else ()))
    found["activation, refitted, int8"] = best, rounded
    return found


def _write(model: str, key: str, name: str, figures: Any) -> None:
    path = FOLDER / f"structural-{model}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known.pop("machine", None)
    known.setdefault(key, {})[name] = figures
    save(f"structural-{model}", known)
    typer.echo(f"{model}: {key}: {name}: {json.dumps(figures)}")


@app.command()
def latency(models: Names = None) -> None:
    """Time models against what is kept of them."""
    torch.set_num_threads(THREADS)
    for model in models or MODELS:
        for kept, figures in time_model(model).items():
            _write(model, "latency", kept, figures)


@app.command()
def quality(models: Names = None) -> None:
    """Compare importances, with and without refitting."""
    torch.set_num_threads(THREADS)
    for model in models or QUALITY:
        ready = prepared(model)
        for name, (step, others) in lines(model).items():
            program = pruned(ready, step, *others)
            share = program.weights.nbytes / ready.program.weights.nbytes
            _write(model, f"keep {QUALITY[model]:g}", name, {"weights": share, **measured(model, program)})


def tables() -> str:
    """The figures as Markdown: a table of times, and one of each model's recipes."""
    found = {model: _read(model) for model in MODELS}
    text = [
        "| Model | units kept | bytes | ONNX Runtime, times faster | eager torch, times faster |",
        "|---|---|---|---|---|",
    ]
    for model, figures in found.items():
        for kept, row in figures.get("latency", {}).items():
            cells = [ratio_text(row[name]) if name in row else "" for name in ("ONNX Runtime", "eager torch")]
            share = f"{row['bytes']:.1%}" if "bytes" in row else ""
            text.append(f"| {model} | {kept} | {share} | {cells[0]} | {cells[1]} |")
    for model, keep in QUALITY.items():
        rows = found[model].get(f"keep {keep:g}", {})
        names = list(next(iter(rows.values()), {}))
        if names:
            text += ["", f"| {model}, {keep:.0%} of the units | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
            text += [f"| {line} | {' | '.join(f'{row[name]:.3f}' for name in names)} |" for line, row in rows.items()]
    return "\n".join(text)


def _read(model: str) -> dict[str, Any]:
    path = FOLDER / f"structural-{model}.json"
    return json.loads(path.read_text()) if path.exists() else {}


@app.command()
def page() -> None:
    """Write the tables of docs/structural.md."""
    PAGE.write_text(filled(PAGE.read_text()))


def filled(text: str) -> str:
    """The page with the tables between its marks."""
    return place(text, "structural", tables())


if __name__ == "__main__":
    app()
