"""Generated kernels on a GPU: `python -m benchmarks.gpu` checks them, times them, and says how far they are from what
the device could do. It needs no package but those that sparc needs; `PYTHONPATH=.` will do where it is not installed.

The table comes last; everything is in `benchmarks/results/gpu-<device>.json`.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import triton
import typer

from benchmarks import gpu_block, gpu_linears, gpu_numerics, gpu_onnx, gpu_table
from benchmarks.gpu_cases import CASES
from benchmarks.gpu_launch import Compiler, said
from benchmarks.results import FOLDER
from sparc.codegen.triton.chips import find_device, local_capability
from sparc.cost import device_of

SECTIONS = ("numerics", "linears", "block", "onnx")
_QUICK = ("numerics", "linears", "onnx")
_LIMIT, _QUICK_LIMIT = 500, 100  # seconds
_BLOCK_SECONDS = 160  # that are kept for the block, which tuning and torch.compile take long for
NO_GPU = 2  # the exit status where there is nothing to measure on
_INTERPRETED = ("int4 g128", "int8")
_MODEL = 90  # the capability whose configurations are interpreted


def main(
    sections: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(SECTIONS)}; all by default.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="At most two minutes: few encodings and sizes.")] = False,
    tune: Annotated[bool, typer.Option("--tune", help="Time every configuration and keep the fastest.")] = False,
    seconds: Annotated[float, typer.Option(min=1, help="For tuning, all kernels together.")] = 120,
    limit: Annotated[
        float | None, typer.Option(min=1, help="For the whole run.", show_default=f"{_LIMIT}, or {_QUICK_LIMIT}")
    ] = None,
    interpret: Annotated[bool, typer.Option("--interpret", help="Check the smallest sizes without a GPU.")] = False,
    folder: Annotated[Path | None, typer.Option("--out", help="Also write the results here.")] = None,
) -> None:
    """Check and time generated kernels; the exit status is 1 when something failed, 2 when there is no GPU."""
    end = time.monotonic() + (limit or (_QUICK_LIMIT if quick else _LIMIT))
    chosen = tuple(sections or (_QUICK if quick else SECTIONS))
    for section in chosen:
        if section not in SECTIONS:
            raise typer.BadParameter(f"{section!r} is none of {', '.join(SECTIONS)}")
    if interpret:
        result = {"device": "Triton's interpreter", "sections": {"numerics": interpreted()}}
        typer.echo(gpu_table.render(result))
        raise typer.Exit(int(failed(result)))
    if local_capability() is None:
        typer.echo(f"there is no GPU here; with one, this would run: {', '.join(chosen)} (try --interpret)", err=True)
        raise typer.Exit(NO_GPU)
    plan = quick_plan() if quick else gpu_linears.Plan()
    result = run(chosen, replace(plan, tune=tune, tuning_seconds=seconds), end, quick)
    written = gpu_table.save(result, FOLDER, *([folder] if folder else []))
    typer.echo("\n".join(f"written to {path.name}" for path in written))
    typer.echo(gpu_table.render(result))
    raise typer.Exit(int(failed(result)))


def quick_plan() -> gpu_linears.Plan:
    """What is timed where there is little time."""
    return gpu_linears.Plan(cases=CASES[:4], layers=gpu_linears.LAYERS[1:3], tokens=(1, 16))


def interpreted() -> dict[str, Any]:
    """The smallest checks, in Triton's interpreter."""
    cases = [case for case in CASES if case.name in _INTERPRETED]
    return gpu_numerics.check(device_of(_MODEL), "cpu", cases=cases, shape=(48, 256), tokens=(1, 5))


def run(sections: Sequence[str], plan: gpu_linears.Plan, end: float, quick: bool) -> dict[str, Any]:
    """Run the sections, each caught by itself; `end` is when to be done, by `time.monotonic`."""
    device = find_device(None)
    found: dict[str, Any] = {}
    cases, tokens = (CASES[:8], (1, 16, 200)) if quick else (CASES, gpu_numerics.TOKENS)

    with Compiler(device.capability) as compiler, ExitStack() as stack:
        compilation = stack.enter_context(gpu_block.Compilation()) if "block" in sections else None

        def linears() -> dict[str, Any]:
            left = end - time.monotonic() - (_BLOCK_SECONDS if compilation else 0)
            return gpu_linears.measure(device, replace(plan, seconds=max(left, 20)), compiler)

        def block() -> dict[str, Any]:
            assert compilation is not None
            return gpu_block.measure(compilation.result(max(end - time.monotonic(), 20)))

        known: dict[str, Callable[[], dict[str, Any]]] = {
            "numerics": lambda: gpu_numerics.check(device, cases=cases, tokens=tokens, compiler=compiler),
            "linears": linears,
            "block": block,
            "onnx": gpu_onnx.check,
        }
        for section in sorted(sections, key=SECTIONS.index):
            started = time.monotonic()
            found[section] = attempt(known[section])
            print(f"{section}: {time.monotonic() - started:.0f} s", flush=True)
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    return {"device": torch.cuda.get_device_name(), "profile": device.name, "versions": versions, "sections": found}


def attempt(section: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A section's result, or what it failed with."""
    try:
        return section()
    except Exception as caught:  # the other sections are still to be run
        return {"error": said(caught)}


def failed(result: dict[str, Any]) -> bool:
    """Whether a section failed, or a kernel is wrong."""
    sections = result["sections"].values()
    return any(isinstance(each.get("error"), str) or each.get("failures") for each in sections)


if __name__ == "__main__":
    typer.run(main)
