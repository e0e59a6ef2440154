"""A whole mixture of experts on encoded weights: ONNX Runtime's QMoE, which keeps them encoded in memory.

Its CPU kernel was compared with float64 (ONNX Runtime 1.31.1). Gate and projection lie row by row in turns. A token
goes to the `k` greatest of `router_probs`, and each expert's result counts by its entry of `router_weights` (since
1.25). Codes of 4 bits in blocks, and codes of 8 bits with a scale for each row, meet floats. With codes of 8 bits in
blocks x is rounded, so they are not given to it.
"""

import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import fx

from sparc.analysis.values import same_shape, same_type, shape_of
from sparc.codegen.encoded import Encoded, match_encoded
from sparc.codegen.onnx.fuse.plan import Plan
from sparc.pattern import Operators, match, normalized_arguments, trace
from sparc.target import KernelUse

if TYPE_CHECKING:
    from sparc.codegen.onnx.emit import Emitter

aten = torch.ops.aten
_MS = "com.microsoft"
_BLOCKS = (16, 32, 64, 128)


def _mixture(op: Operators, gated: Callable[..., Any], bound: Mapping[str, Any], biased: bool) -> Any:
    """Rows sorted by expert, a gated unit for each, and every token's weighted sum."""
    order = op.sort(op.reshape(bound["chosen"], op.any()))
    experts, place = op.getitem(order, 0), op.getitem(order, 1)
    ends = op.cumsum(op.histc(op.to(experts, op.any()), bound["runs"], 0, bound["last"]), 0, dtype=op.any())

    def product(rows: Any, name: str) -> Any:
        result = op.sparc.grouped_linear(rows, bound[name], ends)
        return op.add(result, op.index(op.weight(bound[f"{name}_bias"]), [experts])) if biased else result

    rows = product(op.index(bound["x"], [op.floor_divide(place, bound["each"])]), "up")
    share = op.unsqueeze(op.index(op.reshape(bound["shares"], op.any()), [place]), -1)
    weighted = op.mul(product(gated(op, rows, bound), "down"), share)
    back = op.index_put(bound["written"], [place], bound["count"])
    return op.sum(op.reshape(op.index(weighted, [back]), op.any()), [1])


def _silu(op: Operators, rows: Any, bound: Mapping[str, Any]) -> Any:
    """The first half, activated, times the second."""
    halves = op.chunk(rows, 2, -1)
    return op.mul(op.silu(op.getitem(halves, 0)), op.getitem(halves, 1))


def _clamped(op: Operators, rows: Any, bound: Mapping[str, Any]) -> Any:
    """`g * sigmoid(alpha * g) * (l + beta)` of rows in turns, both clamped."""
    gate = op.clamp(op.slice(rows, 1, 0, op.any(), 2), None, bound["limit"])
    line = op.clamp(op.slice(rows, 1, 1, op.any(), 2), bound["least"], bound["limit"])
    return op.mul(op.add(line, bound["beta"]), op.mul(gate, op.sigmoid(op.mul(gate, bound["alpha"]))))


def _plain_mixture(
    op: Operators, x: Any, chosen: Any, shares: Any, up: Any, down: Any, each: Any, runs: Any, last: Any, written: Any,
    count: Any,
) -> Any:  # fmt: skip
    return _mixture(op, _silu, locals(), biased=False)


def _biased_mixture(
    op: Operators, x: Any, chosen: Any, shares: Any, up: Any, down: Any, up_bias: Any, down_bias: Any, each: Any,
    runs: Any, last: Any, written: Any, count: Any, limit: Any, least: Any, alpha: Any, beta: Any,
) -> Any:  # fmt: skip
    return _mixture(op, _clamped, locals(), biased=True)


_PATTERNS = (trace(_plain_mixture), trace(_biased_mixture))


def plan_experts(plan: Plan, node: fx.Node) -> None:
    """Let QMoE compute a mixture whose two weights it takes as they are."""
    if plan.target.flavour != "cpu" or node.target is not aten.sum.dim_IntList:
        return
    found = next((found for pattern in _PATTERNS if (found := match(pattern, node)) is not None), None)
    if found is None or not _is_proved(node, found.values):
        return
    weights = [match_encoded(plan.program, found.values[name]) for name in ("up", "down")]
    up, down = weights
    if up is None or down is None or not (_is_taken(up) and _is_taken(down)) or up.spec != down.spec:
        return
    plan.put(node, lambda e: _emit(e, found.values, up, down))
    plan.absorb(*(each for each in found.nodes if each is not node))


def _is_proved(node: fx.Node, found: Mapping[str, Any]) -> bool:
    """What the pattern cannot say: a token has `each` different experts, and rows go back where they came from."""
    x, chosen, count = found["x"].meta["val"], found["chosen"], found["count"]
    experts = found["up"].meta["val"].shape[0]
    if x.ndim != 2 or x.dtype != torch.float32 or chosen.meta["val"].ndim != 2:
        return False
    tokens, each = shape_of(chosen)
    return (
        found.get("least", 0) == -found.get("limit", 0)
        and _is_top(chosen, experts)
        and (found["each"], found["runs"], found["last"]) == (each, experts, experts - 1)
        and same_shape(shape_of(found["shares"]), (tokens, each))
        and same_shape(shape_of(node.args[0]), (tokens, each, x.shape[1]))  # type: ignore[arg-type]
        and same_shape(shape_of(node), x.shape)
        and same_type(found["written"].meta["val"], count.meta["val"])
        and count.target in (aten.arange.default, aten.arange.start)
        and normalized_arguments(count).get("start", 0) == 0
        and same_shape(shape_of(count), (tokens * each,))
    )


def _is_top(chosen: fx.Node, experts: int) -> bool:
    """Whether a node has the places of the greatest, or least, of as many scores as there are experts."""
    source = chosen.args[0] if chosen.target is operator.getitem and chosen.args[1] == 1 else None
    if not isinstance(source, fx.Node) or source.target is not aten.topk.default:
        return False
    given = normalized_arguments(source)
    return given["dim"] in (1, -1) and shape_of(given["self"])[-1] == experts


def _is_taken(weight: Encoded) -> bool:
    grid, reduce = weight.grid, weight.matrix_shape[-1]
    if grid is None or grid.scale_dtype != "float32" or weight.dtype != torch.float32 or grid.zero == "minimum":
        return False
    if grid.bits == 8:
        return grid.group == "channel" and grid.symmetric
    return grid.bits == 4 and grid.group in _BLOCKS and reduce % int(grid.group) == 0


def _emit(e: "Emitter", found: Mapping[str, Any], up: Encoded, down: Encoded) -> ir.Value:
    chosen, grid = found["chosen"], up.grid
    assert grid is not None
    dims = e.op("Concat", e.op("Shape", chosen, start=0, end=1), e.ints([found["runs"]]), axis=0)
    nothing = e.op("Expand", e.const(0, torch.float32), dims)
    ones = e.op("Expand", e.const(1, torch.float32), e.op("Shape", chosen))
    selected = e.op("ScatterElements", nothing, chosen, ones, axis=1)
    shares = e.op("ScatterElements", nothing, chosen, found["shares"], axis=1)
    order = "" if "limit" in found else "interleave+"
    (codes, scale, zero), (codes2, scale2, zero2) = _parts(e, up, order), _parts(e, down, "")
    first, second = found.get("up_bias"), found.get("down_bias")
    inputs = (codes, scale, first, codes2, scale2, second, None, None, None, zero, zero2, None)
    for weight in (up, down):
        size = sum(part.nbytes for part in weight.tensors(e.program).values())
        e.carry(weight.site, KernelUse("QMoE", size))
    return e.op(  # type: ignore[no-any-return]
        "QMoE", found["x"], selected, *inputs, shares, domain=_MS, k=found["each"], expert_weight_bits=grid.bits,
        block_size=grid.group if grid.bits == 4 else None, activation_type="swiglu", swiglu_fusion=1,
        activation_alpha=float(found.get("alpha", 1)), activation_beta=float(found.get("beta", 0)),
        swiglu_limit=found.get("limit"), normalize_routing_weights=0,
    )  # fmt: skip


def _parts(e: "Emitter", weight: Encoded, order: str) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """Codes, scales and zero points, their rows in an order; a zero point in the middle is left out."""
    grid = weight.grid
    assert grid is not None
    codes = e.weight(weight.parts["codes"], order + ("flip_sign" if grid.bits == 8 else "identity"))
    rows = weight.matrix_shape[:-1] if grid.bits == 8 else None
    scale = e.weight(weight.parts["scale"], order + "identity", dims=rows)
    zero = None if grid.symmetric else e.weight(weight.parts["zero"], order + "pack4")
    return codes, scale, zero
