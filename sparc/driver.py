"""The driver: for each pass, clone, run, check against the contract, diff, record. A pass only edits."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from sparc import codes
from sparc.analysis.values import tensor_type
from sparc.calibration import Calibration
from sparc.contract import Approximate, Bounded, Exact
from sparc.diag import Diagnostics, PassError, SparcError, VerifyError
from sparc.execute import execute
from sparc.ledger import Ledger, PassRow
from sparc.memory import trim
from sparc.pass_base import Pass, PassContext, Rewrite, Samples, Stage
from sparc.program import Program, location
from sparc.samples import fit_samples
from sparc.selector import Selectable
from sparc.verify import (
    WIDE_TOLERANCE,
    check_region,
    check_types,
    cosine,
    is_resized,
    measure_sites,
    record_values,
    relative_error,
    sample,
)

Claims = Callable[[Selectable], bool]
_ROUNDED_TOLERANCE = 1e-6  # of float64 runs with weights that were rounded to float32
VERIFY_LEVELS = ("types", "sample", "full")


@dataclass
class Driver:
    """Runs passes over a program and keeps the evidence.

    Args:
        program: the current program; replaced after every pass that keeps its contract.
        samples: inputs for checks and calibration; a pass that cuts a cache's channels cuts theirs.
        diagnostics: where remarks go.
        ledger: where rows go.
        verify: `types` (types only), `sample` (one match of each shape class, and end to end) or `full` (every match).
    """

    program: Program
    samples: Samples
    diagnostics: Diagnostics = field(default_factory=Diagnostics)
    ledger: Ledger = field(default_factory=Ledger)
    verify: str = "sample"
    _outputs: dict[str, list[Any]] = field(default_factory=dict)
    _reference: Program | None = None

    def __post_init__(self) -> None:
        self._captured = self.samples

    def run(self, step: Pass, where: str = "*", claims: Claims | None = None, *, remarks: bool = True) -> PassRow:
        """Run one pass on a clone, check it, and make the clone the current program.

        Args:
            step: the pass.
            where: its selector, for the ledger.
            claims: whether the selector claims a weight; every one by default.
            remarks: keep what the pass says of candidates it leaves alone.

        Raises:
            VerifyError: SPARC301 or SPARC304 when the pass breaks its contract; the text around the guilty match is
                in the error.
            PassError: SPARC207 when the pass itself fails, SPARC208 when it needs data and there is none.
        """
        started = time.perf_counter()
        before, after = self.program, self.program.clone()
        if self._reference is None and step.stage >= Stage.MASK and isinstance(step.contract, Approximate):
            self._reference = before
        context = self._edit(step, after, claims, diagnostics=self.diagnostics if remarks else Diagnostics())
        row = PassRow(str(step), where, str(step.contract), context.edits, bytes_before=before.weights.nbytes)
        row.skips = list(context.skips) if remarks else []
        row.changed = count_changes(before, after)
        check_types(step.name, before, after)  # always: a node that moved has no new fingerprint
        if row.changed:
            trim()  # checks need memory, too
            if self.verify != "types":
                try:
                    row.measured = self._check(step, before, after, context)
                except RuntimeError as error:  # types that agree are no proof that an operator takes its inputs
                    what = f"what pass {step.name!r} made cannot be run"
                    raise VerifyError(codes.CONTRACT_BROKEN, what, why=str(error)[:300]) from error
            self._note_dropped_grids(before, after, step)
        row.bytes_after = after.weights.nbytes
        if isinstance(step.contract, Approximate) and is_resized(before, after):
            self.samples = fit_samples(self._captured, after)
            self._reference = after  # nothing is left to compare weights with
        self.program = after
        if row.changed:
            del before, context
            trim()
        row.seconds = time.perf_counter() - started
        self.ledger.passes.append(row)
        return row

    # running --------------------------------------------------------------------------------------------------------
    def _edit(
        self,
        step: Pass,
        program: Program,
        claims: Claims | None,
        limit: int | None = None,
        diagnostics: Diagnostics | None = None,
    ) -> PassContext:
        first = {entry: batches[0] for entry, batches in self.samples.calibration.items() if batches}
        context = PassContext(
            diagnostics,
            claims=claims,
            limit=limit,
            reference=self._reference,
            example=self.samples.example or first,
            calibration=self.samples.calibration,
        )
        try:
            if step.needs:
                self._calibrated(step, program, context)
            else:
                step.run(program, context)
        except SparcError:
            raise
        except Exception as error:  # a pass may be anybody's code
            raise PassError(
                codes.PASS_FAILED, f"pass {step.name!r} raised {type(error).__name__}", why=str(error)[:300]
            ) from error
        program.sweep()
        return context

    def _calibrated(self, step: Pass, program: Program, context: PassContext) -> None:
        """Run a pass block by block, each on statistics taken behind the blocks that were changed before it.

        A pass whose scope is the program runs once, on statistics of all blocks.
        """
        batches = self.samples.calibration
        if not any(batches.values()):
            raise PassError(codes.DATA_NEEDED, f"pass {step.name!r} needs calibration data")
        calibration = Calibration(program, batches)
        if step.scope == "program":
            context.statistics = calibration.gather_all(step.watches(program, context))
            step.run(program, context)
            context.statistics = None
            return
        for block in calibration.blocks:
            context.block = block
            context.statistics = calibration.gather(block, step.watches(program, context))
            step.run(program, context)
            context.statistics = None  # else two blocks' would be held while the next one's are gathered
            calibration.advance(block)
        context.block = None

    # checking -------------------------------------------------------------------------------------------------------
    def _check(self, step: Pass, before: Program, after: Program, context: PassContext) -> dict[str, float]:
        contract = step.contract
        if isinstance(contract, Approximate):
            return self._check_approximate(step, contract, before, after)
        measured = self._check_regions(step, contract, before, after, context.rewrites)
        reference = self.outputs(before)
        outputs = self._run_all(after)
        worst = max((relative_error(a, b) for a, b in _pairs(reference, outputs)), default=0.0)
        measured["end to end"] = worst
        bound = 0.0 if isinstance(contract, Exact) else contract.native(_dtypes(before))
        if not worst <= bound:
            self._blame(step, before, worst, bound, context.edits)
        if isinstance(contract, Bounded) and step.scope == "program":
            measured["end to end, float64"] = self._check_wide(step, before, after, context.wide)
        self._outputs = outputs
        return measured

    def _check_regions(
        self, step: Pass, contract: Exact | Bounded, before: Program, after: Program, rewrites: Sequence[Rewrite]
    ) -> dict[str, float]:
        chosen = sample(rewrites, self.verify == "full")
        wide = native = 0.0
        for entry in {rewrite.entry for rewrite in chosen}:
            ours = [rewrite for rewrite in chosen if rewrite.entry == entry]
            wanted = {name for rewrite in ours for name in rewrite.boundary}
            inputs = self.samples.example.get(entry) or self.samples.held_out[entry][0]
            values = record_values(before, entry, inputs, wanted & _names(before, entry))
            values |= record_values(after, entry, inputs, (wanted - set(values)) & _names(after, entry))
            for rewrite in ours:
                check = check_region(rewrite, values)
                if isinstance(contract, Exact) and check.native != 0:
                    raise broken(
                        step, rewrite, f"the region is not bitwise equal (relative difference {check.native:.3g})"
                    )
                if check.wide > WIDE_TOLERANCE:
                    raise broken(
                        step,
                        rewrite,
                        f"the region differs by {check.wide:.3g} in float64, more than {WIDE_TOLERANCE:g}",
                    )
                if isinstance(contract, Bounded) and check.native > contract.native(_dtypes(before)):
                    bound = contract.native(_dtypes(before))
                    raise broken(step, rewrite, f"the region differs by {check.native:.3g}, more than {bound:g}")
                wide, native = max(wide, check.wide), max(native, check.native)
        return {"regions checked": float(len(chosen)), "region, float64": wide, "region": native} if chosen else {}

    def _check_wide(self, step: Pass, before: Program, after: Program, wide: Mapping[str, Tensor]) -> float:
        """Compare whole programs in float64; new weights are taken as they were before rounding, if the pass says."""
        bound = WIDE_TOLERANCE if wide else _ROUNDED_TOLERANCE
        changed = {**after.weights, **{name: tensor for name, tensor in wide.items() if name in after.weights}}
        worst = 0.0
        for entry, batches in self.samples.held_out.items():
            for tensors in batches[:1]:
                old = before.run_flat(tensors, entry=entry, wide=True)
                new = execute(after.entries[entry].graph, changed, tensors, wide=True)
                worst = max(
                    worst, *(relative_error(a, b) for a, b in zip(old, new, strict=True) if isinstance(a, Tensor)), 0.0
                )
        if worst > bound:
            raise VerifyError(
                codes.CONTRACT_BROKEN, f"pass {step.name!r} changed the program", why=f"by {worst:.3g} in float64"
            )
        return worst

    def _check_approximate(
        self, step: Pass, contract: Approximate, before: Program, after: Program
    ) -> dict[str, float]:
        measures = measure_sites(before, after, self._checked, contract.metric)
        restored = 0
        for measure in measures:
            if contract.floor is not None and measure.worst < contract.floor:
                node = restore_site(before, after, measure.entry, measure.node)
                restored += 1
                self.diagnostics.warn(
                    codes.RESTORED,
                    f"a site was restored after {step.name}",
                    where=location(node),
                    why=f"{contract.metric} {measure.worst:.3g} is below the floor {contract.floor:g}",
                )
        after.sweep()
        self._outputs = {}
        figures = sorted(measure.worst for measure in measures)
        whole = self._end_to_end(before, after) if is_resized(before, after) else {}
        if not figures:
            return whole
        return {
            "sites measured": float(len(figures)),
            f"worst {contract.metric}": figures[0],
            f"median {contract.metric}": figures[len(figures) // 2],
            "restored": float(restored),
            **whole,
        }

    def _end_to_end(self, before: Program, after: Program) -> dict[str, float]:
        """How alike outputs are, where values inside have other sizes than before."""
        found = []
        for entry, batches in self._checked.items():
            for old, new in zip(batches, fit_samples(self._captured, after).held_out[entry], strict=False):
                outputs = before.run_flat(old, entry=entry), after.run_flat(new, entry=entry)
                pairs = [pair for pair in zip(*outputs, strict=True) if isinstance(pair[0], Tensor)]
                found += [cosine(a, b) for a, b in pairs if a.is_floating_point() and a.shape == b.shape]
        return {"worst cosine, end to end": min(found)} if found else {}

    def _blame(self, step: Pass, before: Program, worst: float, bound: float, edits: int) -> None:
        """Find the first edit after which the program is wrong, and raise with the text around it."""
        why = f"the outputs differ by {worst:.3g}, more than {bound:g}"
        if step.needs or edits < 1:
            raise VerifyError(codes.CONTRACT_BROKEN, f"pass {step.name!r} broke its contract", why=why)
        reference = self.outputs(before)
        good, bad = 0, edits
        context = PassContext()
        while bad - good > 1:
            middle = (good + bad) // 2
            trial = before.clone()
            self._edit(step, trial, None, limit=middle)
            wrong = any(not relative_error(a, b) <= bound for a, b in _pairs(reference, self._run_all(trial)))
            good, bad = (good, middle) if wrong else (middle, bad)
        context = self._edit(step, before.clone(), None, limit=bad)
        if context.rewrites:
            raise broken(step, context.rewrites[-1], why, f"edit {bad} of {edits}")
        raise VerifyError(
            codes.CONTRACT_BROKEN, f"pass {step.name!r} broke its contract at edit {bad} of {edits}", why=why
        )

    # outputs --------------------------------------------------------------------------------------------------------
    def outputs(self, program: Program) -> dict[str, list[Any]]:
        """The program's outputs on the held-out samples; those of the current program are kept between passes."""
        if program is not self.program:
            return self._run_all(program)
        if not self._outputs:
            self._outputs = self._run_all(program)
        return self._outputs

    @property
    def _checked(self) -> dict[str, list[list[Tensor]]]:
        """The held-out batches that checks run on: one of each entry, four in full verification."""
        count = 4 if self.verify == "full" else 1
        return {entry: batches[:count] for entry, batches in self.samples.held_out.items()}

    def _run_all(self, program: Program) -> dict[str, list[Any]]:
        return {
            entry: [program.run_flat(tensors, entry=entry) for tensors in batches]
            for entry, batches in self._checked.items()
        }

    def _note_dropped_grids(self, before: Program, after: Program, step: Pass) -> None:
        for name in after.weights:
            if name in before.weights and before.grid(name) is not None and after.grid(name) is None:
                self.diagnostics.remark(codes.GRID_DROPPED, f"the grid of {name!r} was dropped by {step.name}")


def _names(program: Program, entry: str) -> set[str]:
    return {node.name for node in program.entries[entry].graph.nodes}


def _dtypes(program: Program) -> set[torch.dtype]:
    """The types that a program computes in."""
    kinds = (tensor_type(node) for _, node in program.nodes())
    return {kind.dtype for kind in kinds if kind is not None}


def _pairs(a: Mapping[str, list[Any]], b: Mapping[str, list[Any]]) -> list[tuple[Tensor, Tensor]]:
    return [
        (x, y)
        for entry in a
        for before, after in zip(a[entry], b[entry], strict=True)
        for x, y in zip(before, after, strict=True)
        if isinstance(x, Tensor)
    ]


def count_changes(before: Program, after: Program) -> int:
    """How many nodes were added, removed or edited, and how many weights have another value."""
    changed = 0
    for name, entry in after.entries.items():
        old = {node.name: fingerprint(node) for node in before.entries[name].graph.nodes}
        new = {node.name: fingerprint(node) for node in entry.graph.nodes}
        changed += sum(old.get(key) != value for key, value in new.items()) + sum(key not in new for key in old)
    names = set(before.weights) | set(after.weights)
    changed += sum(
        name not in before.weights
        or name not in after.weights
        or before.weights.record(name) != after.weights.record(name)
        for name in names
    )
    return changed


def fingerprint(node: fx.Node) -> tuple[Any, ...]:
    """What a node computes, by the names of its inputs."""
    return (
        node.op,
        str(node.target),
        fx.node.map_arg(node.args, lambda used: used.name),
        fx.node.map_arg(dict(node.kwargs), lambda used: used.name),
    )


def broken(step: Pass, rewrite: Rewrite, why: str, which: str = "a match") -> VerifyError:
    """The error for a guilty match, with both texts of its region."""
    texts = [" ; ".join(_region_text(graph)) for graph in (rewrite.before, rewrite.after)]
    return VerifyError(
        codes.CONTRACT_BROKEN,
        f"pass {step.name!r} broke its contract {step.contract} at {which}",
        where=rewrite.where,
        why=f"{why}\n  before: {texts[0]}\n  after:  {texts[1]}",
    )


def _region_text(graph: fx.Graph) -> list[str]:
    return [
        f"{node.name} = {getattr(node.target, '_opname', node.target)}{tuple(node.args)}"
        for node in graph.nodes
        if node.op == "call_function"
    ]


def restore_site(before: Program, after: Program, entry: str, name: str) -> fx.Node:
    """Give a node of `after` the operator, the inputs and the weights it had in `before`; returns the node."""
    new = {node.name: node for node in after.entries[entry].graph.nodes}
    old = next(node for node in before.entries[entry].graph.nodes if node.name == name)

    def translate(used: fx.Node) -> fx.Node:
        if used.op == "get_attr":
            weight = str(used.target)
            after.weights.put(weight, before.weights.record(weight))
            return after.weight_node(after.entries[entry], weight)
        return new[used.name]

    node = new[name]
    node.target = old.target
    node.args = fx.node.map_arg(old.args, translate)
    node.kwargs = fx.node.map_arg(old.kwargs, translate)
    after.entries[entry].infer(node)
    return node
