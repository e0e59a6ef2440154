"""What `compare` and `bench` work on: an artifact, or a model in eager torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sparc.artifact import Artifact
from sparc.capture import capture
from sparc.cli.source import Source, load_source
from sparc.exported import capture_exported, runnable
from sparc.generation.task import EntryTask, prepare_task
from sparc.inputs import example_tensors, named_inputs
from sparc.program import Program
from sparc.samples import bind

Run = Callable[[Sequence[Tensor]], list[Any]]


@dataclass(frozen=True)
class Subject:
    """Something that can be run.

    Args:
        name: what it is called.
        runtime: the target's name, or `eager torch`.
        program: its program.
        run: one tensor per input to the flat outputs, in its own runtime.
        examples: its own example inputs, flat, where it has any.
        artifact: the artifact, if it is one.
    """

    name: str
    runtime: str
    program: Program
    run: Run
    examples: list[Tensor] | None = None
    artifact: Artifact | None = None


def load_subject(
    named: str, *, trust: bool = False, threads: int | None = None, spin: bool = True, task: str | None = None
) -> Subject:
    """An artifact's folder, or whatever PATH_OR_IMPORT names.

    Args:
        named: what to load.
        trust: whether a .pt2 file may be read.
        threads: threads of an artifact's runtime; its own choice by default.
        spin: whether idle threads of an artifact's runtime wait actively.
        task: what a model is for; of several entries, the first is taken.

    Raises:
        SparcError: what loading or capturing raises.
    """
    if is_artifact(named):
        from sparc import api

        artifact = api.load(named)
        artifact.threads = threads
        run = artifact.run_flat if spin else artifact.emission.runner(threads=threads, spin=False)
        return Subject(named, artifact.target, artifact.program, run, None, artifact)
    return _eager(named, load_source(named, trust=trust), task)


def is_artifact(named: str) -> bool:
    """Whether a path is the folder of an artifact."""
    return (Path(named) / "manifest.json").exists()


def capture_source(source: Source) -> Program:
    """The program of a model, as compile captures it."""
    return _capture(EntryTask(source.model, source.example_inputs, source.dynamic))


def _capture(entry: EntryTask) -> Program:
    if isinstance(entry.model, torch.export.ExportedProgram):
        return capture_exported(entry.model)
    program = capture(entry.model, entry.example_inputs, dynamic=entry.dynamic)
    program.main.cache = entry.cache
    return program


def _eager(named: str, source: Source, task: str | None) -> Subject:
    entry = EntryTask(source.model, source.example_inputs, source.dynamic)
    if task or source.task:
        entry = next(iter(prepare_task(str(task or source.task), source.model, None).entries.values()))
    program = _capture(entry)
    signature = program.main.signature
    module = runnable(entry.model)
    if not isinstance(entry.model, torch.export.ExportedProgram):
        module.eval()

    def run(tensors: Sequence[Tensor]) -> list[Any]:
        with torch.no_grad():
            leaves = pytree.tree_leaves(module(**named_inputs(signature, tensors)))
        return [value for leaf, value in zip(signature.output_leaves, leaves, strict=True) if leaf.is_tensor]

    return Subject(named, "eager torch", program, run, bind(program, entry.example_inputs))


def subject_inputs(first: Subject, second: Subject | None, sizes: dict[str, int], seed: int = 0) -> list[Tensor]:
    """Inputs for both: the example inputs of whichever is a model, else seeded random ones of the captured shapes.

    Args:
        first: an artifact or a model.
        second: another.
        sizes: wished sizes of dynamic dimensions by name; with any, inputs are random.
        seed: of the random numbers.
    """
    if not sizes:
        for subject in (first, second):
            if subject is not None and subject.examples is not None:
                return subject.examples
    uncut = [each for each in (first, second) if each is not None and not _is_cut(each)]
    return example_tensors((uncut or [first])[0].program.main, seed, sizes)


def _is_cut(subject: Subject) -> bool:
    cache = subject.program.main.cache
    return cache is not None and any(slot.kept for slot in cache.slots)
