"""How far two programs are apart: per output and per layer, worst first, with the smallest tolerance that passes."""

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sparc import codes
from sparc.cache import fit
from sparc.diag import ArtifactError
from sparc.execute import Values
from sparc.program import Program, location
from sparc.signature import Signature
from sparc.text import operator_name
from sparc.verify import cosine, snr_db

_MOVEMENT = frozenset(
    {"view", "reshape", "transpose", "permute", "expand", "unsqueeze", "squeeze", "slice", "select", "split", "chunk",
     "unbind", "getitem", "contiguous", "clone", "alias", "detach", "to", "_to_copy", "t", "numpy_T", "flatten",
     "unflatten", "cat", "stack", "split_with_sizes", "arange", "full", "zeros", "ones", "dropout", "repeat", "pad"}
)  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """How far a tensor `b` is from its reference `a`.

    Args:
        name: the output, or the node of the layer.
        tolerance: the smallest t with `|b - a| <= t (1 + |a|)` for every element: passes as rtol and as atol.
        p99: the same for 99% of the elements.
        p90: and for 90%.
        snr_db: signal-to-noise ratio in decibels.
        cosine: of the flattened tensors.
        operator: of a layer.
        module: of a layer, the path in the user's model.
        source: of a layer, the user's line.
    """

    name: str
    tolerance: float
    p99: float
    p90: float
    snr_db: float
    cosine: float
    operator: str = ""
    module: str = ""
    source: str = ""


def difference(name: str, a: Tensor, b: Tensor, node: fx.Node | None = None) -> Difference:
    """Compare two tensors of one shape; infinities and NaN count as equal where both have them."""
    where = location(node) if node is not None else None
    labels = (
        (operator_name(node.target), where.module, where.source)
        if node is not None and where is not None
        else ("", "", "")
    )
    if a.shape != b.shape:
        return Difference(name, math.inf, math.inf, math.inf, -math.inf, 0.0, *labels)
    wide_a, wide_b = a.detach().double().flatten(), b.detach().double().flatten()
    same = (wide_a == wide_b) | (wide_a.isnan() & wide_b.isnan())
    error = torch.where(same, 0.0, (wide_b - wide_a).abs() / (1 + wide_a.abs()))
    error = torch.where(error.isnan(), math.inf, error)
    largest, p99, p90 = (_percentile(error, part) for part in (1.0, 0.99, 0.9))
    noise = snr_db(a, b) if math.isfinite(largest) else -math.inf
    return Difference(name, largest, p99, p90, noise, cosine(a, b), *labels)


def _percentile(values: Tensor, part: float) -> float:
    """The least value that `part` of all values do not exceed."""
    if values.numel() == 0:
        return 0.0
    return float(values.kthvalue(max(1, math.ceil(part * values.numel()))).values)


def worst_first(differences: Iterable[Difference]) -> list[Difference]:
    """The largest tolerance first."""
    return sorted(differences, key=lambda each: -each.tolerance)


def check_same_inputs(a: Signature, b: Signature) -> None:
    """Two programs can be compared when they take the same inputs and give the same outputs.

    Raises:
        ArtifactError: SPARC506.
    """
    for what, ours, theirs in (("inputs", a.input_names, b.input_names), ("outputs", a.output_names, b.output_names)):
        if ours != theirs:
            raise ArtifactError(
                codes.CALL_MISMATCH,
                f"the two have different {what}",
                why=f"{', '.join(ours)} and {', '.join(theirs)}",
                hint="compare artifacts of one model",
            )


def output_differences(
    names: Sequence[str], a: Sequence[Any], b: Sequence[Any], cut: Container[str] = ()
) -> list[Difference]:
    """Compare the flat outputs of two runs, but for some that were cut; the first is the reference."""
    return [
        difference(name, reference, other)
        for name, reference, other in zip(names, a, b, strict=True)
        if isinstance(reference, Tensor) and isinstance(other, Tensor) and name not in cut
    ]


def layer_differences(a: Program, b: Program, inputs: Sequence[Tensor], entry: str | None = None) -> list[Difference]:
    """Run two programs in eager torch and compare every layer that both have; the first program is the reference.

    Layers are nodes of equal name and shape that compute something: operators that only move data are left out.

    Args:
        a: the reference.
        b: the other.
        inputs: one tensor per input.
        entry: the entry; the first by default.
    """
    wanted = _layers(a, entry).keys() & _layers(b, entry).keys()
    recorded: dict[str, Tensor] = {}
    found: list[Difference] = []

    def record(node: fx.Node, value: Any, _alive: Values) -> None:
        if node.name in wanted and isinstance(value, Tensor) and node.op == "call_function":
            recorded[node.name] = value

    def compare(node: fx.Node, value: Any, _alive: Values) -> None:
        reference = recorded.pop(node.name, None) if node.op == "call_function" else None
        if reference is not None and isinstance(value, Tensor) and value.shape == reference.shape:
            found.append(difference(node.name, reference, value, node))

    a.run_flat(fit(a.entry(entry), inputs), entry=entry, watch=record)
    b.run_flat(fit(b.entry(entry), inputs), entry=entry, watch=compare)
    return found


def _layers(program: Program, entry: str | None) -> Mapping[str, fx.Node]:
    return {
        node.name: node for node in program.entry(entry).graph.nodes if node.op == "call_function" and _computes(node)
    }


def _computes(node: fx.Node) -> bool:
    value = node.meta.get("val")
    name = str(getattr(node.target, "_opname", getattr(node.target, "__name__", "")))
    return isinstance(value, Tensor) and value.dtype.is_floating_point and name not in _MOVEMENT
