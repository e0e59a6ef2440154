"""Rules of operators that compute: elementwise functions, products, norms, attention, reductions."""

from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from sparc.analysis.axes import ONE, Axis, Product, channels, concrete, divide, extent, freeze, leaves, mark, unify
from sparc.analysis.coupling import Axes, Contraction, Coupling, Rule, name_of, place_of
from sparc.analysis.coupling_layout import LAYOUT
from sparc.analysis.mixtures import routing
from sparc.analysis.zeros import vanishes

KERNEL_POSITION = "it is a kernel's position"


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [used for used in node.all_input_nodes if isinstance(used.meta.get("val"), Tensor)]


# elementwise ---------------------------------------------------------------------------------------------------------
def _elementwise(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
    return state.broadcast([state.of(used) for used in _tensors(node)])


def _inverse(at: int) -> Rule:
    """Operators that are not finite where their argument number `at` is zero: to zero is not to remove."""

    def rule(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
        divisor = node.args[at] if len(node.args) > at else None
        power = node.args[1] if name_of(node) == "pow" else -1
        safe = isinstance(power, (int, float)) and power > 0
        for leaf in () if safe else [leaf for axis in state.of(divisor) for leaf in leaves(axis)]:
            if vanishes(state, divisor, leaf):
                mark(leaf, f"{name_of(node)} is not finite at zero")
        return _elementwise(state, node, given)

    return rule


def _prelu(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
    axes, (slope,) = state.of(given["self"]), state.of(given["weight"])
    if extent(slope) != 1:
        unify(axes[1], slope)
    return axes


def _glu(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes | None:
    axes = state.of(given["self"])
    place = place_of(given["dim"], len(axes))
    half = divide(extent(axes[place]), 2)
    pair = channels(2), channels(half)
    unify(axes[place], Product(pair))
    freeze(pair[0], "its halves are multiplied (glu)")
    return (*axes[:place], pair[1], *axes[place + 1 :])


# products ------------------------------------------------------------------------------------------------------------
def _linear(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes | None:
    x, weight = given["input"], given["weight"]
    if len(state.of(weight)) != 2:
        return None
    rank, out = len(state.of(x)), state.of(weight)[0]
    state.contract(node, (x, rank - 1), (weight, 1))
    for axis in state.of(given.get("bias")):
        unify(axis, out)
    return (*state.of(x)[:-1], out)


def _matmul(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes | None:
    a, b = given["self"], given.get("mat2", given.get("other"))
    first, second = state.of(a), state.of(b)
    if len(first) < 2 or len(second) < 2:
        return None
    state.contract(node, (a, len(first) - 1), (b, len(second) - 2))
    batch = state.broadcast([first[:-2], second[:-2]])
    return (*batch, first[-2], second[-1])


def _addmm(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
    a, b = given.get("mat1", given.get("batch1")), given.get("mat2", given.get("batch2"))
    product = _matmul(state, node, {"self": a, "mat2": b})
    assert product is not None
    return state.broadcast([product, state.of(given["self"])])


def _convolution(transposed: bool) -> Rule:
    def rule(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
        x, weight, count = given["input"], given["weight"], given["groups"]
        kernel, axes = state.of(weight), state.of(x)
        place = len(axes) - len(kernel) + 1
        read, written = (0, 1) if transposed else (1, 0)
        for axis in (*kernel[2:], *axes[place + 1 :]):
            freeze(axis, KERNEL_POSITION)
        out = kernel[written]
        if count == 1:
            state.contract(node, (x, place), (weight, read))
        else:
            groups = channels(count)
            state.size(node, "groups", None, groups)
            out = _grouped(state, node, (x, place), (weight, read, written), groups)
        state.hints += [(out, "channel"), (axes[place], "channel")]
        for axis in state.of(given.get("bias")):
            unify(axis, out)
        made = tuple(channels(size, KERNEL_POSITION) for size in node.meta["val"].shape[place + 1 :])
        return (*axes[:place], out, *made)

    return rule


def _grouped(
    state: Coupling, node: fx.Node, source: tuple[fx.Node, int], filters: tuple[fx.Node, int, int], groups: Axis
) -> Axis:
    """The result's channels of a grouped convolution: groups are outermost in its input and its result."""
    weight, read, written = filters
    kernel, axes = state.of(weight), state.of(source[0])
    inner, outer = (channels(divide(extent(each), extent(groups))) for each in (axes[source[1]], _out(node, source[1])))
    unify(axes[source[1]], Product((groups, inner)))
    both = (groups, inner if written == 1 else outer)
    unify(kernel[0], Product(both))
    unify(kernel[1], outer if written == 1 else inner)
    if extent(inner) != 1:
        reader = (weight, read) if weight.op == "get_attr" else None
        state.contractions.append(Contraction(node, inner, (source[0], weight), reader))
    return Product((groups, outer))


def _out(node: fx.Node, place: int) -> Axis:
    return channels(node.meta["val"].shape[place])


def _embedding(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
    table = state.of(given["weight"])
    freeze(table[0], "its positions matter to embedding")
    state.hints.append((table[1], "hidden"))
    return (*state.of(given["indices"]), table[1])


def _grouped_linear(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
    """Rows, sorted by expert, times the matrix `[experts, out, in]` of each row's expert."""
    x, weight = given["x"], given["weight"]
    if given["ends"] in state.experts:
        unify(state.of(weight)[0], state.experts[given["ends"]])
    else:
        freeze(state.of(weight)[0], "which expert is used depends on data")
    state.contract(node, (x, 1), (weight, 2))
    return (state.of(x)[0], state.of(weight)[1])


# norms ---------------------------------------------------------------------------------------------------------------
def _last_norm(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
    axes, count = state.of(given["input"]), len(given["normalized_shape"])
    for index, axis in enumerate(axes[-count:]):
        mark(axis, f"{name_of(node)} takes a statistic of it")
        state.hints.append((axis, "hidden"))
        state.size(node, "normalized_shape", index, axis)
        for weight in (given.get("weight"), given.get("bias")):
            if weight is not None:
                unify(axis, state.of(weight)[index])
    return axes


def _group_norm(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
    axes, groups = state.of(given["input"]), channels(given["num_groups"])
    inner = channels(divide(extent(axes[1]), extent(groups)))
    unify(axes[1], Product((groups, inner)))
    state.size(node, "num_groups", None, groups)
    for axis in (inner, *axes[2:]):
        mark(axis, "group_norm takes a statistic of it")
    return _channelwise(state, axes, given, "weight", "bias")


def _batch_norm(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
    axes = state.of(given["input"])
    return _channelwise(state, axes, given, "weight", "bias", "running_mean", "running_var")


def _channelwise(state: Coupling, axes: Axes, given: dict[str, Any], *names: str) -> Axes:
    for name in names:
        for axis in state.of(given.get(name)):
            unify(axes[1], axis)
    return axes


# attention -----------------------------------------------------------------------------------------------------------
def _attention(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
    query, key, value = (state.of(given[name]) for name in ("query", "key", "value"))
    state.contract(node, (given["query"], len(query) - 1), (given["key"], len(key) - 1))
    unify(key[-2], value[-2])
    mark(key[-2], "softmax runs over it")
    state.hints += [(query[-1], "head_dim"), (value[-1], "head_dim")]
    heads = query[-3:-2]
    if heads and concrete(extent(heads[0])) != concrete(extent(key[-3])):
        repeated = channels(divide(extent(heads[0]), extent(key[-3])))
        unify(heads[0], Product((key[-3], repeated)))
        state.hints.append((repeated, "queries of a head"))
        state.hints.append((key[-3], "head"))
        unify(key[-3], value[-3])
        batch = (*state.broadcast([query[:-3], key[:-3], value[:-3]]), heads[0])
    else:
        batch = state.broadcast([query[:-2], key[:-2], value[:-2]])
        state.hints += [(axis, "head") for axis in batch[-1:]]
    if given.get("attn_mask") is not None:
        state.broadcast([(*batch, query[-2], key[-2]), state.of(given["attn_mask"])])
    return (*batch, query[-2], value[-1])


def _softmax(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes:
    axes = state.of(given["self"])
    mark(axes[place_of(given["dim"], len(axes))], f"{name_of(node)} runs over it")
    return axes


# reductions ----------------------------------------------------------------------------------------------------------
def _reduction(state: Coupling, node: fx.Node, given: dict[str, Any]) -> "Axes | list[Axes]":
    axes, dims = state.of(given["self"]), given.get("dim")
    flat = range(len(axes)) if dims is None or dims == [] else dims if isinstance(dims, (list, tuple)) else [dims]
    gone = {place_of(axis, len(axes)) for axis in flat}
    for place in gone:
        if "arg" in name_of(node) or isinstance(node.meta["val"], (list, tuple)):
            freeze(axes[place], f"its positions matter to {name_of(node)}")
        elif name_of(node) == "sum":
            state.contractions.append(Contraction(node, axes[place], (given["self"],)))
        else:
            mark(axes[place], f"{name_of(node)} runs over it")
    keep = given.get("keepdim", False)
    result = tuple(ONE if place in gone else axis for place, axis in enumerate(axes) if keep or place not in gone)
    return [result] * len(node.meta["val"]) if isinstance(node.meta["val"], (list, tuple)) else result


def _ranked(state: Coupling, node: fx.Node, given: dict[str, Any]) -> list[Axes]:
    """topk and sort: which position comes first depends on data. Where positions only find experts, those may go."""
    axes = state.of(given["self"])
    place, why = place_of(given["dim"], len(axes)), f"its positions matter to {name_of(node)}"
    route = routing(node) if name_of(node) == "topk" and place == len(axes) - 1 else None
    if route is None or not isinstance(given["k"], int):
        freeze(axes[place], why)
    else:
        mark(axes[place], "topk chooses among it")
        state.hints.append((axes[place], "expert"))
        state.least.append((axes[place], given["k"] + 1))
        readers = (*route.counts, *route.ends, *route.lookups, *route.gathers)
        state.experts.update(dict.fromkeys(readers, axes[place]))
    made = channels(node.meta["val"][0].shape[place], why)
    return [(*axes[:place], made, *axes[place + 1 :])] * len(node.meta["val"])


def _counts(state: Coupling, node: fx.Node, given: dict[str, Any]) -> Axes | None:
    """How many rows each expert gets; any other histogram is not seen through."""
    experts = state.experts.get(node)
    if experts is None:
        return None
    state.size(node, "bins", None, experts)
    state.size(node, "max", None, experts, offset=-1)
    return (experts,)


_ELEMENTWISE = {
    *("clone", "contiguous", "alias", "detach", "dropout", "feature_dropout", "to", "_to_copy", "type_as", "hardswish"),
    *("__and__", "__or__", "__xor__", "where", "masked_fill", "log_sigmoid", "fill", "lift_fresh_copy"),
    *("relu6", "hardsigmoid", "softplus", "logical_and", "logical_or", "logical_not"),
}
_REDUCTIONS = {
    *("sum", "mean", "amax", "amin", "max", "min", "any", "all", "var", "std", "prod", "argmax", "argmin"),
    *("linalg_vector_norm", "norm", "var_mean", "std_mean", "logsumexp"),
}
RULES: dict[str, Rule] = {
    **LAYOUT,
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(["div", "floor_divide"], _inverse(1)),
    **dict.fromkeys(["reciprocal", "rsqrt", "log", "pow"], _inverse(0)),
    "prelu": _prelu,
    "glu": _glu,
    "linear": _linear,
    **dict.fromkeys(["matmul", "mm", "bmm"], _matmul),
    **dict.fromkeys(["addmm", "baddbmm"], _addmm),
    **dict.fromkeys(["conv1d", "conv2d", "conv3d"], _convolution(False)),
    **dict.fromkeys(["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"], _convolution(True)),
    "grouped_linear": _grouped_linear,
    "embedding": _embedding,
    **dict.fromkeys(["layer_norm", "rms_norm"], _last_norm),
    "group_norm": _group_norm,
    **dict.fromkeys(["batch_norm", "instance_norm", "_native_batch_norm_legit_no_training"], _batch_norm),
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(["softmax", "_softmax", "log_softmax", "_log_softmax"], _softmax),
    **dict.fromkeys(_REDUCTIONS, _reduction),
    **dict.fromkeys(["topk", "sort"], _ranked),
    "histc": _counts,
}


def rule_of(node: fx.Node) -> Rule | None:
    """The rule of a node's operator; None when there is none."""
    if not isinstance(node.target, OpOverload) or node.target.namespace not in ("aten", "sparc"):
        return None
    found = RULES.get(node.target._opname)
    max_or_min = node.target._opname in ("max", "min") and len(_tensors(node)) == 2
    if (torch.Tag.pointwise in node.target.tags and found is None) or max_or_min:
        return _elementwise
    return found
