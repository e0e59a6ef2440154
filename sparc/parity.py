"""Parity of a lowering, site by site: each compressed site, fed the program's own inputs, computes what the program
computes.

A whole program that quantizes activations cannot be compared element by element: a difference in the last bit flips a
few roundings, and every further quantizer multiplies the flips. What a site computes from given inputs has no such
freedom.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sparc import codes
from sparc.diag import Diagnostics, LoweringError
from sparc.pass_base import Samples
from sparc.program import Entry, Program, WeightStore, location
from sparc.region import region
from sparc.signature import Leaf, Signature, Structure
from sparc.target import EmitContext, Target
from sparc.verify import changed_anchors, record_values, relative_error

FLOAT32_TOLERANCE = 1e-4
HALF_TOLERANCE = 2e-3


def site_program(
    program: Program, entry: Entry, anchor: fx.Node, inner: set[fx.Node]
) -> tuple[Program, tuple[str, ...]]:
    """A program of one site alone, and the names of the nodes that feed it.

    Args:
        program: the whole program.
        entry: the entry that holds the site.
        anchor: the site's operator.
        inner: the nodes that belong to the site besides: decodes and quantizers.
    """
    boundary = list(dict.fromkeys(_feeds(anchor, inner | {anchor})))
    graph = region([anchor], inner | {anchor}, boundary)
    names = tuple(node.name for node in boundary)
    leaves = tuple(Leaf(name) for name in names)
    structures = tuple(Structure() for _ in names)
    signature = Signature(names, structures, leaves, Structure(), (Leaf("output"),), names)
    used = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    weights = WeightStore({name: program.weights.record(name) for name in used})
    return Program(weights, {"forward": Entry(graph, signature, entry.fake_mode, dict(entry.symbols))}), names


def _feeds(node: fx.Node, inner: set[fx.Node]) -> list[fx.Node]:
    found: list[fx.Node] = []
    for used in node.all_input_nodes:
        if used.op == "get_attr":
            continue
        found += _feeds(used, inner) if used in inner else [used]
    return found


def new_inputs(anchor: fx.Node, known: set[str]) -> set[fx.Node]:
    """The nodes behind `anchor` that are not in `known` by name."""
    found: set[fx.Node] = set()
    stack = [used for used in anchor.all_input_nodes if used.op != "get_attr" and used.name not in known]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += [used for used in node.all_input_nodes if used.op != "get_attr" and used.name not in known]
    return found


def check_sites(
    baseline: Program, program: Program, target: Target, samples: Samples, context: EmitContext, every: bool
) -> int:
    """Compare compressed sites in the target's runtime with the program, on the program's own inputs.

    Args:
        baseline: the program before anything was approximated.
        program: the compiled program.
        target: where it is lowered to.
        samples: inputs; the first held-out one is used.
        context: the target's options and extensions' lowerings; remarks go nowhere.
        every: check every site, not one of each class of equal operators, specs and shapes.

    Returns:
        How many sites were compared.

    Raises:
        LoweringError: SPARC402 for a site that differs by more than 1e-4 (float32) or 2e-3 (half precision) relative.
    """
    silent = EmitContext(Diagnostics(), context.options, context.lowerings)
    checked = 0
    for name, batches in samples.held_out.items():
        entry = program.entries[name]
        known = {node.name for node in baseline.entries[name].graph.nodes}
        classes: dict[tuple[Any, ...], fx.Node] = {}
        found = changed_anchors(baseline, program, name)
        for anchor in [each for one in found for each in _without_sizes(one, known)]:
            if isinstance(anchor.meta["val"], Tensor) and new_inputs(anchor, known):
                classes.setdefault((anchor.name,) if every else _site_class(anchor, known), anchor)
        sites = {a: site_program(program, entry, a, new_inputs(a, known)) for a in classes.values()}
        wanted = {name for _, feeds in sites.values() for name in feeds} | {anchor.name for anchor in sites}
        values = record_values(program, name, batches[0], wanted)
        for anchor, (alone, feeds) in sites.items():
            _check_site(anchor, alone, [values[feed] for feed in feeds], values[anchor.name], target, silent)
            checked += 1
    return checked


def _without_sizes(anchor: fx.Node, known: set[str]) -> list[fx.Node]:
    """The anchor; where it reads sizes, which cannot be fed, the new tensors that it reads instead."""
    if not any(isinstance(used.meta.get("val"), torch.SymInt) for used in anchor.all_input_nodes):
        return [anchor]
    return [used for used in anchor.all_input_nodes if used.name not in known]


def _site_class(anchor: fx.Node, known: set[str]) -> tuple[Any, ...]:
    inner = sorted(new_inputs(anchor, known), key=lambda node: node.name)
    specs = tuple(sorted(str(argument) for node in inner for argument in node.args if isinstance(argument, str)))
    shapes = tuple(str(getattr(used.meta["val"], "shape", "")) for used in anchor.all_input_nodes)
    return (str(anchor.target), specs, shapes, len(inner))


def _check_site(
    anchor: fx.Node,
    alone: Program,
    inputs: Sequence[Tensor],
    expected: Tensor,
    target: Target,
    context: EmitContext,
) -> None:
    emission = target.emit(alone, context)
    found = emission.runner("forward")(inputs)[0]
    half = expected.dtype in (torch.float16, torch.bfloat16)
    difference = relative_error(expected, found)
    if not difference <= (HALF_TOLERANCE if half else FLOAT32_TOLERANCE):
        raise LoweringError(
            codes.PARITY_FAILED,
            f"{target.name} computes {anchor.name} differently, by {difference:.2e} relative",
            where=location(anchor),
        )
