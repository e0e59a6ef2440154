"""The README's table, from `benchmarks/results`: `python -m benchmarks.page` writes it, and a test compares."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import FOLDER, place

PAGE = Path(__file__).parent.parent / "README.md"
HEADER = ("| model, recipe | size | fidelity | time |", "|---|---|---|---|")
DYNAMIC, FUSED = "ORT dynamic int8, per channel, fused attention", "ORT float32, fused"


def table() -> str:
    """The table's lines."""
    results = {path.stem: json.loads(path.read_text()) for path in FOLDER.glob("*.json")}
    rows = [*_minilm(results["minilm"]), _efficientnet(results["efficientnet"])]
    for name, title in (("smollm2", "SmolLM2-135M"), ("twin", "its twin off the 4-bit grid")):
        rows += [_language(title, recipe, results[name]) for recipe in ("w8", "w4")]
    return "\n".join((*HEADER, *rows))


def _minilm(figures: Mapping[str, Any]) -> list[str]:
    rows = []
    for recipe in ("w8a8", "w8", "w4"):
        row = figures[recipe]
        cosine = f"cosine {row['cosine mean']:.4f}"
        if recipe == "w8a8":
            cosine += f" (ONNX Runtime's own 8 bits {figures[DYNAMIC]['cosine mean']:.4f})"
        for shape in ("1x128", "8x128"):
            ratios = _ratios(row[f"latency {shape}"])
            time = f"{ratios[FUSED]} × float32"
            if recipe == "w8a8":
                time += f", {ratios[DYNAMIC]} × ONNX Runtime's own 8 bits"
            rows.append(_row("MiniLM", recipe, shape, row["whole model"], cosine, time))
    return rows


def _efficientnet(figures: Mapping[str, Any]) -> str:
    row, peer = figures["w8a8-static"], figures["ORT QDQ u8s8"]
    fidelity = f"top-1 {row['top-1 agreement']:.3f} (ONNX Runtime's own {peer['top-1 agreement']:.3f})"
    ratios = _ratios(row["latency 1x224x224"])
    time = f"{ratios['ORT float32']} × float32, {ratios['ORT QDQ u8s8']} × ONNX Runtime's own 8 bits"
    return _row("EfficientNet-Lite0", "w8a8-static", "1x224x224", row["whole model"], fidelity, time)


def _language(title: str, recipe: str, figures: Mapping[str, Any]) -> str:
    row = figures[recipe]
    fidelity = f"perplexity {row['perplexity']:.2f} ({row['above float32']:+.1%})"
    runs = [_ratios(row[key])["float32, same runtime"] for key in row if key.startswith("latency")]
    time = " and ".join(dict.fromkeys(runs)) + " × float32" if runs else "not timed"
    return _row(title, recipe, "1x256", row["whole model"], fidelity, time)


def _ratios(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    return {row["against"]: f"{row['median']:.2f}" for row in rows}


def _row(model: str, recipe: str, shape: str, size: Mapping[str, float], fidelity: str, time: str) -> str:
    return f"| {model} `{recipe}`, {shape.replace('x', '×')} | {size['file']:.0%} | {fidelity} | {time} |"


def filled(text: str) -> str:
    """The README with the table between its marks."""
    return place(text, "benchmarks", table())


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
