"""Checks: rewritten regions in float64 and natively, whole programs, and what an approximate pass did to each site."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from sparc import codes
from sparc.analysis.values import same_shape, tensor_type
from sparc.diag import VerifyError
from sparc.execute import Values, WideWeights, execute, run_node
from sparc.pass_base import Rewrite
from sparc.program import Program

WIDE_TOLERANCE = 1e-9
_PIECE = 2**20  # elements


# measures -----------------------------------------------------------------------------------------------------------
def relative_error(reference: Tensor, other: Tensor) -> float:
    """`max |other - reference| / max |reference|`; 0 for equal tensors (infinities at the same places are equal),
    inf for another shape.
    """
    if reference.shape != other.shape:
        return math.inf
    if reference.numel() == 0 or torch.equal(reference, other):
        return 0.0
    greatest = scale = 0.0
    for a, b in _pieces(reference, other):
        difference = torch.where(a == b, torch.zeros_like(a), (b - a).abs())
        if not bool(torch.isfinite(difference).all()):
            difference = torch.where(a.isnan() & b.isnan(), torch.zeros_like(a), difference)
            if not bool(torch.isfinite(difference).all()):
                return math.inf
        greatest = max(greatest, float(difference.max()))
        finite = a[torch.isfinite(a)]
        scale = max(scale, float(finite.abs().max()) if finite.numel() else 0.0)
    return greatest / scale if scale > 0 else greatest


def snr_db(reference: Tensor, other: Tensor) -> float:
    """Signal-to-noise ratio `10 log10(|reference|² / |other - reference|²)` in decibels; inf when equal."""
    noise = signal = 0.0
    for a, b in _pieces(reference, other):
        noise += float((b - a).square().sum())
        signal += float(a.square().sum())
    if noise == 0:
        return math.inf
    if not math.isfinite(noise) or signal == 0:
        return -math.inf
    return 10 * math.log10(signal / noise)


def _pieces(reference: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both tensors in float64, a piece at a time: whole ones would take many times the memory of a model's outputs."""
    for a, b in zip(reference.flatten().split(_PIECE), other.flatten().split(_PIECE), strict=True):
        yield a.double(), b.double()


def cosine(reference: Tensor, other: Tensor) -> float:
    """Cosine of the two flattened tensors; 1 when both vanish."""
    a, b = reference.double().flatten(), other.double().flatten()
    norm = float(a.norm() * b.norm())
    return float(a @ b) / norm if norm > 0 else float(torch.equal(a, b))


METRICS = {"snr_db": snr_db, "cosine": cosine}


# regions ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class RegionCheck:
    """What checking one rewrite found.

    Args:
        rewrite: the rewrite.
        wide: largest relative difference in float64.
        native: largest relative difference in the program's own dtypes.
    """

    rewrite: Rewrite
    wide: float
    native: float


def shape_class(rewrite: Rewrite) -> tuple[Any, ...]:
    """Equal for rewrites of the same operators on the same types: one of them stands for all."""
    return tuple(
        (
            str(node.target) if node.op == "call_function" else node.op,
            str(getattr(node.meta.get("val"), "shape", "")),
            str(_literals(node)),
        )
        for graph in (rewrite.before, rewrite.after)
        for node in graph.nodes
    )


def _literals(node: fx.Node) -> list[Any]:
    return [argument for argument in node.args if not isinstance(argument, (fx.Node, list, tuple))]


def sample(rewrites: Sequence[Rewrite], every: bool) -> list[Rewrite]:
    """One rewrite of each shape class, or every one."""
    if every:
        return list(rewrites)
    return list({shape_class(rewrite): rewrite for rewrite in reversed(rewrites)}.values())[::-1]


def check_region(rewrite: Rewrite, values: Mapping[str, Any]) -> RegionCheck:
    """Run a region before and after on the same inputs, in float64 with the unrounded new weights, and natively."""
    inputs = [value_for(node, values) for node in rewrite.before.nodes if node.op == "placeholder"]
    wide_weights = {**{name: rewrite.weights[name] for name in rewrite.weights}, **rewrite.wide}
    before, after = (
        execute(graph, WideWeights(wide_weights), inputs, wide=True) for graph in (rewrite.before, rewrite.after)
    )
    wide = _worst(before, after)
    before, after = (execute(graph, rewrite.weights, inputs) for graph in (rewrite.before, rewrite.after))
    return RegionCheck(rewrite, wide, _worst(before, after))


def _worst(before: Iterable[Any], after: Iterable[Any]) -> float:
    pairs = zip(before, after, strict=True)
    return max(
        (
            relative_error(a, b) if isinstance(a, Tensor) else float(a != b) * math.inf if a != b else 0.0
            for a, b in pairs
        ),
        default=0.0,
    )


def value_for(node: fx.Node, values: Mapping[str, Any]) -> Any:
    """The recorded value of a boundary node; seeded random numbers of its type where none was recorded."""
    if node.name in values:
        return values[node.name]
    kind = node.meta["val"]
    if isinstance(kind, torch.SymInt):
        return int(kind.node.hint or 2)
    if not isinstance(kind, Tensor):
        return kind
    shape = [int(size) if isinstance(size, int) else int(size.node.hint or 2) for size in kind.shape]
    generator = torch.Generator().manual_seed(0)
    if kind.dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(kind.dtype)
    return torch.randint(0, 2, shape, generator=generator).to(kind.dtype)


def record_values(program: Program, entry: str, inputs: list[Tensor], names: set[str]) -> dict[str, Any]:
    """The values of the named nodes in one run."""
    found: dict[str, Any] = {}

    def keep(node: fx.Node, value: Any, _: Values) -> None:
        if node.name in names:
            found[node.name] = value

    if names:
        program.run_flat(inputs, entry=entry, watch=keep)
    return found


# sites --------------------------------------------------------------------------------------------------------------
@dataclass
class SiteMeasure:
    """What an approximate pass did to the value of one node.

    Args:
        node: the node's name, the same before and after.
        entry: its entry.
        values: one figure for each sample.
    """

    node: str
    entry: str
    values: list[float] = field(default_factory=list)

    @property
    def worst(self) -> float:
        """The least figure over the samples."""
        return min(self.values, default=math.inf)


def changed_anchors(before: Program, after: Program, entry: str) -> list[fx.Node]:
    """Nodes of `after` that stood in `before` too and now read other weights or newly inserted nodes."""
    old = {node.name: node for node in before.entries[entry].graph.nodes}
    changed_weights = {
        name
        for name in after.weights
        if name not in before.weights or before.weights.record(name) != after.weights.record(name)
    }
    anchors = []
    for node in after.entries[entry].graph.nodes:
        if node.op != "call_function" or node.name not in old:
            continue
        inputs = node.all_input_nodes
        if any(used.name not in old and used.op != "get_attr" for used in inputs) or any(
            used.op == "get_attr" and str(used.target) in changed_weights for used in inputs
        ):
            anchors.append(node)
    return anchors


def is_resized(before: Program, after: Program) -> bool:
    """Whether a value that both programs have has another shape in the second one."""
    return any(_resized(before, after, entry) for entry in after.entries)


def _resized(before: Program, after: Program, entry: str) -> set[str]:
    """The values and weights that have another shape than before, by name."""
    old = {node.name: tensor_type(node) for node in before.entries[entry].graph.nodes}
    found = set()
    for node in after.entries[entry].graph.nodes:
        was, now = old.get(node.name), tensor_type(node)
        if was is not None and now is not None and not same_shape(was.shape, now.shape):
            found.add(node.name)
    return found


def measure_sites(
    before: Program, after: Program, samples: Mapping[str, Sequence[list[Tensor]]], metric: str
) -> list[SiteMeasure]:
    """Compare, at every node a pass touched, the node's value before and after *on the same inputs* (those of
    `before`). A node is left out when it, or an input, has another shape than before.
    """
    function = METRICS[metric]
    measures: dict[tuple[str, str], SiteMeasure] = {}
    for entry, batches in samples.items():
        resized = _resized(before, after, entry)
        anchors = {node.name: node for node in changed_anchors(before, after, entry)}
        anchors = {
            name: node
            for name, node in anchors.items()
            if resized.isdisjoint((name, *(used.name for used in node.all_input_nodes)))
        }
        if not anchors:
            continue

        def compare(
            node: fx.Node, value: Any, env: Values, entry: str = entry, anchors: dict[str, fx.Node] = anchors
        ) -> None:
            anchor = anchors.get(node.name)
            if anchor is None or not isinstance(value, Tensor) or not value.is_floating_point():
                return
            known = {used.name: env[used] for used in env}
            other = evaluate_new(anchor, known, after.weights)
            measures.setdefault((entry, node.name), SiteMeasure(node.name, entry)).values.append(function(value, other))

        for tensors in batches:
            before.run_flat(tensors, entry=entry, watch=compare)
    return list(measures.values())


def evaluate_new(anchor: fx.Node, known: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Any:
    """The value of a node whose inputs are known by name, or are new nodes to be computed first."""
    env: dict[fx.Node, Any] = {}

    def value(node: fx.Node) -> Any:
        if node in env:
            return env[node]
        if node.op == "get_attr":
            env[node] = weights[str(node.target)]
        elif node is not anchor and node.name in known:
            env[node] = known[node.name]
        else:
            for used in node.all_input_nodes:
                value(used)
            env[node] = run_node(node, env, weights)
        return env[node]

    with torch.no_grad():
        return value(anchor)


# types --------------------------------------------------------------------------------------------------------------
def check_types(step: str, before: Program, after: Program) -> None:
    """Graphs are well formed; outputs keep shape and dtype, but for what was cut from a cache.

    Args:
        step: the pass, for messages.
        before: the program before it.
        after: and behind it.

    Raises:
        VerifyError: SPARC304.
    """
    for name, entry in after.entries.items():
        try:
            entry.graph.lint()
        except RuntimeError as error:
            why = str(error)[:300]
            raise VerifyError(codes.TYPES_CHANGED, f"pass {step!r} left a malformed graph", why=why) from None
        slots = entry.cache.slots if entry.cache is not None else ()
        cut = {slot.output: {axis: len(places) for axis, places in slot.kept} for slot in slots}
        results = zip(before.entries[name].output.args[0], entry.output.args[0], strict=True)  # type: ignore[arg-type]
        for output, (old, new) in zip(entry.signature.output_names, results, strict=True):
            left = cut.get(output, {})
            shape = [left.get(axis, size) for axis, size in enumerate(old.meta["val"].shape)]  # type: ignore[union-attr]
            was, now = _type(old.meta["val"].dtype, shape), _type(new.meta["val"].dtype, new.meta["val"].shape)  # type: ignore[union-attr]
            if was != now:
                what = f"pass {step!r} changed an output's type"
                raise VerifyError(codes.TYPES_CHANGED, what, why=f"{was} became {now}")


def _type(dtype: torch.dtype, shape: Sequence[Any]) -> tuple[torch.dtype, tuple[str, ...]]:
    return dtype, tuple(map(str, shape))


# whole programs -----------------------------------------------------------------------------------------------------
def output_errors(
    names: Sequence[str], reference: Sequence[Sequence[Any]], other: Sequence[Sequence[Any]]
) -> dict[str, dict[str, float]]:
    """For each output: the worst relative error, the mean cosine and the mean signal-to-noise ratio over the
    samples. Outputs of another shape (a cache that was cut) are left out.
    """
    errors: dict[str, dict[str, float]] = {}
    for index, name in enumerate(names):
        pairs = [(a[index], b[index]) for a, b in zip(reference, other, strict=True)]
        pairs = [(a, b) for a, b in pairs if isinstance(a, Tensor) and a.is_floating_point() and a.shape == b.shape]
        if pairs:
            errors[name] = {
                "relative error": max(relative_error(a, b) for a, b in pairs),
                "cosine": sum(cosine(a, b) for a, b in pairs) / len(pairs),
                "snr_db": min(999.0, sum(min(999.0, snr_db(a, b)) for a, b in pairs) / len(pairs)),
            }
    return errors
