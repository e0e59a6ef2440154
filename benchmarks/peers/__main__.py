"""`python -m benchmarks.peers [minilm] [efficientnet] [smollm2]`: builds the contenders, checks and times them.

Latencies are medians (and 10th percentiles) of runs that take turns, at 2 threads.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers import efficientnet as efficientnet_peers
from benchmarks.peers import minilm as minilm_peers
from benchmarks.peers import smollm2 as smollm2_peers
from benchmarks.peers.sessions import as_model, open_session, operators
from examples.models import efficientnet, evaluate, minilm, smollm2

_THREADS = 2
Model = Callable[..., Tensor]


def time_in_turns(
    models: Mapping[str, Model], inputs: Mapping[str, Tensor], rounds: int
) -> dict[str, tuple[float, float]]:
    """Return median and 10th percentile milliseconds of every model over runs that take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 3):
        for name, model in models.items():
            started = time.perf_counter()
            model(**inputs)
            if turn >= 3:
                seconds[name].append(time.perf_counter() - started)
    return {name: (1e3 * float(np.median(s)), 1e3 * float(np.percentile(s, 10))) for name, s in seconds.items()}


def _report(
    paths: Mapping[str, Path], score: Callable[[Model], object], inputs: Mapping[str, Mapping[str, Tensor]], rounds: int
) -> None:
    models = {name: as_model(open_session(path, _THREADS)) for name, path in paths.items()}
    for name, path in paths.items():
        print(f"{name}: {path.stat().st_size / 1e6:.1f} MB, {score(models[name])}")
        print(f"    {dict(operators(path))}")
    for shape, tensors in inputs.items():
        for name, (median, low) in time_in_turns(models, tensors, rounds).items():
            print(f"{shape}  {name}: {median:.2f} ms (p10 {low:.2f})")


def _minilm(folder: Path) -> None:
    reference = minilm.load()
    paths = {
        "float32": minilm_peers.float32(folder),
        "float32, all fused": minilm_peers.float32_fused(folder),
        "float32, plain": minilm_peers.float32_unfused(folder),
        "dynamic int8 per channel": minilm_peers.dynamic_int8(folder),
        "dynamic int8 per channel, unfused": minilm_peers.dynamic_int8(folder, fused=False),
        "dynamic int8 per tensor": minilm_peers.dynamic_int8(folder, per_channel=False),
        "blockwise 8": minilm_peers.blockwise(folder, 8),
        "blockwise 4": minilm_peers.blockwise(folder, 4),
    }
    ids = torch.randint(1000, 20000, (8, 128), generator=torch.Generator().manual_seed(0))
    inputs = {f"{n}x128": {"input_ids": ids[:n], "attention_mask": torch.ones_like(ids[:n])} for n in (1, 8)}
    _report(paths, lambda model: evaluate.compare_sentences(model, reference), inputs, 60)


def _efficientnet(folder: Path) -> None:
    reference = efficientnet.load()
    paths = {
        "float32": efficientnet_peers.float32(folder),
        "QDQ u8s8": efficientnet_peers.static_int8(folder),
        "QDQ s8s8": efficientnet_peers.static_int8(folder, unsigned=False),
    }
    inputs = {"1x224x224": {"pixel_values": torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))}}
    _report(paths, lambda model: evaluate.compare_images(model, reference), inputs, 200)


def _smollm2(folder: Path) -> None:
    model, tokenizer = smollm2.load(), smollm2.load_tokenizer()
    paths = {
        "float32, fused": smollm2_peers.float32(model, folder),
        "dynamic int8 per channel": smollm2_peers.dynamic_int8(model, folder),
        "blockwise 8": smollm2_peers.blockwise(model, folder, 8),
        "blockwise 4": smollm2_peers.blockwise(model, folder, 4),
    }
    windows = smollm2.held_out_tokens(tokenizer=tokenizer)
    inputs = {"1x256": {"input_ids": windows[:1, :256]}}
    _report(paths, lambda model: f"perplexity {evaluate.perplexity(model, windows):.3f}", inputs, 20)


if __name__ == "__main__":
    torch.set_num_threads(_THREADS)
    cases = {"minilm": _minilm, "efficientnet": _efficientnet, "smollm2": _smollm2}
    for case in sys.argv[1:] or cases:
        with tempfile.TemporaryDirectory() as temporary:
            cases[case](Path(temporary))
