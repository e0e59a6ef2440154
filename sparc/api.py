"""compile(): the whole pipeline, readable top to bottom."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.export import ExportedProgram

from sparc import codes, evidence
from sparc.analysis.sites import find_sites
from sparc.artifact import Artifact, load_artifact
from sparc.cache import fit
from sparc.capture import Dynamic, capture, merge
from sparc.checkpoint.base import Checkpoint
from sparc.diag import Diagnostics, PassError
from sparc.driver import VERIFY_LEVELS, Driver
from sparc.exported import capture_exported, runnable
from sparc.generation.task import EntryTask, Task, prepare_task
from sparc.memory import trim
from sparc.parity import check_sites
from sparc.pass_base import Pass, Samples, Stage
from sparc.program import Program
from sparc.recipe import Recipe, Step, resolve_recipe
from sparc.registry import Registry
from sparc.samples import Data, make_samples
from sparc.selector import Selectable, assign, claimants
from sparc.signature import bind_examples
from sparc.target import Emission, EmitContext, Estimating, Target

if TYPE_CHECKING:
    from sparc.passes.levels import LevelMap

Model = nn.Module | ExportedProgram | Checkpoint
RecipeLike = str | Path | Recipe | Iterable[Pass | Step]


@dataclass(frozen=True)
class Plan:
    """What compile would do: the steps, and the sites each one is for.

    Args:
        recipe: the recipe.
        program: the captured program.
        claims: for each step, the weights it claims.
    """

    recipe: Recipe
    program: Program
    claims: tuple[frozenset[str], ...]


@dataclass(frozen=True)
class Job:
    """What compile is asked for, checked; made by `check_job`.

    Args:
        registry: everything registered.
        recipe: the recipe.
        target: the target.
        target_name: as the user spelt it.
        verify: `types`, `sample` or `full`.
        options: options of the target.
    """

    registry: Registry
    recipe: Recipe
    target: Target
    target_name: str
    verify: str
    options: Mapping[str, Any]

    def context(self, diagnostics: Diagnostics) -> EmitContext:
        """What the target may use while emitting."""
        return EmitContext(diagnostics, self.options, self.registry.lowerings)


def registry(diagnostics: Diagnostics | None = None) -> Registry:
    """Everything registered: sparc's own passes, encodings, recipes and targets, and those of installed extensions."""
    from sparc import codegen, passes

    return Registry.load([passes.extension(), codegen.extension()], diagnostics)


def compile(
    model: Model,
    example_inputs: Any = None,
    *,
    task: str | None = None,
    recipe: RecipeLike = "w8",
    target: str = "onnx",
    dynamic: Dynamic | None = None,
    data: Data = None,
    metric: Callable[[Artifact], Any] | None = None,
    verify: str = "sample",
    options: Mapping[str, Any] | None = None,
    measure: bool = True,
) -> Artifact:
    """Capture a model, compress it by a recipe, check everything, and lower it: the artifact is called like the model.

    Args:
        model: a module in float32, an exported program, or what `read_checkpoint` gave.
        example_inputs: a tuple (positional) or a mapping (keyword); values that are not tensors are frozen.
        task: `text-generation` works example inputs, dynamic dimensions and a cache out from a language model of
            transformers, a decoder or an encoder-decoder; `data` is then what its tokenizer returns.
        recipe: a registered name (`w8`, `w4`, `w8a8`, `keep`, ...), a TOML file, a Recipe, or passes in order.
        target: `onnx` (= `onnx:cpu`), `onnx:portable`, `onnx:cuda`, `cuda`, `cuda:sm_90`, `reference`.
        dynamic: dimensions that vary, by input and axis: `{"input_ids": {0: "batch", 1: "seq"}}`.
        data: inputs for calibration and measuring, or a function that returns them; every fourth one is held out
            from calibration.
        metric: called with the artifact; False stops the compile, a number is reported.
        verify: `types`, `sample` or `full`.
        options: options of the target, such as `opset`.
        measure: time the artifact against the uncompressed model.

    Raises:
        SparcError: a diagnostic with a stable code, what, where, why and what to do next; nothing is left behind.
    """
    diagnostics = Diagnostics()
    job = check_job(recipe, target, verify, options, diagnostics)
    given = _given(model, example_inputs, task, dynamic, data)
    captured = _capture(given, diagnostics)
    examples = {name: entry.example_inputs for name, entry in given.entries.items()}
    written = given.written if any(step.pass_.needs for step in job.recipe.steps) else None
    samples = make_samples(captured, examples, given.data, diagnostics, given.feed, written)
    artifact, plain = compile_program(captured, samples, job, diagnostics)
    artifact.attachments.update(given.attachments)
    if measure:
        _measure(artifact, given, job, plain)
    artifact.ledger.summary.metric = evidence.check_metric(metric, artifact)
    return artifact


def check_job(
    recipe: RecipeLike, target: str, verify: str, options: Mapping[str, Any] | None, diagnostics: Diagnostics
) -> Job:
    """What compile is asked for, checked; the arguments are compile's.

    Raises:
        SparcError: SPARC201 to SPARC213, SPARC407 for something that does not exist or does not fit.
    """
    known = registry(diagnostics)
    place, chosen = known.target(target.removesuffix(":cpu")), resolve_recipe(recipe, known)
    check_verify(verify)
    place.check_options(options or {})
    return Job(known, chosen, place, target, verify, dict(options or {}))


def compile_program(
    captured: Program, samples: Samples, job: Job, diagnostics: Diagnostics
) -> tuple[Artifact, Program]:
    """Compress, check and lower a program; nothing is timed.

    Args:
        captured: the program; it is not changed.
        samples: inputs for calibration and checks.
        job: what to do.
        diagnostics: gets warnings and remarks.

    Returns:
        The artifact, and the program before the first step that serves compression.
    """
    driver = Driver(captured, samples, diagnostics, verify=job.verify)
    needed = [job.registry.pass_type(name)(**given) for name, given in job.target.legalizations]
    plain, baseline = run_steps(driver, job.recipe, needed)
    program, ledger, fitted = driver.program, driver.ledger, driver.samples
    del driver  # it remembers weights as they were before rounding
    context = job.context(diagnostics)
    emission = job.target.emit(program, context)
    if job.verify != "types" and emission.native:
        check_sites(baseline, program, job.target, fitted, context, every=job.verify == "full")
    artifact = Artifact(program, ledger, diagnostics, emission, job.recipe.to_toml())
    why = evidence.skip_reasons(diagnostics)
    trim()
    ledger.sites = evidence.site_rows(baseline, program, emission, fitted, why)
    trim()
    dense_bytes = captured.weights.nbytes
    ledger.summary = evidence.summarize(captured, program, emission, samples, job.target_name, dense_bytes)
    return artifact, plain


def plan(
    model: Model,
    example_inputs: Any = None,
    *,
    task: str | None = None,
    recipe: RecipeLike = "w8",
    dynamic: Dynamic | None = None,
) -> Plan:
    """What compile would do, without doing it; the arguments are compile's."""
    diagnostics = Diagnostics()
    chosen = resolve_recipe(recipe, registry(diagnostics))
    program = _capture(_given(model, example_inputs, task, dynamic, None), diagnostics)
    sites, others = find_sites(program)
    return Plan(chosen, program, tuple(frozenset(claimed) for claimed in assign(chosen.steps, sites, others)))


def coalesce(program: Program, width: int = 2, depth: int = 2) -> "tuple[Program, LevelMap]":
    """A smaller program with merged features and layers, and the map back: see `sparc.passes.levels.coalesce`."""
    from sparc.passes import levels

    return levels.coalesce(program, width, depth)


def decoalesce(small: Program, level: "LevelMap") -> Program:
    """The larger program that acts like a coalesced one: see `sparc.passes.levels.decoalesce`."""
    from sparc.passes import levels

    return levels.decoalesce(small, level)


def interpolate(big: Program, grown: Program, alpha: float) -> Program:
    """`(1 - alpha) * big + alpha * grown`, weight by weight: see `sparc.passes.levels.interpolate`."""
    from sparc.passes import levels

    return levels.interpolate(big, grown, alpha)


def widen(
    program: Program, layer: str, units: int, *, kind: str | None = None, seed: int = 0, noise: float = 0.0
) -> Program:
    """The same function with more units in a layer: see `sparc.passes.grow.widen`."""
    from sparc.passes import grow

    return grow.widen(program, layer, units, kind=kind, seed=seed, noise=noise)


def deepen(program: Program, block: int = -1, stack: int = 0) -> Program:
    """The same function with one more repetition of a repeated block: see `sparc.passes.grow.deepen`."""
    from sparc.passes import grow

    return grow.deepen(program, block, stack)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint that another tool compressed, as it is: the recipe `keep` compiles its codes and scales.

    Args:
        path: a `.gguf` file, or a Hugging Face folder of GPTQ, AWQ, compressed-tensors or FP8 weights.

    Returns:
        a model with float32 weights, and the grids that they lie on; nothing is rounded again.

    Raises:
        CaptureError: SPARC106 for weights that are not finite, SPARC110 when the file, or transformers, is missing,
            SPARC116 to SPARC119 for files that are cut short, contradict themselves, are of an unknown kind, or whose
            weights are not those of their architecture.
    """
    from sparc.checkpoint import read

    return read.read_checkpoint(path)


def load(folder: str | Path) -> Artifact:
    """Read an artifact that `Artifact.save` wrote; every file is checked before it is used.

    Args:
        folder: the artifact's folder.

    Raises:
        ArtifactError: SPARC501 to SPARC507 when it is incomplete, altered, malformed or unsafe.
    """
    known = registry()
    return load_artifact(folder, known.encodings, known.target, known.lowerings)


def check_verify(verify: str) -> None:
    """Raises PassError SPARC209 for a level that does not exist."""
    if verify not in VERIFY_LEVELS:
        raise PassError(
            codes.BAD_OPTION, f"verify={verify!r} does not exist", hint=f"one of {', '.join(VERIFY_LEVELS)}"
        )


def run_steps(driver: Driver, recipe: Recipe, legalizations: Iterable[Pass] = ()) -> tuple[Program, Program]:
    """Run a recipe's steps; returns the program before the first step that serves compression, which is what the
    artifact is timed against, and the program before the first step that approximates, which sites are compared with.

    Sites are assigned to steps when the graph has its final operators, after the last fold, or when a later step made
    them: factors of low rank, a head of its own. What the target needs is run just before the first step that encodes.
    """
    plain = baseline = driver.program
    claimed: dict[str, set[int]] | None = None
    wanted = list(legalizations)
    for index, step in enumerate(recipe.steps):
        if claimed is None and step.pass_.stage > Stage.FOLD:
            assign(recipe.steps, *find_sites(driver.program))  # every pattern must name something
            claimed = {}
        while wanted and step.pass_.stage >= Stage.ENCODE:
            driver.run(wanted.pop(0), "* (for the target)", remarks=False)
        where = step.where if isinstance(step.where, str) else ", ".join(step.where)
        driver.run(step.pass_, where, partial(_claims, recipe, claimed, index) if claimed is not None else None)
        if step.pass_.stage < Stage.CUT:
            plain = driver.program
        if step.pass_.stage < Stage.LOW_RANK:
            baseline = driver.program
    for each in wanted:
        driver.run(each, "* (for the target)", remarks=False)
    return plain, baseline


def _claims(recipe: Recipe, claimed: dict[str, set[int]], step: int, weight: Selectable) -> bool:
    if weight.weight not in claimed:
        claimed[weight.weight] = claimants(recipe.steps, weight)
    return step in claimed[weight.weight]


def _given(model: Model, examples: Any, task: str | None, dynamic: Dynamic | None, data: Data) -> Task:
    alone = {"forward": EntryTask(model, examples, dynamic)}
    return prepare_task(task, model, data) if task is not None else Task(alone, data)


def _capture(given: Task, diagnostics: Diagnostics) -> Program:
    programs = []
    for name, each in given.entries.items():
        if isinstance(each.model, ExportedProgram):
            program = capture_exported(each.model, entry=name, diagnostics=diagnostics)
        else:
            program = capture(
                each.model, each.example_inputs, dynamic=each.dynamic, entry=name, diagnostics=diagnostics
            )
        program.main.cache = each.cache
        programs.append(program)
    return merge(programs)


def _measure(artifact: Artifact, given: Task, job: Job, plain: Program) -> None:
    summary, emission = artifact.ledger.summary, artifact.emission
    estimated = isinstance(emission, Estimating) and not emission.native
    dense: Emission | None = None if estimated else job.target.emit(plain, job.context(Diagnostics()))
    for name, each in given.entries.items():
        module = runnable(each.model)
        for label, inputs in (each.timed or {"": each.example_inputs}).items():
            named = bind_examples(module.forward, inputs)[0]
            entry = artifact.program.entries[name]
            given_tensors = entry.signature.bind((), named)
            tensors = fit(entry, given_tensors)
            if dense is None:
                found = emission.estimate(tensors, name)  # type: ignore[attr-defined]
                summary.latencies.append(replace(found, against=f"{found.against}: {label}") if label else found)
                continue
            ours, theirs = emission.runner(name, spin=False), dense.runner(name, spin=False)
            summary.latencies += evidence.latencies(
                ours, theirs, module, named, tensors, label=label, dense_tensors=given_tensors
            )
