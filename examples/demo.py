"""Compile three real models and show the report: what `make demo` runs.

python -m examples.demo [--folder out] [--only minilm]
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

import sparc
from examples.models import efficientnet, evaluate, minilm, smollm2

Metric = Callable[[sparc.Artifact], float]


def sentence_cosine(artifact: sparc.Artifact) -> float:
    """Mean cosine of sentence embeddings with the float model's; what padding hides does not count."""
    return evaluate.compare_sentences(artifact, minilm.load()).mean_cosine


def top1_agreement(artifact: sparc.Artifact) -> float:
    """How often the most likely class is the float model's, on crops of held-out photographs."""
    return evaluate.compare_images(artifact, efficientnet.load()).top1_agreement


def perplexity(artifact: sparc.Artifact) -> float:
    """Perplexity of 20,480 held-out tokens."""
    return evaluate.perplexity(artifact)


CASES: dict[str, tuple[Callable[[], dict[str, Any]], str, Metric]] = {
    "minilm": (minilm.minilm, "w8a8", sentence_cosine),
    "efficientnet": (efficientnet.efficientnet, "w8a8-static", top1_agreement),
    "smollm2": (smollm2.smollm2, "w4", perplexity),
}


_WIDTH = 120  # columns, where the output is no terminal


def main(folder: Path = Path("out"), only: str = "") -> None:
    """Compile each model, print its report, and save artifact and HTML report under `folder`."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    for name, (arguments, recipe, metric) in CASES.items():
        if only and name != only:
            continue
        console.rule(f"[bold]{name}[/bold], recipe {recipe}")
        started = time.perf_counter()
        artifact = sparc.compile(**arguments(), recipe=recipe, target="onnx", metric=metric)
        console.print(f"metric: {str(metric.__doc__).splitlines()[0]}")
        artifact.report.render(console)
        artifact.save(folder / name)
        artifact.report.to_html(folder / f"{name}.html")
        console.print(
            f"{name}: {time.perf_counter() - started:.0f} s; saved {folder / name}, report {folder / name}.html"
        )


if __name__ == "__main__":
    typer.run(main)
