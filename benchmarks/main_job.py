"""The main job's figures: size, fidelity and latency of compiled real models against ONNX Runtime's own.

    python -m benchmarks.main_job minilm efficientnet smollm2 twin compile-time

Each case compiles, checks fidelity on held-out data, times 200 interleaved pairs per contender at 2 threads, prints
a table and writes
`benchmarks/results/CASE.json`.
"""

import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor

import sparc
from benchmarks.peers import efficientnet as efficientnet_peers
from benchmarks.peers import minilm as minilm_peers
from benchmarks.peers.sessions import as_model, open_session
from benchmarks.results import ratio_text, save, show
from benchmarks.timing import compare
from examples.models import efficientnet, evaluate, minilm, smollm2, smollm2_twin

THREADS = 2


def compile_model(arguments: dict[str, Any], recipe: str) -> sparc.Artifact:
    """Compile for the CPU without measuring latency, and set the threads."""
    artifact = sparc.compile(**arguments, recipe=recipe, target="onnx", measure=False)
    artifact.threads = THREADS
    return artifact


def exported(artifact: sparc.Artifact, folder: Path, name: str) -> Path:
    """The artifact as a file, to be run like the contenders', so that only the graphs differ."""
    path = folder / f"{name}.onnx"
    artifact.export_onnx(path)
    return path


def size_ratio(artifact: sparc.Artifact, matrices_only: bool = False) -> dict[str, float]:
    """File and resident bytes as shares of float32: of the whole model, or of the matrices that multiply."""
    if not matrices_only:
        summary = artifact.ledger.summary
        return {
            "file": summary.file_bytes / summary.dense_bytes,
            "resident": summary.resident_bytes / summary.dense_bytes,
        }
    rows = [row for row in artifact.ledger.sites if row.operator != "embedding"]
    dense = sum(row.dense_bytes for row in rows)
    return {
        "file": sum(row.file_bytes for row in rows) / dense,
        "resident": sum(row.resident_bytes for row in rows) / dense,
    }


def text_inputs(batch: int, length: int) -> dict[str, Tensor]:
    """Seeded token ids without padding, int64 `[batch, length]`."""
    ids = torch.randint(1000, 20000, (batch, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def minilm_case(folder: Path) -> dict[str, Any]:
    """MiniLM: `w8a8` against ONNX Runtime's own dynamic quantization, `w8` and `w4` against its fastest float32."""
    model = minilm.load()
    peers = {
        "ORT dynamic int8, per channel, fused attention": minilm_peers.dynamic_int8(folder),
        "ORT float32, fused": minilm_peers.float32(folder),
    }
    figures: dict[str, Any] = {}
    for name, path in peers.items():
        score = evaluate.compare_sentences(as_model(open_session(path, THREADS)), model)
        figures[name] = {"cosine mean": score.mean_cosine, "cosine min": score.min_cosine}
    for recipe in ("w8a8", "w8", "w4"):
        artifact = compile_model(minilm.minilm(), recipe)
        score = evaluate.compare_sentences(artifact, model)
        ours = exported(artifact, folder, recipe)
        row: dict[str, Any] = {
            "whole model": size_ratio(artifact),
            "matmul weights": size_ratio(artifact, matrices_only=True),
            "cosine mean": score.mean_cosine,
            "cosine min": score.min_cosine,
        }
        for batch in (1, 8):
            row[f"latency {batch}x128"] = compare(ours, peers, text_inputs(batch, 128), THREADS)
        figures[recipe] = row
    return figures


def efficientnet_case(folder: Path) -> dict[str, Any]:
    """EfficientNet-Lite0: `w8a8-static` against ONNX Runtime's own QDQ, both calibrated on the same photographs."""
    model = efficientnet.load()
    peers = {
        "ORT QDQ u8s8": efficientnet_peers.static_int8(folder),
        "ORT float32": efficientnet_peers.float32(folder),
    }
    figures: dict[str, Any] = {}
    for name, path in peers.items():
        score = evaluate.compare_images(as_model(open_session(path, THREADS)), model)
        figures[name] = {"top-1 agreement": score.top1_agreement, "logit cosine": score.mean_cosine}
    artifact = compile_model(efficientnet.efficientnet(), "w8a8-static")
    score = evaluate.compare_images(artifact, model)
    inputs = {"pixel_values": torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))}
    figures["w8a8-static"] = {
        "whole model": size_ratio(artifact),
        "top-1 agreement": score.top1_agreement,
        "logit cosine": score.mean_cosine,
        "latency 1x224x224": compare(exported(artifact, folder, "w8a8-static"), peers, inputs, THREADS),
    }
    return figures


def language_model_case(arguments: Callable[[], dict[str, Any]], folder: Path | None = None) -> dict[str, Any]:
    """SmolLM2 or its twin: perplexity of `w8` and `w4` against float32 and, with a folder for the files, full-sequence
    latency against float32 in the same runtime.
    """
    given = arguments()
    figures: dict[str, Any] = {"float32": {"perplexity": evaluate.perplexity(given["model"])}}
    inputs = {"input_ids": text_inputs(1, 256)["input_ids"]}
    dense = folder and {"float32, same runtime": exported(compile_model(given, "dense"), folder, "dense")}
    for recipe in ("w8", "w4"):
        artifact = compile_model(given, recipe)
        perplexity = evaluate.perplexity(artifact)
        figures[recipe] = {
            "whole model": size_ratio(artifact),
            "perplexity": perplexity,
            "above float32": perplexity / figures["float32"]["perplexity"] - 1,
        }
        if folder and dense:
            figures[recipe]["latency 1x256"] = compare(exported(artifact, folder, recipe), dense, inputs, THREADS)
    return figures


def compile_time_case() -> dict[str, Any]:
    """Seconds and peak memory of SmolLM2 `w4` with default checks; run it in a process of its own."""
    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    given = smollm2.smollm2()
    del given["data"]
    started = time.perf_counter()
    artifact = compile_model(given, "w4")
    seconds = time.perf_counter() - started
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - baseline) * 1024
    return {
        "seconds": seconds,
        "peak bytes above imports": peak,
        "times the weights": peak / artifact.ledger.summary.dense_bytes,
    }


def _flat(figures: dict[str, Any], prefix: str = "") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for key, value in figures.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            rows += _flat(value, f"{name}: ")
        elif isinstance(value, list):
            rows += [{"figure": f"{name} / {row['against']}", "value": ratio_text(row)} for row in value]
        else:
            rows.append({"figure": name, "value": value})
    return rows


def main(cases: list[str]) -> None:
    """Run the named cases."""
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        known: dict[str, Callable[[], dict[str, Any]]] = {
            "minilm": lambda: minilm_case(Path(folder)),
            "efficientnet": lambda: efficientnet_case(Path(folder)),
            "smollm2": lambda: language_model_case(smollm2.smollm2, Path(folder)),
            "twin": lambda: language_model_case(smollm2_twin.smollm2_twin),
            "compile-time": compile_time_case,
        }
        for case in cases:
            if case not in known:
                raise typer.BadParameter(f"{case!r} is none of {', '.join(known)}")
            figures = known[case]()
            show(case, _flat(figures))
            typer.echo(f"written to {save(case, figures).name}")


if __name__ == "__main__":
    typer.run(main)
