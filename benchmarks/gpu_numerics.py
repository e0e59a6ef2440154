"""Every encoding's kernels, for several numbers of tokens, plain and between a norm and a gate, against float64."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_cases import CASES, Case, EncodedMatrix, can_pair, encode, exact, make_problem, normalise
from benchmarks.gpu_launch import Compiler, Trial, said
from sparc.codegen.triton.prior import candidates
from sparc.codegen.triton.problem import Configuration
from sparc.cost import Device

# Half of what the last place of the result is worth, and what sums of products in these types add to it; a gated result
# has the errors of two products.
TOLERANCE = {"float16": 2e-3, "bfloat16": 1.2e-2}
TOKENS = (1, 5, 16, 64, 200)


@dataclass(frozen=True)
class Subject:
    """A trial with its matrices."""

    case: Case
    matrices: tuple[EncodedMatrix, ...]
    norm: bool
    trial: Trial

    @property
    def name(self) -> str:
        """What is said of it."""
        chosen = self.trial.configuration
        form = "plain" if not self.norm else "norm and gate" if len(self.matrices) == 2 else "norm"
        sums = "" if chosen.split == 1 else ", split" if chosen.deterministic else ", atomic"
        return f"{self.case.name}, {self.trial.tokens} tokens, {form}{sums}"


def check(
    device: Device,
    place: str = "cuda",
    *,
    cases: Sequence[Case] = CASES,
    shape: tuple[int, int] = (328, 1000),
    tokens: Sequence[int] = TOKENS,
    compiler: Compiler | None = None,
) -> dict[str, Any]:
    """Run every kernel once and compare; the first failure is not the end.

    Args:
        device: the profile that configurations are chosen for.
        place: `cuda`, or `cpu` for the interpreter.
        cases: the encodings.
        shape: rows and columns; ragged, so that there are tails.
        tokens: numbers of tokens.
        compiler: compiles ahead.

    Returns:
        `checked`, how many; `failures`, sentences; `no_lowering`, reasons by case; `worst`, the greatest error over its
        tolerance, by case.
    """
    subjects, missing = find_subjects(device, place, cases, shape, tokens)
    if compiler is not None:
        compiler.submit(each.trial for each in subjects)
    failures: list[str] = []
    worst: dict[str, float] = {}
    for subject in subjects:
        tolerance = TOLERANCE[subject.case.dtype] * len(subject.matrices)
        try:
            if compiler is not None:
                compiler.fits(subject.trial)
            error = error_of(subject, place)
        except Exception as caught:  # whatever a compiler or a driver raises; the others are still to be checked
            failures.append(f"{subject.name}: {said(caught)}")
            continue
        worst[subject.case.name] = max(worst.get(subject.case.name, 0.0), error / tolerance)
        if not error <= tolerance:
            failures.append(f"{subject.name}: an error of {error:.1e}, and {tolerance:.1e} is allowed")
    return {"checked": len(subjects), "failures": failures, "no_lowering": missing, "worst": worst}


def find_subjects(
    device: Device, place: str, cases: Sequence[Case], shape: tuple[int, int], tokens: Sequence[int]
) -> tuple[list[Subject], dict[str, str]]:
    """What is to be checked, and why some cases are not."""
    subjects: list[Subject] = []
    missing: dict[str, str] = {}
    for case in cases:
        try:
            made = [encode(case, shape, place, seed) for seed in (0, 1)]
        except Exception as caught:
            missing[case.name] = f"encoding failed: {said(caught)}"
            continue
        refused = next((each for each in made if isinstance(each, str)), None)
        if refused is not None:
            missing[case.name] = refused
            continue
        matrices = tuple(each for each in made if isinstance(each, EncodedMatrix))
        subjects += [each for number in tokens for each in _subjects_of(case, matrices, device, number)]
    return subjects, missing


def _subjects_of(case: Case, matrices: tuple[EncodedMatrix, ...], device: Device, tokens: int) -> Iterator[Subject]:
    height = 1 if tokens == 1 else next(each for each in (16, 32, 64, 128) if each >= tokens or each == 128)
    for norm, chosen in ((False, matrices[:1]), (True, matrices[: 2 if can_pair(case) else 1])):
        problem = make_problem(chosen, norm)
        best: dict[str, Configuration] = {}
        for candidate in candidates(problem, device, height):
            best.setdefault(candidate.configuration.form, candidate.configuration)
        for configuration in best.values():
            yield Subject(case, chosen, norm, Trial(problem, configuration, tokens))
            if configuration.split > 1:
                unordered = replace(configuration, deterministic=False)
                yield Subject(case, chosen, norm, Trial(problem, unordered, tokens))


def error_of(subject: Subject, place: str) -> float:
    """The greatest error of one launch, relative to the greatest value; infinite where something is not a number, or
    the memory for split sums is not left as it was.
    """
    trial, dtype = subject.trial, getattr(torch, subject.case.dtype)
    rows, columns = subject.matrices[0].shape
    generator = torch.Generator(place).manual_seed(trial.tokens)
    x = torch.randn(trial.tokens, columns, generator=generator, device=place).to(dtype)
    gain = (torch.rand(columns, generator=generator, device=place) + 0.5).to(dtype)
    read = normalise(x, gain) if subject.norm else x.double()
    inside = bool(trial.own.prologue.arguments)
    if subject.norm and not inside:
        x = read.to(dtype)
        read = x.double()
    y = torch.full((trial.tokens, rows), torch.nan, dtype=dtype, device=place)
    buffers = [buffer for each in subject.matrices for buffer in each.buffers()]
    scratch = trial.scratch(place)
    trial.run(x, buffers, [gain] if inside else [], y, scratch)
    if bool(scratch.counters.any()):
        return float("inf")
    return relative(y, exact(read, [each.dense(torch.float64) for each in subject.matrices]))


def relative(found: Tensor, expected: Tensor) -> float:
    """The greatest error over the greatest value."""
    return float((found.double() - expected).abs().nan_to_num(nan=torch.inf).max() / expected.abs().max())
