"""One contender of `benchmarks.generation`, in a process of its own: it answers each line on stdin with its times.

    python -m benchmarks.generation_worker sparc|genai FOLDER --threads 2 --prompt 256 --tokens 64

Its idle threads sleep while another contender has its turn.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import typer

import sparc

Steps = Callable[[list[int], int], Iterator[int]]


def _sparc(folder: Path, threads: int) -> Steps:
    artifact = sparc.load(folder)
    artifact.threads = threads

    def steps(prompt: list[int], count: int) -> Iterator[int]:
        for token in artifact.stream(torch.tensor([prompt]), max_new_tokens=count, eos_token_id=[]):
            yield int(token)

    return steps


def _genai(folder: Path, threads: int) -> Steps:
    import onnxruntime_genai as genai

    config = genai.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = genai.Model(config)

    def steps(prompt: list[int], count: int) -> Iterator[int]:
        parameters = genai.GeneratorParams(model)
        length = len(prompt) + count
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(prompt)
        for _ in range(count):
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])

    return steps


def _timed(steps: Steps, prompt: list[int], count: int) -> dict[str, Any]:
    started = time.perf_counter()
    times, tokens = [], []
    for token in steps(prompt, count):
        times.append(time.perf_counter())
        tokens.append(token)
    return {
        "prefill": times[0] - started,
        "per token": (times[-1] - times[0]) / (len(times) - 1),
        "tokens": tokens,
    }


def main(kind: str, folder: Path, threads: int = 2, prompt: int = 256, tokens: int = 64) -> None:
    """Serve until stdin ends."""
    torch.set_num_threads(threads)
    steps = {"sparc": _sparc, "genai": _genai}[kind](folder, threads)
    ids = torch.randint(100, 20000, (prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    for _ in sys.stdin:
        sys.stdout.write(json.dumps(_timed(steps, ids, tokens)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    typer.run(main)
