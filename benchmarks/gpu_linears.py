"""The linear layers of Llama-3-8B: our kernels against the floor, torch's float16 and other packages."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.gpu_cases import CASES, Case, EncodedMatrix, can_pair, encode, exact, make_problem
from benchmarks.gpu_launch import Compiler, Trial, said
from benchmarks.gpu_numerics import TOLERANCE, relative
from benchmarks.gpu_peers import PEERS
from sparc.codegen.triton.prior import Candidate, at, candidates, dense_seconds
from sparc.codegen.triton.regimes import HEIGHTS
from sparc.codegen.triton.timing import Replay, copies_of, record, time_in_turns
from sparc.cost import Cost, Device

TOKENS = (1, 16, 64, 4096)
_CHECKED = 64  # tokens whose results are compared with float64
_TUNING_ROUNDS = 7
FLOAT16 = "torch float16"


@dataclass(frozen=True)
class Layer:
    """A linear layer; `gated` ones are two of this shape, whose kernel ends with the gate."""

    name: str
    rows: int
    columns: int
    gated: bool = False


LAYERS = (
    Layer("qkv 4096→6144", 6144, 4096),
    Layer("o 4096→4096", 4096, 4096),
    Layer("gate+up 4096→28672", 14336, 4096, gated=True),
    Layer("down 14336→4096", 4096, 14336),
)


@dataclass(frozen=True)
class Plan:
    """What is measured, and for how long.

    Args:
        cases: encodings.
        layers: layers.
        tokens: numbers of tokens.
        rounds: of every timing.
        seconds: when to stop.
        tune: whether every configuration is tried.
        tuning_seconds: for trying configurations.
        place: where tensors are.
    """

    cases: Sequence[Case] = CASES
    layers: Sequence[Layer] = LAYERS
    tokens: Sequence[int] = TOKENS
    rounds: int = 30
    seconds: float = 300
    tune: bool = False
    tuning_seconds: float = 120
    place: str = "cuda"


@dataclass
class Subject:
    """A layer in an encoding, and the trials for every number of tokens, by the model's time."""

    case: Case
    layer: Layer
    matrices: list[EncodedMatrix]
    trials: dict[int, list[Trial]] = field(default_factory=dict)


def measure(device: Device, plan: Plan, compiler: Compiler) -> dict[str, Any]:
    """Time every case, layer and number of tokens until time is up. All are encoded first, so that kernels are compiled
    while others are timed.

    Returns:
        `rows`, one for each; `no_lowering`, reasons by case; `not_reached`, what there was no time for; `kernels`,
        seconds by kernel digest.
    """
    started = time.monotonic()
    session = _Session(device, plan, compiler)
    subjects: list[Subject] = []
    for case in plan.cases:
        if time.monotonic() - started > plan.seconds / 3:
            session.late.append(case.name)
            continue
        subjects += session.prepare(case)
    rows: list[dict[str, Any]] = []
    for subject in subjects:
        for tokens in subject.trials:
            if time.monotonic() - started > plan.seconds:
                session.late.append(f"{subject.case.name}, {subject.layer.name}, {tokens} tokens")
                continue
            rows.append(session.row(subject, tokens))
            print(_line(rows[-1]), flush=True)
        torch.cuda.empty_cache()
    found = {"rows": rows, "no_lowering": session.missing, "not_reached": session.late}
    return {**found, "kernels": session.timings}


class _Session:
    """What measuring goes by, and what it leaves behind beside the rows."""

    def __init__(self, device: Device, plan: Plan, compiler: Compiler) -> None:
        self.device, self.plan, self.compiler = device, plan, compiler
        self.missing: dict[str, str] = {}
        self.late: list[str] = []
        self.timings: dict[str, float] = {}
        self.tuning_left = plan.tuning_seconds

    def prepare(self, case: Case) -> list[Subject]:
        """A case's layers, encoded, with their kernels being compiled."""
        made: list[Subject] = []
        for layer in self.plan.layers:
            try:
                matrices = _matrices(case, layer, self.plan.place)
            except Exception as caught:  # of memory, or of an encoding on this device; the others are still to come
                matrices = f"encoding failed: {said(caught)}"
            if isinstance(matrices, str):
                self.missing[case.name] = matrices
                return []
            made.append(Subject(case, layer, matrices, self._trials(matrices)))
        for subject in made:
            for trials in subject.trials.values():
                self.compiler.submit(trials if self.plan.tune else trials[:1])
        return made

    def _trials(self, matrices: Sequence[EncodedMatrix]) -> dict[int, list[Trial]]:
        problem = make_problem(matrices, norm=False)
        by_height = {height: candidates(problem, self.device, height) for height in HEIGHTS}
        trials: dict[int, list[Trial]] = {}
        for tokens in self.plan.tokens:
            heights = [each for each in HEIGHTS if each <= max(16, 2 * tokens) and (each > 1 or tokens == 1)]
            found = sorted((each for height in heights for each in by_height[height]), key=partial(_seconds, tokens))
            kept = found if self.plan.tune else found[:2]
            trials[tokens] = [Trial(problem, each.configuration, tokens, at(each.seconds, tokens)) for each in kept]
        return trials

    def row(self, subject: Subject, tokens: int) -> dict[str, Any]:
        """Measure; what goes wrong is said in the row."""
        row: dict[str, Any] = {"case": subject.case.name, "layer": subject.layer.name, "tokens": tokens}
        row["floor"] = floor(subject.matrices, tokens, self.device)
        try:
            bench = _Bench(subject, tokens, self.plan.place)
            best = self._best(bench, subject.trials[tokens])
            decoded = at(dense_seconds(best.problem, self.device, cached=False), tokens)
            row["configuration"] = vars(best.configuration)
            row["modelled"] = {"ours": best.modelled, "decoded and torch": decoded}
            row["error"] = bench.error(best)
            row["seconds"] = bench.times(best, self.plan.rounds)
            for kernel in (best.specialised(), best.kernel):
                self.timings[kernel.digest] = row["seconds"]["ours"]
            row["failed"] = bench.failed
        except Exception as caught:  # whatever a compiler or a driver raises; the others are still to be measured
            row["failed"] = {"ours": said(caught)}
        return row

    def _best(self, bench: "_Bench", trials: Sequence[Trial]) -> Trial:
        """The first whose kernel fits; where there is time for tuning, the fastest."""
        if not self.plan.tune or self.tuning_left <= 0:
            return next(trial for trial in trials if self.compiler.fits(trial))
        started = time.monotonic()
        best = bench.fastest([trial for trial in trials if self.compiler.fits(trial)], self.tuning_left)
        self.tuning_left -= time.monotonic() - started
        return best


def _seconds(tokens: int, candidate: Candidate) -> float:
    return at(candidate.seconds, tokens)


def _matrices(case: Case, layer: Layer, place: str) -> list[EncodedMatrix] | str:
    """The two of a gated layer, or one; gated ones that no kernel pairs are stacked."""
    pair = layer.gated and can_pair(case)
    rows = layer.rows * (2 if layer.gated and not pair else 1)
    made: list[EncodedMatrix] = []
    for seed in range(2 if pair else 1):
        each = encode(case, (rows, layer.columns), place, seed)
        if isinstance(each, str):
            return each
        made.append(each)
    return made


# one measurement ------------------------------------------------------------------------------------------------------
def floor(matrices: Sequence[EncodedMatrix], tokens: int, device: Device) -> float:
    """Seconds that reading what is stored, the activation, and writing the result take, or the kept products."""
    rows, columns = sum(each.shape[0] for each in matrices), matrices[0].shape[1]
    case, lowering = matrices[0].case, matrices[0].lowering
    product = getattr(torch, case.dtype)
    out = rows if len(matrices) == 1 else rows // 2
    moved = sum(each.nbytes for each in matrices) + tokens * (columns + out) * product.itemsize
    density = lowering.cost(case.dtype).density  # type: ignore[arg-type]
    flops = 2 * tokens * rows * columns * density
    return float(device.roofline(Cost(sympy.Float(flops), sympy.Float(moved)), case.dtype))


class _Bench:
    """The contenders for one layer and number of tokens."""

    def __init__(self, subject: Subject, tokens: int, place: str) -> None:
        self.subject, self.tokens, self.place = subject, tokens, place
        self.dtype = getattr(torch, subject.case.dtype)
        self.columns = subject.layer.columns
        self.rows = subject.matrices[0].shape[0]
        generator = torch.Generator(place).manual_seed(0)
        self.x = torch.randn(tokens, self.columns, generator=generator, device=place).to(self.dtype)
        self.y = torch.full((tokens, self.rows), torch.nan, device=place, dtype=self.dtype)
        self.failed: dict[str, str] = {}
        own = [buffer for each in subject.matrices for buffer in each.buffers()]
        self.sets = [own]
        while len(self.sets) < copies_of(sum(each.nbytes for each in own)):
            self.sets.append([each.clone() for each in own])

    def calls(self, trial: Trial, sets: Sequence[Sequence[Tensor]]) -> list[Callable[[], None]]:
        """The kernel, on every set of weights."""
        scratch = trial.scratch(self.place)
        return [partial(trial.run, self.x, buffers, (), self.y, scratch) for buffers in sets]

    def error(self, trial: Trial) -> float:
        """The error against float64, relative to the greatest value.

        Raises:
            ValueError: when it is more than rounding explains.
        """
        self.y.fill_(torch.nan)
        self.calls(trial, self.sets[:1])[0]()
        chosen = torch.linspace(0, self.tokens - 1, min(_CHECKED, self.tokens), device=self.place).long()
        dense = [each.dense(torch.float64) for each in self.subject.matrices]
        found = relative(self.y[chosen], exact(self.x[chosen].double(), dense))
        if not found <= TOLERANCE[self.subject.case.dtype] * len(dense):
            raise ValueError(f"its error is {found:.1e}")
        return found

    def fastest(self, trials: Sequence[Trial], seconds: float) -> Trial:
        """The fastest of the trials that there is time for; those that fail are left out."""
        end = time.monotonic() + seconds
        found: dict[Trial, float] = {}
        for trial in trials:
            if time.monotonic() > end and found:
                break
            try:
                replay = record(self.calls(trial, self.sets))
                found[trial] = time_in_turns({"it": replay}, _TUNING_ROUNDS)["it"]
            except Exception as caught:
                self.failed[f"configuration {trial.configuration}"] = said(caught)
        return min(found, key=lambda trial: found[trial])

    def times(self, trial: Trial, rounds: int) -> dict[str, float]:
        """Median seconds by contender; what fails is in `failed`."""
        replays = {"ours": record(self.calls(trial, self.sets))}
        if trial.configuration.split > 1:
            unordered = replace(trial, configuration=replace(trial.configuration, deterministic=False))
            self._add(replays, "ours, atomic", lambda: record(self.calls(unordered, self.sets)))
        self._add(replays, FLOAT16, self._torch)
        for peer in PEERS:
            if self.subject.case.name in peer.cases and self.tokens >= peer.least_tokens:
                self._add(replays, peer.name, partial(self._peer, peer.prepare, peer.dtype))
        return time_in_turns(replays, rounds)

    def _add(self, replays: dict[str, Replay], name: str, make: Callable[[], Replay]) -> None:
        try:
            replays[name] = make()
        except ImportError:
            self.failed[name] = "not installed"
        except Exception as caught:
            self.failed[name] = said(caught)

    def _weight(self, dtype: torch.dtype) -> Tensor:
        """A dense weight of the whole layer: of a gated one both matrices, without the gate."""
        rows = self.subject.layer.rows * (2 if self.subject.layer.gated else 1)
        return (torch.randn(rows, self.columns, device=self.place) * self.columns**-0.5).to(dtype)

    def _torch(self) -> Replay:
        weight = self._weight(self.dtype)
        weights = [weight, *(weight.clone() for _ in range(copies_of(weight.nbytes) - 1))]
        return record([partial(linear, self.x, each) for each in weights])

    def _peer(self, prepare: Callable[[Tensor], Callable[[Tensor], Any]], dtype: torch.dtype) -> Replay:
        weight, x = self._weight(dtype), self.x.to(dtype)
        nbytes = sum(each.nbytes for each in self.sets[0])
        return record([partial(prepare(weight), x) for _ in range(copies_of(nbytes))])


def _line(row: Mapping[str, Any]) -> str:
    parts = [f"{row['case']}, {row['layer']}, {row['tokens']} tokens: floor {row['floor'] * 1e6:.1f}"]
    parts += [f"{name} {seconds * 1e6:.1f}" for name, seconds in row.get("seconds", {}).items()]
    parts += [f"{name}: {why}" for name, why in row.get("failed", {}).items() if why != "not installed"]
    return "; ".join(parts)
