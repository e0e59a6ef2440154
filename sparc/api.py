"""compile(): the whole pipeline, readable top to bottom."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.export import ExportedProgram

from sparc import codes, evidence
from sparc.analysis.sites import Site, find_sites
from sparc.artifact import Artifact, load_artifact
from sparc.capture import Dynamic, capture, merge
from sparc.diag import Diagnostics, PassError
from sparc.driver import VERIFY_LEVELS, Driver
from sparc.exported import capture_exported
from sparc.generation.task import EntryTask, Task, prepare_task
from sparc.memory import trim
from sparc.parity import check_sites
from sparc.pass_base import Pass, Samples, Stage
from sparc.program import Program
from sparc.recipe import Recipe, Step, resolve_recipe
from sparc.registry import Registry
from sparc.samples import Data, make_samples
from sparc.selector import assign
from sparc.signature import bind_examples
from sparc.target import Emission, EmitContext, Estimating, Target

if TYPE_CHECKING:
    from sparc.passes.levels import LevelMap

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


def registry(diagnostics: Diagnostics | None = None) -> Registry:
    """Everything registered: sparc's own passes, encodings, recipes and targets, and those of installed extensions."""
    from sparc import codegen, passes

    return Registry.load([passes.extension(), codegen.extension()], diagnostics)


def compile(
    model: nn.Module | ExportedProgram,
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
        model: a module in float32, or an exported program.
        example_inputs: a tuple (positional) or a mapping (keyword); values that are not tensors are frozen.
        task: `text-generation` works example inputs, dynamic dimensions and a cache out from a language model of
            transformers, a decoder or an encoder-decoder; `data` is then what its tokenizer returns.
        recipe: a registered name (`w8`, `w4`, `w8a8`, ...), a TOML file, a Recipe, or passes in order.
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
    known = registry(diagnostics)
    place, chosen = known.target(target.removesuffix(":cpu")), resolve_recipe(recipe, known)
    check_verify(verify)
    place.check_options(options or {})
    alone = {"forward": EntryTask(model, example_inputs, dynamic)}
    job = prepare_task(task, model, data) if task is not None else Task(alone, data)
    captured = _capture_task(job, diagnostics)
    examples = {name: entry.example_inputs for name, entry in job.entries.items()}
    samples = make_samples(captured, examples, job.data, diagnostics, job.feed)
    driver = Driver(captured, samples, diagnostics, verify=verify)
    plain, baseline = run_steps(driver, chosen, [known.pass_type(name)(**given) for name, given in place.legalizations])
    context = EmitContext(diagnostics, dict(options or {}), known.lowerings)
    emission = place.emit(driver.program, context)
    if verify != "types" and emission.native:
        check_sites(baseline, driver.program, place, samples, context, every=verify == "full")
    artifact = Artifact(driver.program, driver.ledger, diagnostics, emission, chosen.to_toml(), job.attachments)
    _gather_evidence(artifact, captured, baseline, samples, target)
    if measure:
        _measure(artifact, job, place, plain, context)
    driver.ledger.summary.metric = evidence.check_metric(metric, artifact)
    return artifact


def plan(
    model: nn.Module | ExportedProgram,
    example_inputs: Any,
    *,
    recipe: RecipeLike = "w8",
    dynamic: Dynamic | None = None,
) -> Plan:
    """What compile would do, without doing it; the arguments are compile's."""
    diagnostics = Diagnostics()
    chosen = resolve_recipe(recipe, registry(diagnostics))
    program = _capture(model, example_inputs, dynamic, diagnostics)
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

    Sites are assigned to steps once, when the graph has its final operators: after the last fold. What the target needs
    is run just before the first step that encodes.
    """
    plain = baseline = driver.program
    claimed: list[set[str]] | None = None
    wanted = list(legalizations)
    for index, step in enumerate(recipe.steps):
        if claimed is None and step.pass_.stage > Stage.FOLD:
            claimed = assign(recipe.steps, *find_sites(driver.program))
        while wanted and step.pass_.stage >= Stage.ENCODE:
            driver.run(wanted.pop(0), "* (for the target)", remarks=False)
        where = step.where if isinstance(step.where, str) else ", ".join(step.where)
        driver.run(step.pass_, where, partial(_claims, claimed[index]) if claimed is not None else None)
        if step.pass_.stage < Stage.CUT:
            plain = driver.program
        if step.pass_.stage < Stage.MASK:
            baseline = driver.program
    return plain, baseline


def _claims(claimed: set[str], site: Site) -> bool:
    return site.weight in claimed


def _capture_task(job: Task, diagnostics: Diagnostics) -> Program:
    programs = []
    for name, each in job.entries.items():
        program = _capture(each.model, each.example_inputs, each.dynamic, diagnostics, name)
        program.main.cache = each.cache
        programs.append(program)
    return merge(programs)


def _capture(
    model: nn.Module | ExportedProgram,
    examples: Any,
    dynamic: Dynamic | None,
    diagnostics: Diagnostics,
    entry: str = "forward",
) -> Program:
    if isinstance(model, ExportedProgram):
        return capture_exported(model, entry=entry, diagnostics=diagnostics)
    return capture(model, examples, dynamic=dynamic, entry=entry, diagnostics=diagnostics)


def _gather_evidence(artifact: Artifact, captured: Program, baseline: Program, samples: Samples, target: str) -> None:
    ledger, emission = artifact.ledger, artifact.emission
    why = evidence.skip_reasons(artifact.diagnostics)
    trim()
    ledger.sites = evidence.site_rows(baseline, artifact.program, emission, samples, why)
    trim()
    ledger.summary = evidence.summarize(captured, artifact.program, emission, samples, target, captured.weights.nbytes)


def _measure(artifact: Artifact, job: Task, place: Target, plain: Program, context: EmitContext) -> None:
    summary, emission = artifact.ledger.summary, artifact.emission
    estimated = isinstance(emission, Estimating) and not emission.native
    silent = EmitContext(Diagnostics(), context.options, context.lowerings)
    dense: Emission | None = None if estimated else place.emit(plain, silent)
    for name, each in job.entries.items():
        module = each.model if isinstance(each.model, nn.Module) else each.model.module()
        for label, given in (each.timed or {"": each.example_inputs}).items():
            named = bind_examples(module.forward, given)[0]
            tensors = artifact.program.entries[name].signature.bind((), named)
            if dense is None:
                found = emission.estimate(tensors, name)  # type: ignore[attr-defined]
                summary.latencies.append(replace(found, against=f"{found.against}: {label}") if label else found)
                continue
            ours, theirs = emission.runner(name, spin=False), dense.runner(name, spin=False)
            summary.latencies += evidence.latencies(ours, theirs, module, named, tensors, label=label)
