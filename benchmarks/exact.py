"""What the exact passes do to real models and to published blocks: operators, bytes, launches, time.

    python -m benchmarks.exact models        # writes benchmarks/results/exact.json
    python -m benchmarks.exact layers        # compile time of all exact passes against the number of layers
    python -m benchmarks.exact unmatched     # seconds of passes with nothing to do
    python -m benchmarks.exact page          # writes the tables of docs/exact.md from both

"before" is the canonical program, "after" the recipe `exact`. Launches are nodes of the ONNX file and operators of the
eager program; times are ratios after / before, interleaved pairs at 2 threads, medians with 95% intervals.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
import torch
import typer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import sparc
from benchmarks.results import FOLDER, place, ratio_text, save, show
from benchmarks.timing import compare
from examples.models import efficientnet, minilm, reparameterized, smollm2
from sparc.api import registry
from sparc.diag import Diagnostics
from sparc.driver import Driver
from sparc.measure import paired_ratio
from sparc.passes.canonicalize import Canonicalize
from sparc.passes.coalesce import coalesce_parallel
from sparc.passes.recipes import recipes
from sparc.passes.rotate import Rotate
from sparc.program import Program
from sparc.samples import make_samples

app = typer.Typer(add_completion=False)
THREADS, PAIRS = 2, 40
PAGE = Path(__file__).parent.parent / "docs" / "exact.md"
LAYERS = (4, 15, 30, 60, 120)
UNMATCHED = (
    "fold_batch_norm",
    "fold_batch_norm_before",
    "fold_shared",
    "fold_affine",
    "fold_table",
    "fold_prompt",
    "merge_neurons",
)


def _image(block: Callable[[], nn.Module]) -> Callable[[], dict[str, Any]]:
    """Four blocks in a row, on images of 56 x 56 with 64 channels."""

    def arguments() -> dict[str, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(*(block() for _ in range(4))).eval()
        return {"model": model, "example_inputs": {"input": torch.randn(1, 64, 56, 56)}}

    return arguments


MODELS: dict[str, Callable[[], dict[str, Any]]] = {
    "EfficientNet-Lite0": efficientnet.efficientnet,
    "MiniLM": minilm.minilm,
    "MiniLM, products stacked": minilm.minilm,
    "SmolLM2-135M": smollm2.smollm2,
    "SmolLM2-135M, products stacked": smollm2.smollm2,
    "SmolLM2-135M, rotated": smollm2.smollm2,
    "RepVGG blocks": _image(lambda: reparameterized.RepVGG(64, 64)),
    "MobileOne blocks": _image(lambda: reparameterized.MobileOne(64)),
    "ACNet blocks": _image(lambda: reparameterized.AsymmetricBlock(64)),
    "diverse branch blocks": _image(lambda: reparameterized.DiverseBranch(64, 64)),
    "OREPA blocks": _image(lambda: reparameterized.Orepa(64, 64)),
    "layers with LoRA": _image(lambda: reparameterized.Adapted(64)),
}
LENGTH = 128  # tokens of a language model
MORE = {"rotated": Rotate(untie=True), "products stacked": coalesce_parallel}  # steps behind the recipe


@app.command()
def models(names: list[str] | None = typer.Argument(None)) -> None:  # noqa: B008
    """Compile models both ways and compare; the stored results of others stay."""
    torch.set_num_threads(THREADS)
    path = FOLDER / "exact.json"
    known = {row["model"]: row for row in json.loads(path.read_text())["models"]} if path.exists() else {}
    for name in names or MODELS:
        known[name] = _row(name, MODELS[name]())
        save("exact", {"models": [known[each] for each in MODELS if each in known]})
    show("exact passes", [_shown(known[name]) for name in names or MODELS])


def _row(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    arguments.pop("data", None)
    more = [MORE[kind] for kind in MORE if name.endswith(kind)]
    plain = sparc.compile(**arguments, recipe=[Canonicalize()], target="onnx", measure=False)
    started = time.perf_counter()
    steps = [step.pass_ for step in recipes()["exact"].steps]
    exact = sparc.compile(**arguments, recipe=[*steps, *more], target="onnx", measure=False)
    seconds = time.perf_counter() - started
    inputs = {key: _resized(tensor) for key, tensor in arguments["example_inputs"].items()}
    passes = exact.ledger.passes
    return {
        "model": name,
        "operators": [calls(plain.program), calls(exact.program)],
        "bytes": [plain.program.weights.nbytes, exact.program.weights.nbytes],
        "ONNX Runtime": _in_runtime(plain, exact, inputs),
        "eager": asdict(_eager(plain.program, exact.program, list(inputs.values()))),
        "passes": {row.name: [row.matches, row.seconds] for row in passes},
        "seconds of passes": sum(row.seconds for row in passes),
        "seconds of compile": seconds,
        "error": max(each["relative error"] for each in exact.ledger.summary.errors.values()),
    }


def calls(program: Program) -> int:
    """Operators of the first entry."""
    return sum(node.op == "call_function" for node in program.graph.nodes)


def _resized(tensor: Tensor) -> Tensor:
    """One sample; of tokens, as many as are timed."""
    if tensor.is_floating_point():
        return tensor[:1]
    return tensor[:1].repeat(1, -(-LENGTH // tensor.shape[1]))[:, :LENGTH]


def _in_runtime(plain: sparc.Artifact, exact: sparc.Artifact, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{name}.onnx" for name in ("plain", "exact")]
        for artifact, path in zip((plain, exact), paths, strict=True):
            artifact.export_onnx(path)
        nodes = [len(onnx.load(path, load_external_data=False).graph.node) for path in paths]
        control, ratio = compare(paths[1], {"before": paths[0]}, inputs, THREADS, PAIRS)
    return {"nodes": nodes, "ratio": ratio, "control": control}


def _eager(plain: Program, exact: Program, inputs: list[Tensor]) -> Any:
    def run(program: Program) -> Callable[[], object]:
        return lambda: program.run_flat(inputs)

    with torch.no_grad():
        return paired_ratio(run(exact), run(plain), "before", pairs=PAIRS, budget=30.0, warmup=2)


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    runtime = row["ONNX Runtime"]
    return {
        "model": row["model"],
        "operators": "{} → {}".format(*row["operators"]),
        "MB": "{:.1f} → {:.1f}".format(*(size / 1e6 for size in row["bytes"])),
        "ONNX nodes": "{} → {}".format(*runtime["nodes"]),
        "time in ONNX Runtime": ratio_text(runtime["ratio"]),
        "time in eager torch": ratio_text(row["eager"]),
        "error": f"{row['error']:.0e}",
    }


def llama(layers: int) -> dict[str, Any]:
    """A small Llama's arguments."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    inputs = {"input_ids": torch.randint(0, 128, (1, 16))}
    model = smollm2.FullSequence(LlamaForCausalLM(config)).eval()
    return {"model": model, "example_inputs": inputs, "dynamic": {"input_ids": {0: "batch", 1: "seq"}}}


@app.command()
def layers() -> None:
    """Compile small Llamas of 4 to 120 layers."""
    torch.set_num_threads(THREADS)
    rows = []
    for count in LAYERS:
        arguments = llama(count)
        steps = [*(step.pass_ for step in recipes()["exact"].steps), coalesce_parallel]
        artifact = sparc.compile(**arguments, recipe=steps, target="reference", measure=False)
        seconds = sum(row.seconds for row in artifact.ledger.passes)
        rows.append({"layers": count, "operators": calls(artifact.program), "seconds": seconds})
        rows[-1]["milliseconds per layer"] = 1e3 * seconds / count
    show("compile time of all exact passes, checks included", rows)
    save("exact-layers", {"rows": rows})


@app.command()
def unmatched() -> None:
    """Seconds of every exact pass that finds nothing to do in the canonical SmolLM2, the median of five runs."""
    torch.set_num_threads(THREADS)
    arguments, diagnostics = smollm2.smollm2(), Diagnostics()
    program = sparc.capture(arguments["model"], arguments["example_inputs"], dynamic=arguments["dynamic"])
    samples = make_samples(program, {"forward": arguments["example_inputs"]}, None, diagnostics)
    driver = Driver(program, samples, diagnostics, verify="types")
    driver.run(Canonicalize(), "*")
    known, rows = registry(), []
    for name in UNMATCHED:
        times, before = [], driver.program.text()
        for _ in range(5):
            started = time.process_time()
            driver.run(known.pass_type(name)(), "*")
            times.append(time.process_time() - started)
        assert driver.program.text() == before
        rows.append({"pass": name, "seconds": statistics.median(times)})
    show("exact passes with nothing to do", rows)


@app.command()
def page() -> None:
    """Write the tables into docs/exact.md."""
    PAGE.write_text(filled(PAGE.read_text()))


def filled(text: str) -> str:
    """The page with the tables between its marks."""
    return place(text, "exact", tables())


def tables(results: Path = FOLDER) -> str:
    """The tables of docs/exact.md, from the stored results."""
    rows = json.loads((results / "exact.json").read_text())["models"]
    shown = [_shown(row) for row in rows]
    lines = ["| " + " | ".join(shown[0]) + " |", "|" + "---|" * len(shown[0])]
    lines += ["| " + " | ".join(str(value) for value in row.values()) + " |" for row in shown]
    curve = json.loads((results / "exact-layers.json").read_text())["rows"]
    lines += ["", "| layers | operators | seconds | per layer |", "|---|---|---|---|"]
    lines += [
        f"| {row['layers']} | {row['operators']} | {row['seconds']:.1f} | {row['milliseconds per layer']:.0f} ms |"
        for row in curve
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    app()
